"""How jobs are shown: from the files of their runs, as a table on a terminal and as lines elsewhere."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from spd.config import UserError
from spd.launch.job import STATUS_FILE, Job, Status, read_status
from spd.launch.watch import (
    Display,
    Progress,
    duration,
    job_table,
    progress_of,
)


def make_job(folder: Path, name: str = "tms_5-2-seed0") -> Job:
    job = Job(name, folder / "jobs" / name, [], {}, 1, folder / "runs" / name)
    job.save()
    return job


def make_run(job: Job, n_lines: int = 3) -> None:
    assert job.run_dir is not None
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "config.yaml").write_text("steps: 1000\n")
    metrics = [{"step": 100 * i, "loss/total": 0.5 / (i + 1)} for i in range(n_lines)]
    timings = [{"step": 100 * i, "steps_per_second": 8.0} for i in range(n_lines)]
    for file, lines in (("metrics.jsonl", metrics), ("timings.jsonl", timings)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (job.run_dir / file).write_text(text + '{"step": 999, "loss/to')  # it is being written


def test_progress_is_read_from_what_the_run_writes(tmp_path: Path):
    job = make_job(tmp_path)
    assert progress_of(job) == Progress()
    make_run(job)
    found = progress_of(job)
    assert (found.step, found.steps) == (201, 1000)
    assert found.loss == pytest.approx(0.5 / 3) and found.seconds_left == pytest.approx(799 / 8)


@pytest.mark.parametrize("line", ["3", "[1]", '{"loss/total": 1}', '{"step": "x"}', "[" * 50_000])
def test_lines_that_are_damaged_are_passed_over(tmp_path: Path, line: str):
    job = make_job(tmp_path)
    make_run(job)
    whole = progress_of(job)
    assert job.run_dir is not None
    for name in ("metrics.jsonl", "timings.jsonl"):
        path = job.run_dir / name
        text = path.read_text(encoding="utf-8").rpartition("\n")[0]
        path.write_text(f"{text}\n{line}\n", encoding="utf-8")
    assert progress_of(job) == whole


def test_a_status_that_is_none_is_one_message(tmp_path: Path):
    job = make_job(tmp_path)
    (job.directory / STATUS_FILE).write_text('{"state": "finished", "odd": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="odd: is none of state, reason"):
        read_status(job.directory)


def test_an_agent_shows_the_run_that_it_is_at(tmp_path: Path):
    job = make_job(tmp_path)
    make_run(job)
    agent = Job("agent0", tmp_path / "jobs" / "agent0", [], {}, 1)
    agent.save()
    now = {"label": "trial3: seed=3", "run_dir": str(job.run_dir)}
    (agent.directory / "now.json").write_text(json.dumps(now))
    assert progress_of(agent) == progress_of(job)._replace(label="trial3: seed=3")


def test_a_table_has_a_line_per_job(tmp_path: Path):
    jobs = [make_job(tmp_path, name) for name in ("one", "two", "three")]
    make_run(jobs[0])
    statuses = {
        "one": Status("running", attempts=1),
        "two": Status("failed", "loss [x] = nan\nmore"),
        "three": Status(),
    }
    console = Console(file=StringIO(), width=120)
    console.print(job_table(jobs, statuses, "a study"))
    assert isinstance(console.file, StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[2] == ["one", "running", "201/1,000", "1.667e-01", "2", "min"]
    assert lines[3] == ["two", "failed:", "loss", "[x]", "=", "nan"]
    assert lines[4] == ["three", "waiting"]


def test_lines_tell_changes_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = make_job(tmp_path)
    make_run(job)
    with Display([job], "a study") as display:
        for status in (Status(), Status("running"), Status("running"), Status("finished")):
            display.show({job.name: status})
    assert capsys.readouterr().err.splitlines() == [
        "tms_5-2-seed0: running  step 201/1,000  loss 1.667e-01  2 min left",
        "tms_5-2-seed0: finished  step 201/1,000  loss 1.667e-01",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4, "4 s"), (89, "89 s"), (700, "12 min"), (3900, "1 h 05 min")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text
