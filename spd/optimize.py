"""The optimisation loop and its checkpoints, for one run or several side by side. Read this file first."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spd.component_model import ComponentModel
from spd.config import RunError, UserError
from spd.engine import checkpoint
from spd.engine.compilation import CompiledStep, tf32_matmuls
from spd.engine.distributed import agreed_maximum, average_, is_leader, own_share
from spd.engine.ensemble import Alone, Ensemble, StepInputs
from spd.engine.prepare import Prepared, check_side_by_side, eval_contexts, evaluate, prepare
from spd.engine.sequential import CompiledPasses
from spd.engine.silent_rows import Rows
from spd.engine.step import may_compile, passes_of
from spd.metrics import SiteUsage, site_usage
from spd.problem import Problem, Resumable
from spd.schedule import schedule_factor
from spd.spd_config import SPDConfig


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


class NonFiniteError(RunError):
    """A term became NaN or infinite."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run was asked to stop, by what is given as second argument, and has written its checkpoint."""


class Console:
    """An observer that shows a bar of progress, also in a notebook, and a line for every evaluation."""

    def started(self, step: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=step, unit="step", mininterval=0.5)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        l0 = sum(value for key, value in values.items() if key.startswith("l0/"))
        self.bar.set_postfix(loss=f"{values['loss/total']:.2e}", L0=f"{l0:.2f}", refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        shown = [f"{key.removeprefix('eval/')} {value:.4g}" for key, value in values.items()]
        self.bar.write(f"step {step}:  {'  '.join(shown)}")

    def ended(self) -> None:
        self.bar.close()


class _History:
    """An observer that keeps what it is told, and tells it another one."""

    def __init__(self, other: Observer) -> None:
        self.other = other
        self.rows: list[dict[str, float]] = []

    def started(self, step: int, steps: int) -> None:
        self.other.started(step, steps)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        self.other.stepped(step, values)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        self.other.evaluated(step, values)

    def ended(self) -> None:
        self.other.ended()


@dataclass(frozen=True, repr=False)
class Result:
    """What `decompose` returns; a notebook shows its summary."""

    model: ComponentModel
    history: list[dict[str, float]]
    """a flat row for every step that was logged or evaluated, for example for `pandas.DataFrame`"""
    usage: dict[str, SiteUsage]
    """of each site, on the held-out batches"""

    def summary(self) -> str:
        """The final losses, the subcomponents in use, and a warning where that is no decomposition."""
        rows = [("site", "C", "L0", "alive", "always on"), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([*self._sentences(), *table])

    def __repr__(self) -> str:
        return self.summary()

    def _repr_markdown_(self) -> str:
        """For notebooks."""
        rows = [("site", "C", "L0", "alive", "always on"), ("---", *["---:"] * 4), *self._cells()]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return "\n\n".join([*self._sentences(), table])

    def _sentences(self) -> list[str]:
        last = self.history[-1]
        losses = [
            f"{key.removeprefix('eval/loss/')} {value:.4g}"
            for key, value in last.items()
            if key.startswith("eval/loss/")
        ]
        warnings = [
            f"Warning: {path} is not decomposed: {site.problem}."
            for path, site in self.usage.items()
            if site.problem
        ]
        return [
            f"{last['step']:.0f} steps; losses on held-out data: {', '.join(losses)}.",
            *warnings,
        ]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (path, str(site.C), f"{site.l0:.2f}", str(site.alive), str(site.always_on))
            for path, site in self.usage.items()
        ]


def decompose(
    problem: Problem,
    config: SPDConfig,
    *,
    observer: Observer | None = None,
    quiet: bool = False,
) -> Result:
    """Decompose `problem.target`, in place.

    Progress and evaluations are told to `observer`, by default the console, or with `quiet` to nobody.
    """
    prepared = prepare(problem, config)
    history = _History(observer or (Silent() if quiet else Console()))
    try:
        model = run_steps(prepared, history)
    finally:
        history.ended()
    return Result(model, history.rows, site_usage(model, eval_contexts(prepared)))


@dataclass
class Member:
    """One run among those that are trained side by side."""

    prepared: Prepared
    observer: Observer
    checkpoints: Path | None = None
    failure: NonFiniteError | None = None
    """why it ended before the others"""


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


def run_side_by_side(
    members: Sequence[Member],
    *,
    resume: bool = False,
    stop_requested: Callable[[], bool | int] = lambda: False,
) -> None:
    """The loop, for one run or for several that differ in their seed alone and are at the same step.

    A checkpoint holds the state before its step; one extra lap evaluates and saves last. A member whose
    terms become non-finite is left behind with its `failure`, and the others go on. Of several processes
    (`spd.engine.distributed`) each works on its rows of every batch; the leader alone evaluates and writes.
    """
    check_side_by_side([member.prepared for member in members])
    config, batch = members[0].prepared.config, members[0].prepared.eval_batches[0]
    objectives = [member.prepared.objective for member in members]
    trained = Alone(objectives[0]) if len(objectives) == 1 else Ensemble(objectives)
    optimizer = torch.optim.AdamW(trained.parameters, lr=config.lr, weight_decay=0.0, fused=True)
    state = _restore(members, trained, optimizer) if resume else {}
    start = state.get("step", 0)
    together = passes_of(config.execution.passes, batch) == "together"
    may = may_compile(config.execution, batch, objectives[0].model)
    setting, n_steps = (
        state.get("compiled", config.execution.compile) if may else False,
        config.steps - start,
    )
    if together:
        step_fn = CompiledStep(
            trained.function,
            setting,
            n_steps,
            opaque=trained.opaque,
            n_members=trained.n_members,
            cuda_graphs=batch.is_cuda and config.execution.cuda_graphs,
        )
    else:
        step_fn = CompiledPasses(objectives[0], setting, n_steps)
    for member in members:
        member.observer.started(start, config.steps)

    for step in range(start, config.steps + 1):
        last, stopping = step == config.steps, agreed_maximum(int(stop_requested()))
        saving = stopping or (due(step, config.save_every, last) and step > start)
        if saving and is_leader():
            _save(members, trained, optimizer, step, step_fn.compiled)
        if stopping:
            raise Interrupted(f"stopped before step {step} of {config.steps}", stopping)
        _look(members, step, last)
        if last or not _going(members):
            break
        lr = config.lr * schedule_factor(config.lr_schedule, step, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs = trained.inputs([step_inputs(member.prepared, step) for member in members])
        batch, progress, noise, row_weights = inputs

        # ---- the training step
        with step_fn.explained(), tf32_matmuls(config.execution.tf32 and batch.is_cuda):
            if together:
                total, terms = step_fn(batch, progress, dict(noise), row_weights)
                total.backward()
            else:
                terms = step_fn(batch, progress, noise, row_weights)
        average_(p.grad for p in trained.parameters if p.grad is not None)
        if config.grad_clip is not None:
            trained.clip_gradients_(config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ----

        if due(step, config.log_every, step + 1 == config.steps):
            average_(terms.values())
            _log(members, terms, step, lr)


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every `every` steps, and at the last, happens at `step`."""
    return last or step % every == 0


def _going(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.failure is None]


def _look(members: Sequence[Member], step: int, last: bool) -> None:
    """Evaluate, where it is time for that; a member that is not finite ends here."""
    config = members[0].prepared.config
    evaluating = due(step, config.eval_every, last)
    for member in _going(members) if evaluating else ():
        parameters = member.prepared.objective.model.subcomponent_parameters()
        bad = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
        if bad:
            member.failure = NonFiniteError(f"step {step}: {', '.join(bad)} not finite")
            continue
        if is_leader():
            member.observer.evaluated(step, evaluate(member.prepared))


def _log(members: Sequence[Member], terms: Mapping[str, Tensor], step: int, lr: float) -> None:
    """Hand the terms of a step to the observers; a member with one that is not finite ends here."""
    table = torch.stack(list(terms.values())).reshape(len(terms), len(members))
    rows = table.T.tolist()  # the only host sync
    for member, row in zip(members, rows, strict=True):
        values = dict(zip(terms, row, strict=True))
        if member.failure is not None:
            continue
        try:
            check_finite(values, step)
            member.observer.stepped(step, {**values, "lr": lr})
        except NonFiniteError as error:
            member.failure = error


def check_finite(values: Mapping[str, float], step: int) -> None:
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"step {step}: {', '.join(bad)}; the run stops here")


def step_inputs(prepared: Prepared, step: int) -> StepInputs:
    """What one run computes a step from; of several processes, this one's rows of it."""
    problem, config, objective, *_ = prepared
    batch = _next_batch(problem.train_batches, step, config.steps)
    share = own_share()
    merged = prepared.silent_rows.merge(batch)
    batch, row_weights = merged if len(merged.batch) % share.of == 0 else Rows(batch)
    noise = objective.noise(batch, stream="train", seed=config.seed, step=step, share=share)
    # filled in on the device: a copy from the host would wait for it
    progress = torch.full((), step / config.steps, device=batch.device)
    own = share.rows(len(batch))
    return StepInputs(
        batch[own], progress, noise, None if row_weights is None else row_weights[own]
    )


def _next_batch(batches: Iterator[Tensor], step: int, steps: int) -> Tensor:
    try:
        return next(batches)
    except StopIteration:
        raise RunError(f"the training data ended before step {step} of {steps}") from None


def _save(
    members: Sequence[Member],
    trained: Alone | Ensemble,
    optimizer: torch.optim.Optimizer,
    step: int,
    compiled: bool | None,
) -> None:
    """A checkpoint of every run, as if it were alone."""
    own_states = trained.optimizer_states(optimizer.state_dict())
    for member, own_state in zip(members, own_states, strict=True):
        if member.checkpoints is None or member.failure is not None:
            continue
        batches = member.prepared.problem.train_batches
        state: dict[str, Any] = {
            "optimizer": own_state,
            "data": batches.state_dict() if isinstance(batches, Resumable) else None,
            "rng": torch.get_rng_state(),
            "num_threads": torch.get_num_threads(),
        }
        if compiled is not None:
            state["compiled"] = compiled
        parameters = dict(member.prepared.objective.model.subcomponent_parameters())
        keep = member.prepared.config.keep_checkpoints
        checkpoint.save(member.checkpoints, step, parameters=parameters, state=state, keep=keep)


def _restore(
    members: Sequence[Member], trained: Alone | Ensemble, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Bring everything back to the newest checkpoints; an empty state where there are none yet."""
    found = [checkpoint.latest(m.checkpoints) for m in members if m.checkpoints is not None]
    newest = [path for path in found if path is not None]
    if not newest:
        return {}
    states = [checkpoint.load_state(path) for path in newest]
    assert len(newest) == len(members) and len({state["step"] for state in states}) == 1, (
        f"runs that are not at the same step cannot go on together: {newest}"
    )
    for member, path, state in zip(members, newest, states, strict=True):
        batches = member.prepared.problem.train_batches
        if not isinstance(batches, Resumable):
            raise UserError("resume: the training batches have no state_dict and load_state_dict")
        with _fits(path):
            member.prepared.objective.model.load_subcomponents(checkpoint.load_parameters(path))
            batches.load_state_dict(state["data"])
            torch.set_rng_state(state["rng"])
            torch.set_num_threads(state["num_threads"])
    with _fits(newest[0]):
        optimizer.load_state_dict(trained.common_state([state["optimizer"] for state in states]))
    return states[0]


@contextmanager
def _fits(newest: Path) -> Iterator[None]:
    """Turn what a checkpoint of something else raises into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{newest}: the checkpoint does not fit this configuration: {error}"
        ) from None
