"""What `spd-evals` makes of the results of its runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spd.config import UserError
from spd.evals import run_evals
from spd.evals.run_evals import EvalsOptions, check_overrides, eval_jobs
from spd.evals.summary import Rate, write_summary
from spd.launch.job import Job, Status, load_job
from spd.registry import EXPERIMENTS, expected_minutes
from spd.sweeps import sweep
from tests.made_up_run import result

pytestmark = pytest.mark.undrawn

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
    errors = 0 if solved else 3
    return result(solved=solved, errors=errors, **{"ml2r/linear1": ml2r})


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
            "2 of 2 (0.34–1.00)",
            "2 of 2 (0.34–1.00)",
            "2 min",
            "as expected",
        ),
    ]
    assert re.split(r"\s{2,}", second)[1:] == ["ML2R linear1", "0.990 ± 0.014", "0.993 ± 0.002"]
    (row,) = json.loads((found.page.parent / "summary.json").read_text())
    assert row["as_expected"]
    assert (row["solved"]["k"], row["solved"]["n"]) == (row["pattern"]["k"], 2) == (2, 2)
    assert row["figures"][1]["sd"] == pytest.approx(0.02 / 2**0.5)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(14, 20, 0.481, 0.855), (0, 5, 0.0, 0.434), (2, 6, 0.097, 0.700)]
)
def test_a_rate_has_wilsons_interval(k: int, n: int, low: float, high: float):
    assert Rate(k, n).interval == pytest.approx((low, high), abs=1e-3)


def test_a_run_may_be_right_and_miss_the_pattern(tmp_path: Path):
    found = summary(tmp_path, {"tms_5-2": [result(solved=True, errors=1), good(solved=False)]})
    assert "1 of 2 (0.09–0.91)  0 of 2 (0.00–0.66)" in found.text
    (row,) = json.loads((found.page.parent / "summary.json").read_text())
    assert row["solved"]["k"] == 1 and row["pattern"]["k"] == 0
    assert row["solved"]["wilson_95"] == pytest.approx([0.0945, 0.9055], abs=1e-3)


def test_a_single_seed_has_no_spread(tmp_path: Path):
    found = summary(tmp_path, {"tms_5-2": [good(0.98)]})
    assert "ML2R linear1  0.980  " in found.text and "1 of 1" in found.text


MISSES = {
    "too few solved": (
        [good(solved=False), good(solved=False)],
        "solved from 0.5 to 1, found 0.000",
    ),
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


def test_a_figure_that_nobody_declared_is_in_the_table_and_on_the_page(tmp_path: Path):
    low, high = (result(solved=True, errors=0, **{"gini/here": value}) for value in (0.25, 0.75))
    found = summary(tmp_path, {"tms_5-2": [low, high]})
    assert re.search(r"gini here +0\.500 ± 0\.354 +–$", found.text, re.MULTILINE)
    html = found.page.read_text(encoding="utf-8")
    assert html.count("0.500 ± 0.354") == 2 and "eval/gini/here" in html


def test_figures_of_single_matrices_are_on_the_page_alone(tmp_path: Path):
    found = summary(tmp_path, {"tms_5-2": [good()]})
    assert "L0 linear1" not in found.text
    assert "<td>L0 linear1</td>" in found.page.read_text(encoding="utf-8")
    (row,) = json.loads((found.page.parent / "summary.json").read_text())
    assert "l0/linear1" in {figure["key"] for figure in row["figures"]}


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
    at = page.index("a &lt;reason&gt;")
    assert page.index('class="verdict') < at < page.index("<table>"), "seen first, however narrow"


def test_the_page_opens_from_disk_and_leads_to_the_reports(tmp_path: Path):
    page = summary(tmp_path, {"tms_5-2": [good(), good()]}).page
    html = page.read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#][^"]*)"', html)
    assert [link for link in links if link != "data:,"] == [
        *(f"../../tms_5-2/seed{seed}/report.html" for seed in (0, 1)),
        "tms_5-2-seeds.csv",
    ]
    assert all((page.parent / link).is_file() for link in links if link != "data:,")
    assert html.count("src=") == html.count('src="data:image/png;base64,') == 1
    assert "with changes that are not committed" in html


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


def test_every_seed_runs_on_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))
    options = EvalsOptions(experiments=("tms_5-2",), seeds=(0, 3), target_seeds=(1, 2), cpu=True)
    apart = eval_jobs(tmp_path / "evals" / "ID", [], options)
    assert [job.name for job in apart] == [
        f"tms_5-2-target{target}-seed{seed}" for target in (1, 2) for seed in (0, 3)
    ]
    assert "target_seed=2" in apart[3].command and "seed=3" in apart[3].command
    assert len({job.run_dir for job in apart}) == 4
    together = options.model_copy(update={"ensemble": "always"})
    jobs = eval_jobs(tmp_path / "evals" / "ID", [], together)
    assert [job.name for job in jobs] == ["tms_5-2-target1-seeds", "tms_5-2-target2-seeds"]
    assert jobs[1].run_dirs == [tmp_path / "tms_5-2" / f"ID-target2-seed{seed}" for seed in (0, 3)]


def test_targets_are_chosen_by_their_option_where_they_are_trained():
    options = EvalsOptions(experiments=("tms_5-2",), target_seeds=(1,))
    check_overrides(["steps=10"], options)
    with pytest.raises(UserError, match="target_seed=3.*say it with --target-seeds"):
        check_overrides(["target_seed=3"], options)
    other = options.model_copy(update={"experiments": ("pydoc_emb",)})
    with pytest.raises(UserError, match="--target-seeds: pydoc_emb trains no target"):
        check_overrides([], other)


def test_the_table_names_the_target_of_a_run(tmp_path: Path):
    jobs = []
    for target in (1, 2):
        run = tmp_path / "tms_5-2" / f"ID-target{target}-seed0"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(good()))
        jobs.append(Job(f"tms_5-2-target{target}-seed0", tmp_path, [], {}, 1, run))
    study = tmp_path / "evals" / "ID"
    study.mkdir(parents=True)
    record = {**RECORD, "experiments": ["tms_5-2"], "dirty": False, "created": "now"}
    found = write_summary(
        study,
        jobs,
        {job.name: Status("finished") for job in jobs},
        record | {"target_seeds": [1, 2]},
    )
    (row,) = json.loads((study / "summary.json").read_text())
    assert [(seed["name"], seed["target"]) for seed in row["seeds"]] == [
        *(("0 on target 1", 1), ("0 on target 2", 2)),
    ]
    lines = (study / "tms_5-2-seeds.csv").read_text().splitlines()
    dots = [line.split(",") for line in lines[1:] if "published" not in line]
    assert sorted({float(place) for _, _, place, *_ in dots}) == [0.0, 1.0]
    assert "<dt>target seeds</dt><dd>1, 2</dd>" in found.page.read_text()


def test_seeds_side_by_side_are_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))
    options = EvalsOptions(experiments=("tms_5-2",), seeds=(0, 3), cpu=True, ensemble="always")
    (job,) = eval_jobs(tmp_path / "evals" / "ID", ["steps=20000"], options)
    assert (job.name, job.seeds, job.minutes) == ("tms_5-2-seeds", (0, 3), 4)
    place = str(tmp_path / "tms_5-2" / "ID")
    assert job.command[-4:] == ["device=cpu", "seeds=[0, 3]", "--run_dir", place]
    assert job.run_dirs == [tmp_path / "tms_5-2" / f"ID-seed{seed}" for seed in (0, 3)]
    job.save()
    assert load_job(job.directory) == job


@pytest.mark.parametrize(
    ("ensemble", "gpu", "names"),
    [
        ("auto", "", ["tms_5-2-seed0", "tms_5-2-seed1", "pydoc_emb-seed0", "pydoc_emb-seed1"]),
        ("auto", "0", ["tms_5-2-seeds", "pydoc_emb-seed0", "pydoc_emb-seed1"]),
        ("never", "0", ["tms_5-2-seed0", "tms_5-2-seed1", "pydoc_emb-seed0", "pydoc_emb-seed1"]),
    ],
)
def test_auto_is_side_by_side_on_a_gpu_where_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ensemble: Any, gpu: str, names: list[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
    options = EvalsOptions(
        experiments=("tms_5-2", "pydoc_emb"), seeds=(0, 1), ensemble=ensemble, local=True
    )
    assert [job.name for job in eval_jobs(tmp_path / "ID", [], options)] == names
    single = options.model_copy(update={"seeds": (0,)})
    assert eval_jobs(tmp_path / "ID", [], single)[0].name == "tms_5-2-seed0"


def test_a_language_model_cannot_be_forced(tmp_path: Path):
    options = EvalsOptions(experiments=("pydoc_emb",), seeds=(0, 1), ensemble="always")
    with pytest.raises(UserError, match="--ensemble always: the seeds of pydoc_emb"):
        eval_jobs(tmp_path / "ID", [], options)


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_of_seeds_side_by_side_those_that_finished_count(tmp_path: Path, state: str):
    base = tmp_path / "tms_5-2" / "ID"
    job = Job("tms_5-2-seeds", tmp_path, [], {}, 1, base, (0, 3))
    for run, status in zip(job.run_dirs, ("finished", state), strict=True):
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("")
        meta = {"entry": {}, "seconds": 1.0, "status": status}
        (run / "meta.json").write_text(json.dumps(meta))
    (job.run_dirs[0] / "result.json").write_text(json.dumps(good()))
    study = tmp_path / "evals" / "ID"
    study.mkdir(parents=True)
    record = {**RECORD, "experiments": ["tms_5-2"], "dirty": False, "created": "now"}
    status = Status(state, "1 of 2 runs failed")  # pyright: ignore[reportArgumentType]
    found = write_summary(study, [job], {job.name: status}, record)
    assert not found.as_expected and re.search(f"1 of 1 .* 1 {state}$", found.text, re.MULTILINE)
    assert f"tms_5-2: seed 3 {state}: 1 of 2 runs failed" in found.text
    (row,) = json.loads((study / "summary.json").read_text())
    assert [(seed["name"], seed["state"]) for seed in row["seeds"]] == [
        *(("0", "finished"), ("3", state)),
    ]


def test_times_go_with_the_steps():
    assert expected_minutes("tms_5-2") == EXPERIMENTS["tms_5-2"].minutes
    tenth = pytest.approx(EXPERIMENTS["tms_5-2"].minutes / 10)
    assert expected_minutes("tms_5-2", ["steps=4000"]) == tenth
    assert expected_minutes("tms_40-10", gpu=True) == EXPERIMENTS["tms_40-10"].gpu_minutes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", ""], "'': no such ID"),
        (["--collect="], "'': no such ID"),
        (["--seeds", "99999999999"], "seeds: .*from 1 to 100,000 are allowed, got 99999999999"),
        ([f"seed={'9' * 5000}"], "say it with --seeds"),
    ],
)
def test_what_begins_no_study(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A name that is empty, as of a variable that is not set, is no wish for a new study."""
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    for command in (run_evals.main, sweep.main) if words == ["--resume", ""] else (run_evals.main,):
        with pytest.raises(SystemExit) as end:
            command(words)
        err = capsys.readouterr().err
        assert end.value.code == 2 and re.search(said, err) and len(err) < 500
    assert not (tmp_path / "out").exists()
