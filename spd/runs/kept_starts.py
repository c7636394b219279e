"""The starts of a run that is a directory: what is kept of them, and how the chosen one becomes the run.

Below `starts/` each start has a folder with its lines and, as long as it may go on, its checkpoints. Those
of the chosen one are copied to the places where a run has them: from there on it is a run like any other.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from spd.engine import checkpoint
from spd.engine.starts import as_chosen
from spd.optimize import Member, Observer
from spd.reports.results import Starts, read_starts
from spd.reports.starts import write_starts_page
from spd.run_files import (
    CHECKPOINTS,
    METRICS_FILE,
    STARTS,
    STARTS_FILE,
    TIMINGS_FILE,
    atomic_write,
    read_meta,
    write_json,
)
from spd.runs.starts import Keeping, halve
from spd.runs.tracking import RunTracker


def choose_start(
    run: Path, member: Member, *, stop_requested: Callable[[], bool | int] = lambda: False
) -> None:
    """Make of the member the best of its starts, at the step where that goes on alone.

    What is recorded of an earlier process is gone on with; a run that has its start stays with it.
    """
    record = read_starts(run)
    if record is None or record.chosen is None:
        record = halve(
            member.prepared, _keeping(run, member), record, stop_requested=stop_requested
        )
    chosen = record.chosen
    assert chosen is not None, "a start has been chosen"
    if checkpoint.latest(run / CHECKPOINTS) is None:
        _adopt(run, run / STARTS / str(chosen.index))
    for start in record.starts:
        _remove_checkpoints(run / STARTS / str(start.index))
    member.prepared = as_chosen(member.prepared, chosen.seed)


def chosen_seed(run: Path) -> int | None:
    """The seed of the start that is the run; None as long as there is none, or no choice."""
    record = read_starts(run)
    return None if record is None or record.chosen is None else record.chosen.seed


def _keeping(run: Path, member: Member) -> Keeping:
    run_id = read_meta(run)["run_id"]

    def observer(index: int, label: str | None) -> Observer:
        folder = run / STARTS / str(index)
        folder.mkdir(parents=True, exist_ok=True)
        return RunTracker(folder, eval_every=member.prepared.config.eval_every, label=label)

    def stamp(observer: Observer) -> Mapping[str, Any]:
        assert isinstance(observer, RunTracker)
        return {"run": run_id, METRICS_FILE: observer.position()}

    def checkpoints(index: int) -> Path:
        return run / STARTS / str(index) / CHECKPOINTS

    return Keeping(checkpoints, observer, stamp, partial(_write, run))


def _write(run: Path, record: Starts) -> None:
    """Keep the record; the checkpoints of what has been dropped are not needed any more."""
    write_json(run / STARTS_FILE, record.model_dump(mode="json"))
    for start in record.starts:
        if start.dropped is not None:
            _remove_checkpoints(run / STARTS / str(start.index))
    write_starts_page(run)


def _adopt(run: Path, start: Path) -> None:
    """Copy what the start has done to where the run has it, the checkpoint last and whole."""
    for name in (METRICS_FILE, TIMINGS_FILE):
        atomic_write(run / name, (start / name).read_bytes())
    newest = checkpoint.latest(start / CHECKPOINTS)
    assert newest is not None, "the start that is chosen has a checkpoint"
    folder = run / CHECKPOINTS
    partial_copy = folder / f".{newest.name}{checkpoint.PARTIAL}"
    if partial_copy.exists():
        shutil.rmtree(partial_copy)
    shutil.copytree(newest, partial_copy, copy_function=shutil.copyfile)
    partial_copy.rename(folder / newest.name)


def _remove_checkpoints(start: Path) -> None:
    if (start / CHECKPOINTS).exists():
        shutil.rmtree(start / CHECKPOINTS)
