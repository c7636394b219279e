"""What the README and the documents tell people to type does what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of one language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def run_python(folder: Path, *args: str, package: Path = REPO) -> str:
    """The output of a Python command in `folder` with `package` importable; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(package), "SPD_OUT_DIR": str(folder / "out")}
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the documented diffs applied."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPO / "spd", copy / "spd", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    diffs = blocks(REPO / "docs" / "extending.md", "diff")
    assert len(diffs) == 2
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    return copy


def test_the_added_loss_passes_its_test(extended: Path) -> None:
    out = run_python(extended, "-m", "pytest", "-q", "tests/test_smooth_l0.py", package=extended)
    assert "1 passed" in out


def test_the_added_experiment_runs_with_the_added_loss(extended: Path) -> None:
    overrides = ("steps=3", "losses.smooth_l0={coeff: 1e-3}")
    run_python(extended, "-m", "spd.registry", "linear_map", *overrides, package=extended)
    (result,) = (extended / "out" / "linear_map").glob("*/result.json")
    keys = {row["key"] for row in json.loads(result.read_text())["rows"]}
    assert {"errors/map", "loss/smooth_l0"} <= keys


@pytest.mark.slow
def test_the_added_experiment_is_solved(extended: Path) -> None:
    out = run_python(extended, "-m", "spd.registry", "linear_map", package=extended)
    assert "solved: every site matches" in out


def test_the_library_example_of_the_readme(tmp_path: Path) -> None:
    (example,) = [code for code in blocks(REPO / "README.md", "python") if "decompose(" in code]
    assert len(example.splitlines()) <= 20
    (tmp_path / "example.py").write_text(example)
    out = run_python(tmp_path, "example.py")
    assert re.search(r"torch\.Size\(\[\d+, \d+\]\)", out)
    assert [path.name for path in tmp_path.iterdir()] == ["example.py"], "a library writes nothing"
