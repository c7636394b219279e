"""Shape annotations are executed: every test runs `spd` under an import hook that checks them.

Compiled code cannot run under the hook. A test marked `compiled` therefore runs in a process of its
own, without it.
"""

import os
import subprocess
import sys

import pytest
from jaxtyping import install_import_hook

from tests.typechecking import check

UNCHECKED = "SPD_TESTS_UNCHECKED"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if UNCHECKED not in os.environ:
    assert "spd" not in sys.modules, "the hook comes too late: spd has been imported already"
    install_import_hook("spd", f"{check.__module__}.{check.__name__}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs torch.compile; runs without shape checks")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("compiled") is None or UNCHECKED in os.environ:
        return None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, UNCHECKED: "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return True
