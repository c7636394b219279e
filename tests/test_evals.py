"""What `spd-evals` makes of the results of its runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spd.evals.run_evals import EvalsOptions, eval_jobs
from spd.evals.summary import write_summary
from spd.job import Job, Status
from spd.registry import EXPERIMENTS, default_experiments, expected_minutes
from tests.made_up_run import result

RECORD = {"argv": ["x", "--seeds", "2"], "overrides": ["lr=1"], "seeds": [0, 1], "commit": "abc"}


def summary(folder: Path, seeds: dict[str, list[Any]]):
    """Of a study whose runs ended so: a result, or a state and its reason."""
    jobs, statuses = [], {}
    for name, outcomes in seeds.items():
        for seed, outcome in enumerate(outcomes):
            run = folder / name / f"seed{seed}"
            job = Job(f"{name}-seed{seed}", folder, [], {}, 1, run)
            jobs.append(job)
            if isinstance(outcome, dict):
                run.mkdir(parents=True)
                (run / "result.json").write_text(json.dumps(outcome))
                (run / "report.html").write_text("")
                statuses[job.name] = Status("finished", seconds=120)
            else:
                statuses[job.name] = Status(outcome[0], outcome[1])
    record = {**RECORD, "experiments": list(seeds), "dirty": True, "created": "now"}
    study = folder / "evals" / "a-study"
    study.mkdir(parents=True)
    return write_summary(study, jobs, statuses, record)


def good(ml2r: float = 0.99, solved: bool = True) -> dict[str, Any]:
    made = result(solved=solved, errors=0 if solved else 3)
    for row in made["rows"]:
        row["value"] = ml2r if row["key"] == "ml2r/linear1" else row["value"]
    return made


def test_figures_are_means_over_seeds_beside_the_published_ones(tmp_path: Path):
    found = summary(tmp_path, {"tms_5-2": [good(0.98), good(1.00)]})
    assert found.as_expected and not found.unfinished
    first, second = found.text.splitlines()[1:3]
    assert re.split(r"\s{2,}", first) == [
        *(
            "tms_5-2",
            "MMCS linear1",
            "1.000 ± 0",
            "1.000 ± 0.000",
            "2 of 2",
            "2 min",
            "as expected",
        ),
    ]
    assert re.split(r"\s{2,}", second)[1:] == ["ML2R linear1", "0.990 ± 0.014", "0.993 ± 0.002"]
    (row,) = json.loads((found.page.parent / "summary.json").read_text())
    assert row["as_expected"] and row["n_solved"] == 2
    assert row["figures"][1]["sd"] == pytest.approx(0.02 / 2**0.5)


def test_a_single_seed_has_no_spread(tmp_path: Path):
    found = summary(tmp_path, {"tms_5-2": [good(0.98)]})
    assert "ML2R linear1  0.980  " in found.text and "1 of 1" in found.text


MISSES = {
    "too few solved": ([good(solved=False), good(solved=False)], "at least 1 of 2 solved, found 0"),
    "a figure out of its range": ([good(0.5)], "ML2R linear1 from 0.95 to 1.05, found 0.500"),
    "a figure that is no number": ([good(float("nan"))], "ML2R linear1 from .*, found nan"),
}


@pytest.mark.parametrize(("seeds", "said"), MISSES.values(), ids=MISSES)
def test_what_is_missed_is_named(tmp_path: Path, seeds: list[dict[str, Any]], said: str):
    found = summary(tmp_path, {"tms_5-2": seeds})
    assert not found.as_expected and re.search(f"tms_5-2: expected {said}", found.text)


def test_one_of_two_solved_is_most_of_them(tmp_path: Path):
    assert summary(tmp_path, {"tms_5-2": [good(), good(solved=False)]}).as_expected


def test_a_figure_that_a_run_lacks_is_missed(tmp_path: Path):
    lacking = good()
    lacking["rows"] = [row for row in lacking["rows"] if row["key"] != "ml2r/linear1"]
    assert not summary(tmp_path, {"tms_5-2": [good(), lacking]}).as_expected


def test_data_out_of_reach_is_skipped_and_no_failure(tmp_path: Path):
    reason = "the hub is away"
    found = summary(tmp_path, {"tms_5-2": [("skipped", reason)], "tms_5-2-id": [good()]})
    assert found.as_expected and f"tms_5-2: seed 0 skipped: {reason}" in found.text
    assert re.search(r"^tms_5-2 .* skipped$", found.text, re.MULTILINE)
    assert "As expected, 1 skipped" in found.page.read_text()


def test_nothing_but_skipped_experiments_is_no_success_on_the_page(tmp_path: Path):
    html = summary(tmp_path, {"tms_5-2": [("skipped", "no net")]}).page.read_text()
    assert "Nothing to compare: all skipped" in html and "As expected" not in html


@pytest.mark.parametrize(
    ("state", "unfinished"), [("failed", False), ("waiting", True), ("interrupted", True)]
)
def test_a_job_that_did_not_finish_is_not_as_expected(tmp_path: Path, state: str, unfinished: bool):
    found = summary(tmp_path, {"tms_5-2": [good(), (state, "a <reason>")]})
    assert not found.as_expected and found.unfinished is unfinished
    assert f"1 {state}" in found.text and "seed 1" in found.text and "1 of 1" in found.text
    page = found.page.read_text(encoding="utf-8")
    assert "a &lt;reason&gt;" in page


def test_the_page_opens_from_disk_and_leads_to_the_reports(tmp_path: Path):
    page = summary(tmp_path, {"tms_5-2": [good(), good()]}).page
    html = page.read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#][^"]*)"', html)
    assert [link for link in links if link != "data:,"] == [
        f"../../tms_5-2/seed{seed}/report.html" for seed in (0, 1)
    ]
    assert all((page.parent / link).is_file() for link in links if link != "data:,")
    assert "src=" not in html and "with changes that are not committed" in html


# --- the jobs ---------------------------------------------------------------------------------------


def test_a_job_per_experiment_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = EvalsOptions(experiments=("tms_5-2", "tms_40-10"), seeds=(0, 3), cpu=True)
    jobs = eval_jobs(tmp_path / "evals" / "ID", ["steps=20000"], options)
    assert [(job.name, job.slurm_name) for job in jobs] == [  # half the steps, half the minutes
        ("tms_5-2-seed0", "spd-eval-tms_5-2-2min"),
        ("tms_5-2-seed3", "spd-eval-tms_5-2-2min"),
        ("tms_40-10-seed0", "spd-eval-tms_40-10-26min"),
        ("tms_40-10-seed3", "spd-eval-tms_40-10-26min"),
    ]
    command = jobs[1].command
    assert command[-5:] == [
        *("steps=20000", "device=cpu", "seed=3", "--run_dir", str(tmp_path / "tms_5-2/ID-seed3")),
    ]
    assert command[4] == str(tmp_path / "evals/ID/code/spd" / EXPERIMENTS["tms_5-2"].config)
    assert jobs[1].env["PYTHONPATH"].startswith(str(tmp_path / "evals/ID/code"))


def test_times_go_with_the_steps():
    assert expected_minutes("tms_5-2") == EXPERIMENTS["tms_5-2"].minutes
    tenth = pytest.approx(EXPERIMENTS["tms_5-2"].minutes / 10)
    assert expected_minutes("tms_5-2", ["steps=4000"]) == tenth
    assert expected_minutes("tms_40-10", gpu=True) == EXPERIMENTS["tms_40-10"].gpu_minutes


def test_expectations_are_about_figures_that_are_published():
    for name in default_experiments():
        expects = EXPERIMENTS[name].expects
        assert expects.solved is None or 0 < expects.solved <= 1
        for key, (low, high) in expects.means.items():
            assert low < high and low <= EXPERIMENTS[name].published[key].value <= high
