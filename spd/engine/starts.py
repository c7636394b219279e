"""Several starts of one decomposition: what each is made from, and the loss by which they are compared.

A start has V, U, importance functions and masks of its own; target, data and schedules are the run's. The
loss of the choice is that of training, on batches that are neither trained on nor in the verdict: it knows
no solution. Knows no file and no loop.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from spd.config import UserError
from spd.engine.distributed import own_share
from spd.engine.experts import experts_in
from spd.engine.prepare import Prepared, apart_because, contexts, prepare, progress_at
from spd.losses import State
from spd.metrics import HeldOutLosses
from spd.noise import derive_seed
from spd.problem import Batch, Resumable, as_batch
from spd.spd_config import SPDConfig


def start_seed(seed: int, index: int) -> int:
    """The seed of one start of a run: that of the run itself for the first."""
    return seed if index == 0 else derive_seed("start", seed, index) % 2**31


def halving_steps(config: SPDConfig) -> list[int]:
    """The steps before which starts are dropped: at the fractions, and at the end."""
    early = {round(fraction * config.steps) for fraction in config.halve_at}
    return [*sorted(early - {0, config.steps}), config.steps]


def n_kept(n: int, step: int, config: SPDConfig) -> int:
    """How many of n starts go on from `step`: the better half, at the end the best."""
    return 1 if step == config.steps else math.ceil(n / 2)


def with_choice(prepared: Prepared) -> Prepared:
    """The same with the batches of the choice, and training batches that can be gone through again.

    `UserError` where starts are not possible.
    """
    config, problem = prepared.config, prepared.problem
    n, n_processes = config.n_choice_batches, own_share().of
    if n_processes > 1:
        raise UserError(
            f"starts: {config.starts}, but a run of {n_processes} processes (torchrun) is begun once; 1 is"
            " allowed"
        )
    goes_together(prepared)
    batches = [*map(as_batch, islice(problem.choice_batches, n))]
    own = len(batches) > 0
    if not own:
        batches = [*map(as_batch, islice(problem.eval_batches, n))]
    if len(batches) < n:
        place = "choice_batches" if own else "the held-out data after those of the verdict"
        raise UserError(
            f"n_choice_batches: {n} are wanted to compare the starts, but {place} ended after"
            f" {len(batches)}"
        )
    problem = replace(problem, train_batches=resumable(problem.train_batches))
    return prepared._replace(problem=problem, choice_batches=batches)


def goes_together(prepared: Prepared) -> bool:
    """Whether the starts are trained as one computation; `UserError` if they are to and cannot."""
    setting, obstacle = prepared.config.execution.starts_together, apart_because(prepared)
    if setting is True and obstacle is not None:
        raise UserError(
            f"execution.starts_together: true, but {obstacle}; false trains one start after the other"
        )
    return setting is not False and obstacle is None


def start_of(prepared: Prepared, index: int, train_batches: Iterator[Batch]) -> Prepared:
    """A start, ready to run: a copy of the target that shares its weights, with sites of its own."""
    config, problem = prepared.config, prepared.problem
    own = config.model_copy(
        update={
            "seed": start_seed(config.seed, index),
            "keep_checkpoints": max(2, config.keep_checkpoints),
        }
    )
    target = _copy_with_same_weights(problem.target)
    held_out = {"eval_batches": prepared.eval_batches, "train_batches": train_batches}
    return prepare(replace(problem, target=target, **held_out), own, quiet=True)


def as_chosen(prepared: Prepared, seed: int) -> Prepared:
    """The prepared run as that of the start with this seed, for the noise of its masks."""
    return prepared._replace(config=prepared.config.model_copy(update={"seed": seed}))


@torch.no_grad()
def choice_loss(
    prepared: Prepared, parameters: Mapping[str, Tensor], step: int, state: State
) -> float:
    """Σ coefficient × term of a start before `step`, a mean over the batches of the choice.

    Puts the parameters of the start into the prepared model. All starts are given the same noise.
    """
    prepared.objective.model.load_subcomponents(parameters)
    progress = progress_at(step, prepared.config.steps)
    losses = HeldOutLosses(prepared.objective.losses)
    batches = prepared.choice_batches
    for ctx in contexts(prepared, batches, "choice", progress=progress, state=state):
        losses.update(ctx)
    return losses.compute()["loss/total"]


def _copy_with_same_weights(target: nn.Module) -> nn.Module:
    apart = [experts.original for _, experts in experts_in(target)]
    shared = [
        tensor
        for module in (target, *apart)
        for tensor in (*module.parameters(), *module.buffers())
    ]
    try:
        return copy.deepcopy(target, {id(tensor): tensor for tensor in shared})
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"starts: each decomposes a copy of the target, and {type(target).__name__} cannot be copied"
            f" (copy.deepcopy): {type(error).__name__}: {error}"
        ) from error


# --- the data of training ---------------------------------------------------------------------------


class Handed:
    """Each batch as often as there are starts that take a step side by side; positions are the source's."""

    def __init__(self, source: "Resumable | Replayed", times: int) -> None:
        self.source, self.times = source, times
        self.batch: Any = None
        self.left = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self.left == 0:
            assert isinstance(self.source, Iterator), "batches are an iterator"
            self.batch, self.left = next(self.source), self.times
        self.left -= 1
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = 0
        self.source.load_state_dict(state)


class Replayed:
    """Batches without a position of their own: some are kept, to be gone through again."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.first, self.position = 0, 0
        self.kept: list[Any] = []
        self.again = True
        """whether they are to be gone through again"""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self.position == self.first + len(self.kept):
            self.kept.append(next(self.source))
        batch = self.kept[self.position - self.first]
        self.position += 1
        if not self.again:
            self.forget()
        return batch

    def forget(self) -> None:
        """Keep nothing that lies before the position."""
        del self.kept[: self.position - self.first]
        self.first = self.position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position = state.get("position", -1)
        if not self.first <= position <= self.first + len(self.kept):
            raise UserError("resume: the training batches have no state_dict and load_state_dict")
        self.position = position


def resumable(batches: Iterator[Any]) -> "Resumable | Replayed":
    """The batches themselves, if they know their position, or in a form that does."""
    return batches if isinstance(batches, Resumable) else Replayed(batches)
