"""The records of finished runs, and what is made of them: docs/results.md and the table of the README."""

import json
from pathlib import Path
from typing import Any

import pytest

import spd.losses
from scripts import results
from scripts.rates import FOLDER
from scripts.results import BEGIN, END, main, pages, read_records, record_of
from spd.config import UserError, to_yaml
from spd.engine.fingerprint import objective_fingerprint
from spd.launch.job import Job
from spd.launch.study import JOBS, Study
from spd.runs.cli import checked_config
from tests.made_up_run import make_run

pytestmark = pytest.mark.undrawn


def finished_run(root: Path, *overrides: str, seed: int = 3, **meta: Any) -> Path:
    """A made-up run of a registered experiment, by code that computes what the present code does."""
    config = to_yaml(checked_config("tms_5-2", [f"seed={seed}", *overrides]))
    run = make_run(root / f"{seed}", **{"config.yaml": config})
    record = json.loads((run / "meta.json").read_text())
    record |= {"objective": dict(objective_fingerprint()), "device": "cpu", "num_threads": 2} | meta
    (run / "meta.json").write_text(json.dumps(record))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"seed": seed}))
    return run


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """An empty docs folder, and a README beside it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return tmp_path / "docs"


def record(docs: Path, *runs: Path) -> None:
    main(["--docs", str(docs), "record", *map(str, runs)])


def written(docs: Path) -> tuple[str, str]:
    """The page and the README that the records give."""
    made = pages(docs)
    return made[docs / "results.md"], made[docs.parent / "README.md"]


def test_a_record_says_what_ran(docs: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path, "lr=5e-4")
    record(docs, run)
    path = docs / "results" / "tms_5-2" / "3.json"
    kept = json.loads(path.read_text())
    assert kept == record_of(run)
    assert path.stat().st_size < 20_000
    assert kept["commit"] == "0123456789abcdef" and kept["versions"] == {"torch": "2.13.0"}
    assert kept["changed"] == {"lr": 5e-4} and kept["config"]["lr"] == 5e-4
    assert "host" not in kept and str(tmp_path) not in path.read_text()


def test_the_page_shows_every_seed(docs: Path, tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, seed=seed) for seed in (0, 1, 10, 2)]
    record(docs, *runs)
    page, readme = written(docs)
    assert [r["result"]["seed"] for r in read_records(docs / "results")["tms_5-2"]] == [0, 1, 2, 10]
    assert "|  | published | seed 0 | seed 1 | seed 2 | seed 10 |" in page
    assert "`spd-run tms_5-2 seed=SEED`" in page
    assert (
        "| `tms_5-2` | 0, 1, 2, 10 | 4 of 4 | 4 of 4 | MMCS linear1 1.000, ML2R linear1 0.993 |"
        in readme
    )
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "stale" not in readme and "current" in readme


def test_a_record_of_another_objective_is_stale(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(docs, finished_run(tmp_path))
    assert "| record |  | current |" in written(docs)[0]
    formula = spd.losses.faithfulness
    monkeypatch.setattr(spd.losses, "faithfulness", lambda sites: 1.001 * formula(sites))
    objective_fingerprint.cache_clear()
    try:
        page, readme = written(docs)
    finally:
        objective_fingerprint.cache_clear()
    assert "| record |  | stale |" in page
    assert "| 1 stale |" in readme


def test_a_run_that_kept_no_numbers_is_stale(docs: Path, tmp_path: Path) -> None:
    record(docs, finished_run(tmp_path, objective={}, dirty=True))
    page, _ = written(docs)
    assert "| record |  | stale |" in page and "| commit |  | 01234567+ |" in page


def test_what_masks_recover_stands_after_how_much_is_on(docs: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    empty = {"spread": None, "published": None, "published_spread": None}
    values = {"l0/a": 60.5, "l0/b": 70.5, "alive/a": 160.0, "recovered/rounded": 0.95}
    result["rows"] = [{"metric": key, "key": key, "value": v} | empty for key, v in values.items()]
    (run / "result.json").write_text(json.dumps(result))
    record(docs, run)
    assert "| L0 131, alive 160, recovered/rounded 0.950 |" in written(docs)[1]
    values |= {"ladder/ablated": 2.0, "ladder/adversarial_80_batch": 3.0, "ladder_C": 320.0}
    result["rows"] = [{"metric": key, "key": key, "value": v} | empty for key, v in values.items()]
    (run / "result.json").write_text(json.dumps(result))
    record(docs, run)
    cost = "adversary over ablation (80 steps, one source) 1.500"
    said = f"L0 131, of C 320, alive 160, {cost},"
    assert f"| {said} recovered/rounded 0.950 |" in written(docs)[1]


def test_a_record_leaves_out_what_is_empty(docs: Path, tmp_path: Path) -> None:
    """So that it stays small; the page is the same."""
    run = finished_run(tmp_path)
    kept = record_of(run)
    assert kept["result"]["quantities"] == {}
    assert all(None not in row.values() for row in kept["result"]["rows"])
    record(docs, run)
    page = written(docs)[0]
    assert "| MMCS linear1 | 1.000 ± 0.000 | 1.000 ± 0.000 |" in page
    assert "| alive linear1 | – | 5 |" in page


def test_what_cannot_be_recorded(docs: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path, status="interrupted")
    with pytest.raises(UserError, match="no finished run"):
        record_of(run)
    with pytest.raises(SystemExit) as stopped:
        record(docs, run)
    assert stopped.value.code == 2 and not (docs / "results").exists()
    numbers = dict.fromkeys(map(str, range(2000)), 0.5)
    large = record_of(finished_run(tmp_path, seed=4, objective=numbers))
    with pytest.raises(UserError, match="below 20000"):
        results.write_record(large, docs / "results")


def test_the_committed_pages_are_what_the_records_give() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python scripts/results.py page"


def test_committed_records_are_small_and_name_no_machine() -> None:
    for path in results.DOCS.glob("results/*/*.json"):
        if path.parent.name == FOLDER:
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < results.LARGEST_RECORD
        assert (path.parent.name, path.stem) == (
            record["result"]["experiment"],
            str(record["result"]["seed"]),
        )
        assert record["commit"] and record["objective"] and "/tmp" not in path.read_text()


def finished_study(root: Path, *runs: Path) -> Path:
    """One of `spd-evals` with a job for each run."""
    directory = root / "evals" / "many"
    jobs = [
        Job(run.name, directory / JOBS / run.name, ["true"], {}, 1, run_dir=run) for run in runs
    ]
    for job in jobs:
        job.save()
    argv = [
        "/env/bin/spd-evals",
        "lr=0.1",
        "--experiments",
        "tms_5-2",
        "--seeds",
        "3,4",
        "--cpu",
        "--local",
    ]
    made = {"argv": argv, "created": "now", "commit": "0123456789", "dirty": False, "slurm": {}}
    asked = {"experiments": ["tms_5-2"], "seeds": [3, 4], "overrides": []}
    Study(directory, {**made, **asked, "jobs": [job.name for job in jobs]}).save()
    return directory


def test_a_study_has_a_line_for_each_of_its_runs(docs: Path, tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, seed=seed) for seed in (3, 4)]
    study = finished_study(tmp_path, *runs)
    main(["--docs", str(docs), "rates", str(study)])
    record(docs, runs[0])
    page = written(docs)[0]
    command = "spd-evals lr=0.1 --experiments tms_5-2 --seeds 3,4"
    assert f"| `tms_5-2` | `{command}` | 2 of 2 (0.34–1.00) | 2 of 2 (0.34–1.00) |" in page
    assert f"`{command}`, commit 01234567" in page
    lines = [line for line in page.splitlines() if line.startswith(("| 3 |", "| 4 |"))]
    assert len(lines) == 2 and all("| yes | yes |" in line for line in lines)
    without = page.partition("## What can be said without a solution")[2]
    assert "tms_5-2, lr=0.1, target seed 0: 2 runs" in without and "agreement: " in without


def test_what_has_no_rates(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = finished_study(tmp_path, finished_run(tmp_path, status="interrupted"))
    for place, said in ((tmp_path, "no study of spd-evals"), (left, "the run is not finished")):
        with pytest.raises(SystemExit) as stopped:
            main(["--docs", str(docs), "rates", str(place)])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
