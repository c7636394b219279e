"""The optimisation loop and its checkpoints, for one run or several side by side. Read this file first."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.engine.distributed import agreed_maximum, average_, is_leader
from spd.engine.ensemble import train_together
from spd.engine.members import NonFiniteError, restore, save, shared, step_inputs, warm_up, whole
from spd.engine.prepare import Prepared, check_side_by_side, evaluate, progress_at
from spd.engine.step import execution_record, make_step
from spd.engine.target_check import blamed_on_data
from spd.engine.threads import as_before
from spd.engine.update import Update
from spd.losses import State
from spd.noise import own_generators


@runtime_checkable
class Observer(Protocol):
    """What the loop tells the outside. Values are plain floats, by the names that metrics.jsonl has."""

    def started(self, step: int, steps: int) -> None:
        """The loop is about to run from `step` to `steps`."""
        ...

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        """The terms of one step."""
        ...

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics on held-out data before `step`, each under `eval/`."""
        ...

    def ended(self) -> None:
        """No more will come: the loop is over, or was left."""
        ...


class Silent:
    """An observer that does nothing."""

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def ended(self) -> None:
        pass


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run was asked to stop, by what is given as second argument, and has written its checkpoint."""


@dataclass
class Member:
    """One run among those that are trained side by side."""

    prepared: Prepared
    observer: Observer
    checkpoints: Path | None = None
    failure: NonFiniteError | None = None
    """why it ended before the others"""
    stamp: Callable[[], Mapping[str, Any]] = dict
    """what the run says of itself at a checkpoint, which is kept with it"""


def run_steps(
    prepared: Prepared,
    observer: Observer,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
    stop_requested: Callable[[], bool | int] = lambda: False,
) -> ComponentModel:
    """The loop for one run."""
    member = Member(prepared, observer, checkpoints)
    run_side_by_side([member], resume=resume, stop_requested=stop_requested)
    if member.failure is not None:
        raise member.failure
    return prepared.objective.model


@as_before()
def run_side_by_side(
    members: Sequence[Member],
    *,
    resume: bool = False,
    stop_requested: Callable[[], bool | int] = lambda: False,
    until: int | None = None,
) -> None:
    """The loop, for one run or for several that differ in their seed alone and are at the same step.

    A checkpoint holds the state before its step; one extra lap evaluates and saves last. A member whose
    terms become non-finite is left behind with its `failure`, and the others go on. With `until` it ends
    before that step, with a checkpoint, as if to be resumed. Of several processes
    (`spd.engine.distributed`) each works on its rows of every batch; the leader alone evaluates and writes.
    """
    runs = [member.prepared for member in members]
    check_side_by_side(runs)
    config = runs[0].config
    trained = train_together([run.objective for run in runs])
    update = Update(trained, config)
    earlier = restore(members, update) if resume else []
    kept = earlier[0] if earlier else {}
    take_step = make_step(trained, config, runs[0].eval_batches[0], kept, until=until)
    states = [run.objective.initial_state() for run in runs]
    by_example = trained.objective.kept_by_example
    if earlier:
        states = [own["carried"] for own in earlier]
    elif config.faithfulness_warmup is not None:
        for run in runs:
            warm_up(run, config.faithfulness_warmup)
    start = earlier[0]["step"] if earlier else 0
    generators = own_generators("loop", config.seed)
    with generators, torch.enable_grad(), _observed(members, start, config.steps):
        if earlier:
            torch.set_rng_state(earlier[0]["rng"])
        for step in range(start, config.steps + 1):  # one extra lap evaluates and saves last
            last, stopping = step == config.steps, agreed_maximum(int(stop_requested()))
            ending = stopping or step == until
            saving = ending or (due(step, config.save_every, last) and step > start)
            evaluating = not (stopping or ending) and due(step, config.eval_every, last)
            everywhere = [whole(s, by_example) for s in states] if saving or evaluating else states
            if saving and is_leader():
                save(members, everywhere, update, step, execution_record(take_step))
            if stopping:
                raise Interrupted(f"stopped before step {step} of {config.steps}", stopping)
            if ending:
                break
            if evaluating:
                _evaluate(members, everywhere, step, last=last)
            if last or not _going(members):
                break
            given = zip(runs, states, strict=True)
            inputs = [step_inputs(run, step, state) for run, state in given]
            with blamed_on_data(runs[0].problem.target, [own.batch for own in inputs], step):
                terms, new_state = take_step(trained.inputs(inputs))  # gradients are set
            average_(p.grad for p in trained.parameters if p.grad is not None)
            logging = due(step, config.log_every, step + 1 == config.steps)
            norms = trained.gradient_norms() if logging else {}
            rates = update(step)
            states = trained.taken_apart(shared(new_state, by_example))
            if logging:
                average_(terms.values())
                _log(members, {**terms, **norms}, step, rates)


@contextmanager
def _observed(members: Sequence[Member], start: int, steps: int) -> Iterator[None]:
    """The observers know when it begins, and when it is over or was left."""
    for member in members:
        member.observer.started(start, steps)
    try:
        yield
    finally:
        for member in members:
            member.observer.ended()


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every `every` steps, and at the last, happens at `step`."""
    return last or step % every == 0


def _going(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.failure is None]


def _evaluate(members: Sequence[Member], states: Sequence[State], step: int, *, last: bool) -> None:
    """Tell the observers the metrics on held-out data; a member that is not finite ends here."""
    for member, state in zip(members, states, strict=True):
        if member.failure is not None:
            continue
        parameters = member.prepared.objective.model.subcomponent_parameters()
        bad = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
        if bad:
            member.failure = NonFiniteError(f"step {step}: {', '.join(bad)} not finite", step)
        elif is_leader():
            progress = progress_at(step, member.prepared.config.steps)
            values = evaluate(member.prepared, state, at_end=last, progress=progress)
            member.observer.evaluated(step, values)


def _log(
    members: Sequence[Member], terms: Mapping[str, Tensor], step: int, rates: Mapping[str, float]
) -> None:
    """Hand the terms of a step to the observers; a member with one that is not finite ends here."""
    table = torch.stack(list(terms.values())).reshape(len(terms), len(members))
    rows = table.T.tolist()  # the only host sync
    for member, row in zip(members, rows, strict=True):
        values = dict(zip(terms, row, strict=True))
        if member.failure is not None:
            continue
        try:
            check_finite(values, step)
            member.observer.stepped(step, {**values, **rates})
        except NonFiniteError as error:
            member.failure = error


def check_finite(values: Mapping[str, float], step: int) -> None:
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"step {step}: {', '.join(bad)}; the run stops here", step)
