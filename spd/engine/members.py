"""Runs that are trained together: what each computes a step from, and its checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from spd.config import RunError, UserError
from spd.engine import checkpoint
from spd.engine.distributed import average_, gathered, own_share
from spd.engine.ensemble import StepInputs
from spd.engine.prepare import Prepared, progress_at
from spd.engine.target_check import blamed_on_data
from spd.engine.update import Update
from spd.engine.zero_rows import Rows
from spd.losses import Faithfulness, State
from spd.problem import Batch, Resumable, as_batch
from spd.spd_config import WarmupConfig


class NonFiniteError(RunError):
    """A term became NaN or infinite at a step."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


@runtime_checkable
class Trainee(Protocol):
    """One of the runs."""

    prepared: Prepared
    checkpoints: Path | None
    failure: NonFiniteError | None
    stamp: Callable[[], Mapping[str, Any]]


def step_inputs(prepared: Prepared, step: int, state: State) -> StepInputs:
    """What one run computes a step from; of several processes, this one's rows of it."""
    problem, config, objective, *_ = prepared
    batch = _next_batch(problem.train_batches, step, config.steps)
    share = own_share()
    state = objective.begun(state, batch, seed=config.seed, share=share)
    by_example = bool(objective.kept_by_example)
    merged = prepared.zero_rows.merge(batch)
    # several processes have sources for the rows that are theirs of a whole batch
    fits = len(merged.batch) % share.of == 0 and not (by_example and share.of > 1)
    batch, row_weights, slots = merged if fits else Rows(batch)
    with blamed_on_data(problem.target, [batch], step):
        noise = objective.noise(batch, stream="train", seed=config.seed, step=step, share=share)
    # filled in on the device: a copy from the host would wait for it
    progress = torch.full((), progress_at(step, config.steps), device=batch.device)
    own = share.rows(len(batch))
    own_weights = None if row_weights is None else row_weights[own]
    return StepInputs(
        batch[own], progress, noise, own_weights, state, slots if by_example else None
    )


def _next_batch(batches: Iterator[Batch], step: int, steps: int) -> Batch:
    try:
        return as_batch(next(batches))
    except StopIteration:
        raise RunError(
            f"train_batches: the data ended before step {step} of {steps}; an iterator ends for good,"
            " a list or a DataLoader begins again"
        ) from None


def shared(state: State, by_example: Set[str] = frozenset()) -> State:
    """What terms carry on, where several processes have computed it from their rows: the mean.

    What is kept `by_example` stays with the process that has the examples.
    """
    average_(value for key, value in state.items() if key not in by_example)
    return state


def whole(state: State, by_example: Set[str]) -> State:
    """What all processes carry: all examples of what is kept `by_example`."""
    if own_share().of == 1 or not by_example:
        return state
    return {key: gathered(v) if key in by_example else v for key, v in state.items()}


def _own_part(state: State, by_example: Set[str]) -> State:
    """The inverse of `whole`."""
    share = own_share()
    if share.of == 1:
        return state
    return {
        key: v[share.rows(len(v))].clone() if key in by_example else v for key, v in state.items()
    }


def warm_up(prepared: Prepared, config: WarmupConfig) -> None:
    """Bring the sums of the subcomponents to the target's weights before the first step.

    The error is that of the run's own faithfulness term, of the first if there are several.
    """
    sites = prepared.objective.model.sites
    parameters = [p for site in sites.values() for p in site.subcomponents.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    terms = [s for s in prepared.config.losses.values() if isinstance(s, Faithfulness)]
    term = terms[0] if terms else Faithfulness(coeff=1.0)
    for _ in range(config.steps):
        term.error(sites).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save(
    members: Sequence[Trainee],
    states: Sequence[State],
    update: Update,
    step: int,
    record: dict[str, Any],
) -> None:
    """A checkpoint of every run that has not failed."""
    for member, state, optimizer in zip(members, states, update.states(), strict=True):
        if member.checkpoints is None or member.failure is not None:
            continue
        batches = member.prepared.problem.train_batches
        checkpoint.save(
            member.checkpoints,
            step,
            parameters=dict(member.prepared.objective.model.subcomponent_parameters()),
            state={
                "optimizer": optimizer,
                "data": batches.state_dict() if isinstance(batches, Resumable) else None,
                "carried": dict(state),
                "rng": torch.get_rng_state(),
                "num_threads": torch.get_num_threads(),
                **record,
            },
            keep=member.prepared.config.keep_checkpoints,
            stamp=member.stamp(),
        )


def restore(members: Sequence[Trainee], update: Update) -> list[dict[str, Any]]:
    """Bring everything back to the newest checkpoints, if there are any, and return their states."""
    found = [checkpoint.latest(m.checkpoints) for m in members if m.checkpoints is not None]
    newest = [path for path in found if path is not None]
    if not newest:
        return []
    states = [checkpoint.load_state(path) for path in newest]
    for path, state in zip(newest, states, strict=True):
        if state.get("optimizer") is None:
            raise UserError(
                f"{path}: holds no state of an optimizer, as the run was trained elsewhere and imported: it"
                " cannot be gone on with"
            )
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
            device = member.prepared.eval_batches[0].device
            carried = {key: value.to(device) for key, value in state["carried"].items()}
            state["carried"] = _own_part(carried, member.prepared.objective.kept_by_example)
            torch.set_rng_state(state["rng"])  # whether it is one
            torch.set_num_threads(state["num_threads"])
    with _fits(newest[0]):
        update.load_states([state["optimizer"] for state in states])
    return states


@contextmanager
def _fits(newest: Path) -> Iterator[None]:
    """Turn what a checkpoint of something else raises into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{newest}: the checkpoint does not fit this configuration: {error}"
        ) from None
