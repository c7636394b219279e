"""What becomes a line of a job script has an alphabet: nothing in it is a line of its own."""

import os
from pathlib import Path

import pytest

from spd.config import UserError, parse
from spd.launch import slurm
from spd.launch.job import Job
from spd.launch.resources import LaunchOptions, with_surroundings

OPTIONS = ("partition", "account", "qos", "constraint")
LINE = "x\ntouch /tmp/it-was-run\n#SBATCH --comment=x"
BAD = [LINE, "x y", "x\r", "$(true)", "`true`", "x;true", "-x", "", "x" * 201, "x\u2028y", "'x'"]
GOOD = {
    "partition": ["gpu", "gpu,cpu-long", "a_1.b+c"],
    "account": ["lab-1", "me@there", "a.b"],
    "qos": ["normal", "high-prio"],
    "constraint": ["a100", "[a100&nvlink|h100]", "intel*4&!old", "(x|y)&z", "gpu:1,mem=2"],
}


def options(tmp_path: Path, name: str, value: str, where: str, monkeypatch: pytest.MonkeyPatch):
    given = {}
    if where == "file":
        path = tmp_path / "slurm.yaml"
        lines = value.encode("unicode_escape").decode().replace('"', '\\"')
        path.write_text(f'{name}: "{lines}"\n', encoding="utf-8")
        given = {"slurm": str(path)}
    elif where == "environment":
        monkeypatch.setenv(f"SPD_SLURM_{name.upper()}", value)
    else:
        given = {name: value}
    return parse(LaunchOptions, with_surroundings(given, "x"), "x")


@pytest.mark.parametrize("where", ["file", "option"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_more_than_a_word(
    tmp_path: Path, name: str, where: str, monkeypatch: pytest.MonkeyPatch
):
    for value in BAD:
        with pytest.raises(UserError, match=rf"{name}: .* is no .* of SLURM: up to 200 letters"):
            options(tmp_path, name, value, where, monkeypatch)
    for value in GOOD[name]:
        assert getattr(options(tmp_path, name, value, where, monkeypatch), name) == value


@pytest.mark.parametrize("name", OPTIONS)
def test_nor_is_one_from_the_environment(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=rf"SPD_SLURM_{name.upper()}: {name}: "):
        options(tmp_path, name, LINE, "environment", monkeypatch)


@pytest.fixture(name="srun")
def srun_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit writes a script only where there is an `srun`: this one never runs."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("srun")
def test_nor_are_names_and_folders(tmp_path: Path):
    asked = LaunchOptions(cpu=True)
    good = Job("a", tmp_path / "a", ["true"], {"A": "x\ntouch y"}, 1)
    (script,) = slurm.scripts(tmp_path, [good], asked)
    assert "export A='x\ntouch y'" in script
    with pytest.raises(UserError, match="the job's name"):
        list(slurm.scripts(tmp_path, [good._replace(slurm_name=LINE)], asked))
    with pytest.raises(UserError, match="the study's folder"):
        list(slurm.scripts(tmp_path / "x\ny", [good], asked))
