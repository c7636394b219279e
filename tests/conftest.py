"""Shape annotations are executed: every test runs `spd` under an import hook that checks them
(`tests/typechecking.py`).

Compiled code cannot run under the hook. A test marked `compiled` therefore runs in a process of its
own, without it.
"""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Generator

import pytest

from tests import typechecking

UNCHECKED = "SPD_TESTS_UNCHECKED"
CHECK_ALL = "SPD_TESTS_CHECK_ALL"
COMPILER = "a C++ compiler"

gc.disable()  # until everything has been imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of the processes that tests start, too:
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # a thread that waits leaves its core to the others
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if UNCHECKED not in os.environ:
    assert "spd" not in sys.modules, "the hook comes too late: spd has been imported already"
    typechecking.check_package(every_call=CHECK_ALL in os.environ)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs torch.compile; runs without shape checks")
    config.addinivalue_line("markers", "undrawn: pictures are left out")
    config.addinivalue_line("markers", "needs(what): a program; the test is skipped without it")


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector need not look through it again."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    typechecking.next_test()
    needed = {what for marker in item.iter_markers("needs") for what in marker.args}
    if item.get_closest_marker("compiled") is not None:
        needed.add(COMPILER)
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    if COMPILER in needed and not any(map(shutil.which, compilers)):
        pytest.skip(f"needs {COMPILER}: g++ or clang++ on PATH, or CXX")
    for program in sorted(needed - {COMPILER}):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} on PATH")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("undrawn") is None:
        return (yield)
    from tests.undrawn import undrawn  # loads matplotlib

    with undrawn():
        return (yield)


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
