"""Successive halving: all starts are trained to a fraction of the run, the worse half goes, and so on.

Whatever a start needs to go on lies in its checkpoints; what became of each is recorded after every stage.
So a stage always begins from checkpoints, whether this process has ended the one before or is a new one.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spd.engine import checkpoint
from spd.engine.members import NonFiniteError
from spd.engine.prepare import Prepared
from spd.engine.starts import (
    Handed,
    Replayed,
    choice_loss,
    goes_together,
    halving_steps,
    n_kept,
    start_of,
    start_seed,
)
from spd.optimize import Interrupted, Member, Observer, run_side_by_side
from spd.reports.results import Start, Starts

logger = logging.getLogger(__name__)

ONE_FAILED = -1
"""why the others stop, in place of a signal: they go on without it"""


class Keeping(NamedTuple):
    """Where and how the starts of a run are kept."""

    checkpoints: Callable[[int], Path]
    """of the start with this index"""
    observer: Callable[[int, str | None], Observer]
    """of the start with this index; the label of the progress that it shows, or None"""
    stamp: Callable[[Observer], Mapping[str, Any]]
    """what a checkpoint of the start with this observer says of itself"""
    written: Callable[[Starts], None]
    """keeps what became of the starts so far"""


def halve(
    prepared: Prepared,
    keeping: Keeping,
    record: Starts | None = None,
    *,
    stop_requested: Callable[[], bool | int] = lambda: False,
) -> Starts:
    """Train the starts until one is chosen, whose newest checkpoint is where the run goes on.

    `record` is that of a run that goes on. `NonFiniteError` if no start is left.
    """
    config = prepared.config
    training = _Training(prepared, keeping, stop_requested)
    record = record or _begun(prepared)
    for step in halving_steps(config):
        keeping.written(record)
        while len(record.left) > 1 and training.is_behind(record, step):
            record = training.up_to(step, record)
            keeping.written(record)
        if len(record.left) > 1 and not any(step in start.losses for start in record.left):
            losses = training.losses(record, step)
            record = judged(record, losses, step, keep=n_kept(len(losses), step, config))
        if len(record.left) <= 1:
            break
    if not record.left:
        keeping.written(record)
        reasons = "; ".join(f"start {start.index}: {start.reason}" for start in record.starts)
        raise NonFiniteError(f"no start is left: {reasons}")
    training.keep_batches(False)
    (best,) = record.left
    record = record.changed({best.index: {"chosen": True}})
    keeping.written(record)
    logger.info("start %d of %d is the run", best.index, config.starts)
    return record


def judged(record: Starts, losses: Mapping[int, float], step: int, *, keep: int) -> Starts:
    """The record after a comparison before `step`: the `keep` lowest of the finite losses stay."""
    finite = {index: loss for index, loss in losses.items() if math.isfinite(loss)}
    in_order = sorted(finite, key=lambda index: (finite[index], index))
    changes: dict[int, dict[str, Any]] = {}
    for start in record.left:
        own = losses[start.index]
        if start.index not in finite:
            reason = f"its loss on the data of the choice is {own}"
            changes[start.index] = {"dropped": step, "reason": reason}
            continue
        changes[start.index] = {"losses": {**start.losses, step: own}}
        place = in_order.index(start.index) + 1
        if place > keep:
            reason = f"place {place} of {len(losses)} by its loss on the data of the choice"
            changes[start.index] |= {"dropped": step, "reason": reason}
    changed = record.changed(changes)
    left = ", ".join(str(start.index) for start in changed.left)
    logger.info("step %d: of %d starts, go on: %s", step, len(losses), left or "none")
    return changed


def _begun(prepared: Prepared) -> Starts:
    seed, n = prepared.config.seed, prepared.config.starts
    starts = [Start(index=index, seed=start_seed(seed, index)) for index in range(n)]
    return Starts(together=goes_together(prepared), starts=tuple(starts))


class _Training:
    """The starts of one process: what they train on, and how they are trained to a step."""

    def __init__(
        self, prepared: Prepared, keeping: Keeping, stop_requested: Callable[[], bool | int]
    ) -> None:
        self.prepared, self.keeping, self.stop_requested = prepared, keeping, stop_requested
        self.batches = prepared.problem.train_batches
        self.begin = self.batches.state_dict()

    def keep_batches(self, again: bool) -> None:
        """Whether batches without a position of their own are to be gone through again from here on."""
        if isinstance(self.batches, Replayed):
            self.batches.again = again

    def is_behind(self, record: Starts, step: int) -> bool:
        return any(self._step(start.index) < step for start in record.left)

    def up_to(self, step: int, record: Starts) -> Starts:
        """Train what is left until it is before `step`, or until a start fails: it is dropped then.

        Starts that do not fit into memory together go on one after the other, for good.
        """
        indices = [start.index for start in record.left]
        train = self._together if record.together else self._one_by_one
        try:
            failures = train(indices, step)
        except torch.OutOfMemoryError:
            if not record.together:
                raise
            logger.info("%d starts do not fit into memory: one after the other", len(indices))
            return record.model_copy(update={"together": False})
        changes = {
            index: {"dropped": failure.step, "reason": str(failure)}
            for index, failure in failures.items()
        }
        return record.changed(changes)

    def losses(self, record: Starts, step: int) -> dict[int, float]:
        """Of each start that is left, on the data of the choice."""
        found = {}
        device = self.prepared.choice_batches[0].device
        for start in record.left:
            newest = self._newest(start.index)
            assert newest is not None, "every start has come to this step"
            parameters, state = checkpoint.load_parameters(newest), checkpoint.load_state(newest)
            carried = {key: value.to(device) for key, value in state["carried"].items()}
            found[start.index] = choice_loss(self.prepared, parameters, step, carried)
        if isinstance(self.batches, Replayed):
            self.batches.forget()  # nobody goes back from here
        return found

    def _together(self, indices: Sequence[int], until: int) -> dict[int, NonFiniteError]:
        folders = [self.keeping.checkpoints(index) for index in indices]
        common = set.intersection(*(set(checkpoint.steps(folder)) for folder in folders))
        for folder in folders:  # the rest of a process that was killed between two of them
            checkpoint.remove_after(folder, max(common, default=-1))
        # on a GPU memory may turn out to be too small, and starts then go on one after the other
        self.keep_batches(self.prepared.choice_batches[0].is_cuda)
        handed = Handed(self.batches, len(indices))
        if not common:
            handed.load_state_dict(self.begin)
        first = f"start {indices[0]}, first of {len(indices)}"
        members = [
            self._member(index, handed, first if index == indices[0] else None) for index in indices
        ]

        def stopping() -> bool | int:
            failed = any(member.failure is not None for member in members)
            return self.stop_requested() or (ONE_FAILED if failed else False)

        try:
            run_side_by_side(members, resume=True, stop_requested=stopping, until=until)
        except Interrupted as stop:
            if stop.args[1] != ONE_FAILED:
                raise
        return _failures(zip(indices, members, strict=True))

    def _one_by_one(self, indices: Sequence[int], until: int) -> dict[int, NonFiniteError]:
        gc.collect()  # what did not fit into memory together
        self.keep_batches(True)
        failures: dict[int, NonFiniteError] = {}
        for index in indices:
            if self._step(index) >= until:
                continue
            if self._newest(index) is None:
                self.batches.load_state_dict(self.begin)
            member = self._member(index, self.batches, f"start {index}")
            run_side_by_side([member], resume=True, stop_requested=self.stop_requested, until=until)
            failures |= _failures([(index, member)])
        return failures

    def _member(self, index: int, batches: Any, label: str | None) -> Member:
        observer = self.keeping.observer(index, label)
        return Member(
            *(start_of(self.prepared, index, batches), observer, self.keeping.checkpoints(index)),
            stamp=lambda: self.keeping.stamp(observer),
        )

    def _newest(self, index: int) -> Path | None:
        return checkpoint.latest(self.keeping.checkpoints(index))

    def _step(self, index: int) -> int:
        newest = self._newest(index)
        return 0 if newest is None else int(newest.name)


def _failures(members: Iterable[tuple[int, Member]]) -> dict[int, NonFiniteError]:
    return {index: m.failure for index, m in members if m.failure is not None}
