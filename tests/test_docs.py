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


def diffs() -> dict[str, str]:
    """The diffs of docs/extending.md by the heading that they stand under."""
    text = (REPO / "docs" / "extending.md").read_text(encoding="utf-8")
    sections = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    found = {}
    for heading, section in zip(sections[::2], sections[1::2], strict=True):
        (found[heading.removeprefix("Add ")],) = re.findall(
            r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
        )
    return found


def apply(folder: Path, *parts: str) -> None:
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    for part in parts:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=part, text=True, check=True)


ADDED = {
    "a loss": ("spd/losses/__init__.py", "soft_count"),
    "a metric": ("spd/metrics/__init__.py", "effective_rank"),
    "a figure": ("spd/reports/figures.py", "norms_figure"),
    "an importance function": ("spd/importance/functions.py", "threshold_importance"),
}
QUICK = (
    *("steps=3", "batch_size=16", "n_eval_batches=1", "log_every=1", "eval_every=3"),
    *("compile=false", "device=cpu"),
)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the documented diffs applied, and a folder `own` beside it."""
    if shutil.which("git") is None:
        pytest.skip("needs git on PATH")
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPO / "spd", copy / "spd", ignore=shutil.ignore_patterns("__pycache__"))
    documented = diffs()
    assert list(documented) == [*ADDED, "an experiment"]
    apply(copy, *(documented[name] for name in ADDED))
    (copy / "own").mkdir()
    apply(copy / "own", documented["an experiment"])
    return copy


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_touches_one_source_file_and_brings_a_test(name: str) -> None:
    file, test = ADDED[name]
    touched = re.findall(r"^\+\+\+ b/(.*)$", diffs()[name], re.MULTILINE)
    assert touched == [file, f"tests/test_{test}.py"]


@pytest.mark.slow
def test_what_is_added_passes_its_tests(extended: Path) -> None:
    out = run_python(extended, "-m", "pytest", "-q", "tests", package=extended)
    assert "4 passed" in out


@pytest.fixture(scope="module")
def study(extended: Path) -> tuple[Path, str]:
    """The folder of a study of two seeds with all that is added, and what it said."""
    own = extended / "own"
    added = (
        *("losses.soft_count={coeff: 1e-3}", "importance={type: threshold}"),
        *("figures={subcomponent_norms: {}}", "metrics.effective_rank={}"),
        "metrics.column_match.expected={mmcs/map: [0, 1.001]}",
        "metrics.pattern_errors.expected={}",
    )
    arguments = ("--experiments", "my_experiment.yaml", "--seeds", "2", "--local", "--cpu")
    settings = [setting for setting in QUICK if not setting.startswith("device")]
    out = run_python(
        own, "-m", "spd.evals.run_evals", *arguments, *settings, *added, package=extended
    )
    (folder,) = (own / "out" / "evals").iterdir()
    return folder, out


@pytest.mark.slow
def test_an_added_metric_is_seen_wherever_figures_are(
    study: tuple[Path, str], extended: Path
) -> None:
    folder, out = study
    run = folder.parents[1] / "my_experiment" / f"{folder.name}-seed1"
    result = json.loads((run / "result.json").read_text())
    rows = {row["key"]: row for row in result["rows"]}
    assert {"loss/soft_count", "errors/map", "rank/map"} <= rows.keys()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {key for line in logged for key in line if key.startswith("eval/")}
    spreads = {key for key in evaluated if "_sd/" in key}
    assert {f"eval/{key}" for key in rows} == evaluated - spreads
    shown = f"{rows['rank/map']['value']:.2f}"
    printed = (folder / "jobs" / "my_experiment-seed1" / "output.txt").read_text()
    assert re.search(rf"effective rank map +{shown}", printed)
    report = (run / "report.html").read_text()
    assert f"effective rank map</th><td>{shown}<" in report and "as many equal singular" in report
    assert "Lengths of the subcomponents" in report
    assert re.search(r"effective rank map  +\d\.\d\d ± \d\.\d\d", out)
    assert "effective rank map" in (folder / "summary.html").read_text()


@pytest.mark.slow
def test_a_run_of_an_experiment_outside_is_a_run_like_any_other(extended: Path) -> None:
    """By its YAML file: run, and loaded elsewhere."""
    own = extended / "own"
    command = ("-m", "spd.registry", "my_experiment.yaml", *QUICK)
    assert "MMCS map" in run_python(own, *command, "--run_dir", "a-run", package=extended)
    code = "import sys; from spd.runs.run import load_run; print(load_run(sys.argv[1], trust=True).step)"
    assert run_python(extended, "-c", code, str(own / "a-run"), package=extended) == "3\n"


@pytest.mark.slow
def test_an_experiment_outside_is_resumed_and_swept(extended: Path) -> None:
    own = extended / "own"
    command = ("-m", "spd.registry", "my_experiment.yaml", *QUICK)
    run_python(own, *command, "--run_dir", "gone-on", package=extended)
    resumed = ("--resume", "gone-on", "--trust")
    again = run_python(own, "-m", "spd.registry", *resumed, package=extended)
    assert "effective" not in again and "MMCS map" in again
    named = ("my_experiment.yaml", "--resume", "gone-on")
    assert again.split("report")[0][:20] in run_python(
        own, "-m", "spd.registry", *named, package=extended
    )
    (own / "sweep.yaml").write_text(
        "method: grid\nmetric: {name: eval/loss/total}\nparameters: {lr: {values: [1e-3, 1e-2]}}\n"
    )
    swept = ("my_experiment.yaml", "2", "--local", "--cpu", "--params", "sweep.yaml")
    out = run_python(own, "-m", "spd.sweeps.sweep", *swept, *QUICK[:-1], package=extended)
    assert "2 finished" in out


@pytest.mark.slow
def test_the_added_experiment_is_solved(extended: Path) -> None:
    out = run_python(extended / "own", "-m", "spd.registry", "my_experiment.yaml", package=extended)
    assert "every site matches the known importance pattern" in out


@pytest.mark.slow
def test_the_library_example_of_the_readme(tmp_path: Path) -> None:
    (example,) = [code for code in blocks(REPO / "README.md", "python") if "decompose(" in code]
    assert len(example.splitlines()) <= 20
    (tmp_path / "example.py").write_text(example)
    out = run_python(tmp_path, "example.py")
    assert re.search(r"torch\.Size\(\[\d+, \d+\]\)", out)
    assert [path.name for path in tmp_path.iterdir()] == ["example.py"], "a library writes nothing"
