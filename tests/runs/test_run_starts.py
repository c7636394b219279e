"""`starts: n` from the command line: one run, chosen among several, whatever stops it."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd.config import UserError
from spd.engine.checkpoint import load_state
from spd.engine.prepare import evaluate
from spd.engine.starts import start_seed
from spd.launch.job import Job
from spd.launch.watch import progress_of
from spd.reports.results import read_result, read_starts
from spd.reports.starts import write_starts_page
from spd.runs.run import load_run
from tests.run_fixtures import (
    Command,
    Finished,
    Stop,
    command_fixture,
    finished_run,
    log_lines,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

KILL = signal.SIGKILL
WAYS = {"together": "auto", "one by one": "false"}
STARTS = (
    *("starts=4", "seed=1", "n_choice_batches=1", "halve_at=[0.34, 0.67]"),
    "metrics={pattern_errors: {}}",
)
"""of six steps, halved before the third and the fifth; of this seed, not the first start is chosen"""


def with_starts(command: Command, way: str, *args: str, **options) -> Finished:
    return command.tms(*STARTS, f"execution.starts_together={WAYS[way]}", *args, **options)


class Undisturbed:
    """A run that nothing stopped."""

    def __init__(self, command: Command, way: str) -> None:
        self.done = with_starts(command, way)
        assert self.done.status == 0, self.done.err
        self.directory = command.only_run()


@pytest.fixture(scope="module", name="undisturbed")
def undisturbed_fixture(
    tmp_path_factory: pytest.TempPathFactory, tms_target: Path
) -> dict[str, Undisturbed]:
    class Runs(dict[str, Undisturbed]):
        """Made when the first test asks for them."""

        def __missing__(self, way: str) -> Undisturbed:
            folder = tmp_path_factory.mktemp("undisturbed")
            return self.setdefault(way, Undisturbed(Command(folder, tms_target), way))

    return Runs()


def lines_of_starts(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.glob("starts/*/metrics.jsonl")
    }


def assert_same(run: Path, other: Path) -> None:
    """To the last bit: what was logged of each start, what became of it, and the run in the end."""
    assert lines_of_starts(run) == lines_of_starts(other)
    last = [f"checkpoints/00000006/{name}" for name in ("model.safetensors", "training_state")]
    for name in ("metrics.jsonl", "config.yaml", "starts.json", *last):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    results = [json.loads((path / "result.json").read_text()) for path in (run, other)]
    assert [{**result, "seconds": 0} for result in results][0] == {**results[1], "seconds": 0}
    assert json.loads((run / "meta.json").read_text())["status"] == "finished"
    assert not list(run.glob("starts/*/checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["together", "one by one"])
def test_the_same_seed_gives_the_same_bytes(
    command: Command, undisturbed: dict[str, Undisturbed], way: str
):
    assert with_starts(command, way).status == 0
    assert_same(command.only_run(), undisturbed[way].directory)


def test_what_a_run_with_starts_leaves(undisturbed: dict[str, Undisturbed]):
    run, done = undisturbed["together"].directory, undisturbed["together"].done
    record = read_starts(run)
    assert record is not None and record.together
    chosen = record.chosen
    assert chosen is not None and set(chosen.losses) == {2, 4}
    result = read_result(run / "result.json")
    assert result.starts == record.starts and result.seed == 1
    assert [start.seed for start in result.starts] == [start_seed(1, i) for i in range(4)]
    assert sorted(str(start.dropped) for start in result.starts) == ["2", "2", "4", "None"]
    own = [line["step"] for line in log_lines(run)]
    assert own == [0, 0, 1, 2, 3, 4, 4, 5, 6]
    for start in record.starts:
        lines = log_lines(run / "starts" / str(start.index))
        assert max(line["step"] for line in lines) == (start.dropped or 4) - 1
    assert (
        (run / "metrics.jsonl")
        .read_bytes()
        .startswith((run / "starts" / str(chosen.index) / "metrics.jsonl").read_bytes())
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000004", "00000006"]
    said = f"Start {chosen.index} of 0 to 3 (seed {chosen.seed}), chosen by its loss on data that"
    assert said in done.out and "step 2: of 4 starts, go on: " in done.err
    assert "start 0, first of 4: step 1/6" in done.err


@pytest.mark.slow
def test_one_computation_and_one_after_the_other_come_to_the_same(
    undisturbed: dict[str, Undisturbed],
):
    runs = [undisturbed[way].directory for way in WAYS]
    records = [read_starts(run) for run in runs]
    assert records[0] is not None and records[1] is not None
    assert [record.together for record in records if record] == [True, False]
    for start, other in zip(records[0].starts, records[1].starts, strict=True):
        assert (start.seed, start.dropped, start.reason) == (
            other.seed,
            other.dropped,
            other.reason,
        )
        assert start.losses == pytest.approx(other.losses, rel=1e-5)
    for values, own in zip(*(log_lines(run) for run in runs), strict=True):
        assert values == pytest.approx(own, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_the_first_start_is_the_run_without_starts(
    command: Command, undisturbed: dict[str, Undisturbed]
):
    finished_run(command, "seed=1", "metrics={pattern_errors: {}}")
    alone = log_lines(command.only_run())
    lines = log_lines(undisturbed["one by one"].directory / "starts" / "0")
    assert len(lines) >= 3 and lines == alone[: len(lines)]


def test_a_loaded_run_is_what_was_evaluated(undisturbed: dict[str, Undisturbed]):
    """Though the masks of the start that was chosen have another seed than the run."""
    run = load_run(undisturbed["together"].directory)
    record = read_starts(run.directory)
    assert record is not None and record.chosen is not None and record.chosen.index > 0
    values = evaluate(run.prepared)
    assert values == {key: run.metrics[-1][key] for key in values} and run.step == 6
    assert run.config.seed == 1 and run.prepared.config.seed == record.chosen.seed


# --- whatever stops it -----------------------------------------------------------------------------

PLACES = {
    "before the record": "os.rename */.starts.json.partial",
    "before the first lines": "open */starts/0/metrics.jsonl",
    "between the first checkpoints": "open */starts/2/checkpoints/.00000002.partial/*",
    "between later checkpoints": "os.rename */starts/2/checkpoints/.00000004.partial",
    "before what is dropped goes": "os.rmdir */starts/*/checkpoints*",
    "before the lines are the run's": "os.rename *-*/.metrics.jsonl.partial",
    "before the checkpoint is the run's": "os.rename *[0-9a-f]/checkpoints/.00000004.partial",
    "after the choice": "os.mkdir *[0-9a-f]/checkpoints/.00000006.partial",
    "before the result": "os.rename */.result.json.partial",
}
QUICK = "together, between later checkpoints"


@pytest.mark.parametrize(
    ("way", "event"),
    [
        pytest.param(
            way,
            event,
            id=f"{way}, {name}",
            marks=() if f"{way}, {name}" == QUICK else pytest.mark.slow,
        )
        for way in WAYS
        for name, event in PLACES.items()
    ],
)
def test_killed_and_resumed(
    command: Command, undisturbed: dict[str, Undisturbed], way: str, event: str
):
    killed = with_starts(command, way, stop=Stop(KILL, event))
    assert killed.status == -KILL, "the event did not come"
    run = command.only_run()
    done = command.resume(run)
    assert done.status == 0, done.err
    assert_same(run, undisturbed[way].directory)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_before_every_few_events(
    tmp_path: Path, tms_target: Path, undisturbed: dict[str, Undisturbed], way: str
):
    events = undisturbed[way].done.events
    first = next(i for i, event in enumerate(events) if "starts" in event)
    assert len(events) - first > 100
    for number in range(first, len(events), 9):
        command = Command(tmp_path / str(number), tms_target)
        assert with_starts(command, way, stop=Stop(KILL, number)).status == -KILL
        run = command.only_run()
        done = command.resume(run)
        assert done.status == 0, (events[number], done.err)
        assert_same(run, undisturbed[way].directory)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["together", pytest.param("one by one", marks=pytest.mark.slow)])
def test_a_signal_has_a_checkpoint_written_in_the_middle_of_a_stage(
    command: Command, undisturbed: dict[str, Undisturbed], way: str
):
    begin = "open */starts/0/checkpoints/.00000002.partial/model*"
    stop = Stop(signal.SIGTERM, begin)
    done = with_starts(command, way, "save_every=100", stop=stop)
    assert done.status == 143 and "Traceback" not in done.err
    run = command.only_run()
    assert done.err.endswith(f"of 6; continue with --resume {run}\n")
    assert json.loads((run / "meta.json").read_text())["status"] == "interrupted"
    with pytest.raises(UserError, match="no checkpoint yet, as none of its starts has been chosen"):
        load_run(run)
    done = command.resume(run)
    assert done.status == 0, done.err
    assert lines_of_starts(run) == lines_of_starts(undisturbed[way].directory)
    assert (run / "starts.json").read_bytes() == (
        undisturbed[way].directory / "starts.json"
    ).read_bytes()
    weights, own = (
        load_file(path / "checkpoints/00000006/model.safetensors")
        for path in (run, undisturbed[way].directory)
    )
    assert all(torch.equal(weights[name], value) for name, value in own.items())


def interrupted(command: Command) -> Path:
    """A run that was killed after the first choice."""
    event = "open */starts/*/checkpoints/.00000004.partial/model*"
    assert with_starts(command, "together", stop=Stop(KILL, event)).status == -KILL
    return command.only_run()


def test_files_of_a_start_that_were_changed_are_not_gone_on_from(command: Command):
    run = interrupted(command)
    left = sorted(run.glob("starts/*/checkpoints/00000002"))
    assert len(left) == 2
    with (left[1] / "training_state").open("ab") as file:
        file.write(b"x")
    lines = left[0].parent.parent / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes()[:20])
    done = command.resume(run)
    assert done.status == 2 and "Traceback" not in done.err
    assert f"{left[1] / 'training_state'}: is not what the run wrote there" in done.err
    assert f"{lines}: was cut short; it has 20 of the" in done.err


def test_a_record_that_is_none_is_refused(command: Command):
    run = interrupted(command)
    record = json.loads((run / "starts.json").read_text())
    record["starts"] = record["starts"][::-1]
    (run / "starts.json").write_text(json.dumps(record))
    done = command.resume(run)
    assert done.status == 2 and "starts.json: not the starts of a run: their indices" in done.err
    (run / "starts.json").write_text("[]")
    done = command.resume(run)
    assert done.status == 2 and "starts.json: not the starts of a run" in done.err


def test_progress_is_that_of_the_first_start_that_is_left(command: Command):
    run = interrupted(command)
    progress = progress_of(Job("a", run.parent, [], {}, 1.0, run))
    record = read_starts(run)
    assert record is not None and len(record.left) == 2
    last = log_lines(run / "starts" / str(record.left[0].index))[-1]
    assert progress.steps == 6 and progress.step == last["step"] + 1 > 2


# --- pages, and other settings ------------------------------------------------------------------------


def test_a_page_shows_the_starts_side_by_side_and_the_report_leads_to_it(
    undisturbed: dict[str, Undisturbed],
):
    run = undisturbed["together"].directory
    record = read_starts(run)
    assert record is not None and record.chosen is not None
    page = (run / "starts.html").read_text(encoding="utf-8")
    for start in record.starts:
        assert f"<th>{start.index}</th>" in page and f'<td class="number">{start.seed}</td>' in page
        for loss in start.losses.values():
            assert f'<td class="number">{loss:.4g}</td>' in page
    assert page.index('<tr class="chosen">') < page.index("dropped before step 2: place ")
    curves = json.loads(re.findall(r'id="curve-data">(.*?)</script>', page)[0])
    assert [panel["title"] for panel in curves] == [
        "held-out loss",
        "loss on the data of the choice",
    ]
    held_out = curves[0]["series"][record.chosen.index]
    assert curves[0]["steps"] == [0, 4, 6] and None not in held_out["values"]
    assert all(
        own["values"][1] is None for i, own in enumerate(curves[0]["series"]) if own != held_out
    )
    report = (run / "report.html").read_text(encoding="utf-8")
    assert '<a href="starts.html">All starts side by side</a>' in report
    assert f"Start {record.chosen.index} of 0 to 3" in report


def test_a_run_without_starts_has_none_of_this(command: Command):
    finished_run(command)
    run = command.only_run()
    assert not list(run.glob("starts*")) and write_starts_page(run) is None
    assert "starts" not in json.loads((run / "result.json").read_text())
    assert "starts.html" not in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_runs_of_several_seeds_choose_one_after_the_other(
    command: Command, undisturbed: dict[str, Undisturbed]
):
    base = command.out / "tms_5-2" / "x"
    done = with_starts(command, "together", "seeds=[1, 2]", "--run_dir", str(base))
    assert done.status == 0, done.err
    first, second = sorted(command.out.glob("tms_5-2/x-seed*"))
    other = undisturbed["together"].directory
    assert (first / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert (first / "starts.json").read_bytes() == (other / "starts.json").read_bytes()
    record = read_starts(second)
    assert record is not None and record.starts[0].seed == 2
    assert with_starts(command, "together", "seeds=[1, 2]", "--run_dir", str(base)).status == 0


def test_a_run_none_of_whose_starts_is_finite_fails(command: Command):
    done = with_starts(command, "together", "lr=1e30")
    assert done.status == 1 and "Traceback" not in done.err
    assert "error: no start is left: start 0: step 1: loss/" in done.err
    meta = json.loads((command.only_run() / "meta.json").read_text())
    assert meta["status"] == "failed" and meta["reason"].startswith("no start is left")


@pytest.mark.parametrize(
    ("override", "said"),
    {
        "starts=0": "starts: input should be greater than or equal to 1",
        "halve_at=[0.5, 0.2]": "halve_at: [0.5, 0.2]: fractions between 0 and 1, each above the one",
        "passes=one_by_one": "execution.starts_together: true, but runs side by side are one graph",
    }.items(),
)
def test_mistakes_are_said_before_anything_is_written(command: Command, override: str, said: str):
    done = command.tms(*STARTS, "execution.starts_together=true", override)
    assert done.status == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: ") and said in done.err.splitlines()[-1]
    assert not command.out.exists()


def test_the_state_that_goes_on_is_the_plain_position_of_the_data(
    undisturbed: dict[str, Undisturbed],
):
    run = undisturbed["together"].directory
    assert load_state(run / "checkpoints" / "00000004")["data"] == {"position": 4}
