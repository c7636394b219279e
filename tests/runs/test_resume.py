"""A run that was stopped anywhere and resumed gives the numbers of one that never was, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run_fixtures import (
    QUICK,
    TMS_SCRIPT,
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
STEPS = 6


class Undisturbed:
    """A run that nothing stopped, and what it did to files, in order."""

    def __init__(self, command: Command, *args: str) -> None:
        self.done: Finished = finished_run(command, *args)
        self.directory = command.only_run()


@pytest.fixture(scope="module", name="undisturbed")
def undisturbed_fixture(tmp_path_factory: pytest.TempPathFactory, tms_target: Path) -> Undisturbed:
    return Undisturbed(Command(tmp_path_factory.mktemp("undisturbed"), tms_target))


def assert_same_result(run: Path, other: Path) -> None:
    """Numbers, final parameters and the state that goes on from there are equal to the last bit."""
    last = [f"checkpoints/00000006/{name}" for name in ("model.safetensors", "training_state")]
    for name in ("metrics.jsonl", "config.yaml", *last):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    states = [
        torch.load(path / "checkpoints/00000006/training_state", weights_only=True)
        for path in (run, other)
    ]
    assert states[0]["data"] == states[1]["data"] == {"position": STEPS}
    moments = [state["optimizer"]["state"] for state in states]
    for index, mine in moments[0].items():
        assert all(torch.equal(value, moments[1][index][name]) for name, value in mine.items())
    assert json.loads((run / "meta.json").read_text())["status"] == "finished"
    rows = [json.loads((path / "result.json").read_text())["rows"] for path in (run, other)]
    assert rows[0] == rows[1]


def test_the_same_seed_gives_the_same_bytes(command: Command, undisturbed: Undisturbed):
    finished_run(command)
    assert_same_result(command.only_run(), undisturbed.directory)


def test_another_seed_gives_other_numbers(command: Command, undisturbed: Undisturbed):
    finished_run(command, "seed=1")
    other, one = log_lines(command.only_run()), log_lines(undisturbed.directory)
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_lines_and_checkpoints_are_where_they_should_be(undisturbed: Undisturbed):
    """Otherwise the places where the runs below are killed prove nothing."""
    lines = log_lines(undisturbed.directory)
    trained = [line["step"] for line in lines if "loss/total" in line]
    evaluated = [line["step"] for line in lines if "eval/loss/total" in line]
    assert trained == [0, 1, 2, 3, 4, 5] and evaluated == [0, 4, 6]
    assert len({line["loss/total"] for line in lines if "loss/total" in line}) == STEPS
    saved = sorted(path.name for path in (undisturbed.directory / "checkpoints").iterdir())
    assert saved == ["00000004", "00000006"]


PLACES = {
    "before the first line": "open *metrics.jsonl",
    "before the first checkpoint": "os.mkdir *checkpoints",
    "while the first is written": "open *.00000002.partial/training_state",
    "before the first is in place": "os.rename *.00000002.partial",
    "between checkpoints": "os.mkdir *.00000004.partial",
    "while a later one is written": "open *.00000004.partial/model.safetensors",
    "before an old one goes": "os.rename *checkpoints/00000002",
    "while an old one goes": "os.rmdir *.00000002.old.partial",
    "before the result": "os.rename *.result.json.partial",
    "before the report": "os.rename *.report.html.partial",
}


def kill_and_resume(command: Command, undisturbed: Undisturbed, event: str | int) -> None:
    assert command.tms(stop=Stop(KILL, event)).status == -KILL
    run = command.only_run()
    done = command.resume(run)
    if not (run / "meta.json").exists():  # it had not begun: nothing is lost, and it is said
        assert done.status == 2 and "no " in done.err
        return
    assert done.status == 0, done.err
    assert_same_result(run, undisturbed.directory)


@pytest.mark.parametrize("event", PLACES.values(), ids=PLACES)
def test_killed_and_resumed(command: Command, undisturbed: Undisturbed, event: str):
    kill_and_resume(command, undisturbed, event)


@pytest.mark.slow
def test_killed_before_each_single_event(
    tmp_path: Path, tms_target: Path, undisturbed: Undisturbed
):
    events = undisturbed.done.events
    (first,) = [i for i, event in enumerate(events) if event.startswith("open") and i < 9][:1]
    assert events[first].endswith("config.yaml")
    for number in range(first, len(events)):
        kill_and_resume(Command(tmp_path / str(number), tms_target), undisturbed, number)


def test_killed_again_and_again(command: Command, undisturbed: Undisturbed):
    assert command.tms(stop=Stop(KILL, "open *.00000002.partial")).status == -KILL
    run = command.only_run()
    for event in ("*.00000004.partial", "*metrics.jsonl", "*.00000006.partial", "*loss_curves"):
        assert command.resume(run, stop=Stop(KILL, event)).status == -KILL
    assert command.resume(run).status == 0
    assert_same_result(run, undisturbed.directory)


def test_a_line_cut_short_is_dropped(command: Command, undisturbed: Undisturbed):
    assert command.tms(stop=Stop(KILL, "*.00000006.partial")).status == -KILL
    run = command.only_run()
    for name in ("metrics.jsonl", "timings.jsonl"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:-9])
    assert command.resume(run).status == 0
    assert_same_result(run, undisturbed.directory)
    timings = (run / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in timings] == [0, 1, 2, 3, 4, 5]


def test_a_damaged_checkpoint_can_be_taken_away(command: Command, undisturbed: Undisturbed):
    """As its message says: the run goes on from the one before."""
    finished_run(command)
    run = command.only_run()
    (run / "checkpoints/00000006/training_state").write_bytes(b"")
    assert "without the folder 00000006" in command.resume(run).err
    shutil.rmtree(run / "checkpoints/00000006")
    assert command.resume(run).status == 0
    assert_same_result(run, undisturbed.directory)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_writes_a_checkpoint_first(
    command: Command, undisturbed: Undisturbed, signum: int, status: int
):
    done = command.tms(stop=Stop(signum, "open *.00000004.partial"))  # heard after step 4
    run = command.only_run()
    assert done.status == status and "Traceback" not in done.err
    assert done.err.endswith(f"stopped before step 5 of 6; continue with --resume {run}\n")
    assert "step 5 of 6; continue" in (run / "log.txt").read_text(encoding="utf-8")
    assert json.loads((run / "meta.json").read_text())["status"] == "interrupted"
    assert not (run / "result.json").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000004", "00000005"]
    assert command.resume(run).status == 0
    assert_same_result(run, undisturbed.directory)


def test_a_finished_run_stays_as_it_is(command: Command, undisturbed: Undisturbed):
    finished_run(command)
    run = command.only_run()
    done = command.resume(run)
    assert done.status == 0 and str(run / "report.html") in done.out
    assert_same_result(run, undisturbed.directory)


def test_the_configuration_may_be_named_again(command: Command):
    """Also from elsewhere: what counts is what it says."""
    args = [*QUICK, "target=../target.yaml"]
    (command.folder / "target.yaml").write_text(SMALL_TARGET, encoding="utf-8")
    script = TMS_SCRIPT.parent / "tms_5-2_config.yaml"
    done = command.run(TMS_SCRIPT, script, *args)
    assert done.status == 0 and "trained from ../target.yaml" in done.err, done.err
    run = command.only_run()
    os.remove(command.folder / "target.yaml")  # the run has its own
    assert command.resume(run, script, *args).status == 0


SMALL_TARGET = """
kind: tms
model: {n_features: 5, n_hidden: 5}
seed: 0
n_seeds: 4
steps: 300
batch_size: 64
lr: 2e-2
"""


def test_the_number_of_threads_is_kept(command: Command):
    """Another one changes the order of sums."""
    command.environment["OMP_NUM_THREADS"] = "1"
    finished_run(command)
    run = command.only_run()
    meta = json.loads((run / "meta.json").read_text())
    assert meta["num_threads"] == 1
    shutil.rmtree(run / "checkpoints")  # as if killed before the first one
    (run / "meta.json").write_text(json.dumps({**meta, "num_threads": 2}), encoding="utf-8")
    assert command.resume(run).status == 0
    state = torch.load(run / "checkpoints/00000006/training_state", weights_only=True)
    assert state["num_threads"] == 2
    (run / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(run / "checkpoints/00000006")
    del command.environment["OMP_NUM_THREADS"]  # now a light step would get one
    assert command.resume(run).status == 0  # from step 4, with what is stored there
    state = torch.load(run / "checkpoints/00000006/training_state", weights_only=True)
    assert state["num_threads"] == 2
    assert load_file(run / "checkpoints/00000006/model.safetensors")
