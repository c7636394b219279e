"""Where an experiment is found again: scripts, modules, notebooks. Each works or is refused in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spd.config import UserError
from spd.experiments.tms.tms_decomposition import build
from spd.problem import Problem
from spd.runs.cli import parts_of
from spd.runs.execution import ExperimentConfig
from spd.runs.run import load_run, start
from spd.settings import PACKAGE_DIR
from tests.run_fixtures import QUICK, make_tms_target
from tests.runs.little_run import little_config

CLASS = """
from spd.runs.execution import ExperimentConfig

class {}(ExperimentConfig):
    {}: int = 1
"""
BUILD = "\ndef build(config{}, device):\n    raise AssertionError\n"


def written(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}_{abs(hash(str(folder)))}.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_class_in_another_module_than_build(tmp_path: Path):
    other = Path(written(tmp_path, "settings_of_it", CLASS.format("Mine", "depth"))).stem
    imported = f"from {other} import Mine\n"
    config_class, build = parts_of(written(tmp_path, "imported", imported + BUILD.format(": Mine")))
    assert config_class.__name__ == "Mine" and "depth" in config_class.model_fields
    assert build.__name__ == "build"
    elsewhere = f"import {other}\n" + BUILD.format(f": {other}.Mine")
    with pytest.raises(UserError, match=f"Mine is defined in {other} and build in .*: import the"):
        parts_of(written(tmp_path, "elsewhere", elsewhere))
    with pytest.raises(UserError, match=r"\(found: none\) and a function build"):
        parts_of(written(tmp_path, "unnamed", imported + BUILD.format("")))


def test_two_classes_in_one_module(tmp_path: Path):
    two = CLASS.format("First", "depth") + CLASS.format("Second", "width")
    config_class, _ = parts_of(written(tmp_path, "named", two + BUILD.format(": Second")))
    assert config_class.__name__ == "Second" and "width" in config_class.model_fields
    with pytest.raises(UserError, match=r"found: First, Second.* build names, as in build\(config"):
        parts_of(written(tmp_path, "unnamed", two + BUILD.format("")))
    one = CLASS.format("First", "depth")
    assert parts_of(written(tmp_path, "one", one + BUILD.format("")))[0].__name__ == "First"
    with pytest.raises(UserError, match="none found"):
        parts_of(written(tmp_path, "none", one))


def test_a_build_that_is_not_found_again_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))

    def inner(config: ExperimentConfig, device: torch.device) -> Problem:
        raise AssertionError

    raw = {"experiment": "x", "sites": {"a": 1}, "steps": 1, "lr": 1.0}
    config = ExperimentConfig.model_validate({**raw, "losses": {"faithfulness": {"coeff": 1.0}}})
    with pytest.raises(UserError, match="inner is no function of the module itself"):
        start(config, inner)
    assert not (tmp_path / "out").exists()


def test_one_run_is_not_begun_where_several_seeds_are_asked_for(tmp_path: Path):
    config = little_config(tmp_path, "seeds=[0, 1]")
    with pytest.raises(UserError, match=r"seeds: \[0, 1\] .* call run_seeds.* or give seed"):
        start(config, build, directory=tmp_path / "a-run")
    assert not (tmp_path / "a-run").exists()


IN_A_NOTEBOOK = """
import builtins, sys
builtins.get_ipython = lambda: None
sys.argv = ["ipykernel_launcher.py", "-f", "/run/user/kernel.json"]
from pathlib import Path
from spd.config import UserError, load_config
from spd.runs.cli import cli
from spd.runs.run import start
from spd.experiments.tms import tms_decomposition as tms

config = load_config(tms.TMSConfig, Path(%r), %r)
def build(config, device):
    raise AssertionError
"""
CONFIG = PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_config.yaml"


def in_a_notebook(folder: Path, target: Path, code: str) -> subprocess.CompletedProcess[str]:
    overrides = [f"target={target}", *QUICK, "steps=2"]
    return subprocess.run(
        [sys.executable, "-c", IN_A_NOTEBOOK % (str(CONFIG), overrides) + code],
        cwd=folder,
        env={**os.environ, "SPD_OUT_DIR": str(folder / "out"), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_in_a_notebook_start_runs_and_cli_says_so(tmp_path: Path):
    target = make_tms_target(tmp_path / "target")
    done = in_a_notebook(tmp_path, target, "print(start(config, tms.build))")
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip().splitlines()[-1])
    assert load_run(run).step == 2 and (run / "report.html").is_file()

    done = in_a_notebook(tmp_path, target, "cli(tms.TMSConfig, tms.build)")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "call spd.runs.run.start(config, build)" in done.stderr

    own = "try:\n    start(config, build)\nexcept UserError as error:\n    print(error)"
    done = in_a_notebook(tmp_path, target, own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("build is defined in a notebook") and done.stdout.count("\n") == 1
    assert "spd.decompose(problem, config)" in done.stdout
    assert len(list((tmp_path / "out").glob("tms_5-2/*"))) == 1
