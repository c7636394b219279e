"""A run of the small toy in this process, finished in a second, for tests of what is done with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd.config import load_config
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.runs.run import start
from tests.run_fixtures import QUICK, TMS_CONFIG, make_tms_target
from tests.undrawn import undrawn


def little_config(folder: Path, *overrides: str) -> TMSConfig:
    """Its target is made in `folder`, once."""
    target = folder / "made-target"
    if not target.is_dir():
        make_tms_target(target)
    fixed = [f"target={target}", *QUICK, "compile=false", "device=cpu"]
    return load_config(TMSConfig, TMS_CONFIG, [*fixed, *overrides])


def little_run(folder: Path, name: str = "a-run", *overrides: str) -> Path:
    """The directory of a run with checkpoints at steps 4 and 6."""
    with undrawn():
        return start(little_config(folder, *overrides), build, directory=folder / name)


def edit_meta(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write meta.json anew after `change` has been at it."""
    path = run / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    change(meta)
    path.write_text(json.dumps(meta), encoding="utf-8")


def status_of(command: Callable[..., object], *words: str | Path) -> int:
    """The exit status of a command that is called here."""
    try:
        command([str(word) for word in words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


@pytest.fixture(scope="module", name="original")
def original_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return little_run(tmp_path_factory.mktemp("little"))
