"""Leaving out of a step the rows of a batch without any input: exact, and sparse data are full of them.

A row is *silent* if it is all zeros and the target then feeds zeros to every site. Whatever the masks,
a site that reads zeros writes its bias alone, as the original does: in every masked pass the row's
output is the target's, its reconstruction error and gradient are 0. And all silent rows have the same
importances. So one silent row stands for all of them, with their number as its weight.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.masks import RoutedInput
from spd.problem import Batch, Problem

MARGIN = 8.0
"""standard deviations between the expected number of rows with input and the room for them"""
MULTIPLE = 64
MIN_SAVING = 0.05
"""below this share of rows saved, batches stay as they are"""


class Rows(NamedTuple):
    """A batch of which some rows may stand for several."""

    batch: Batch
    weights: Float[Tensor, " rows"] | None = None
    """how many rows of the data each row stands for, scaled to mean 1; None: one each"""


class SilentRows:
    """Merges the silent rows of training batches, if that is allowed and worth it for a problem.

    The share of rows with input is estimated from held-out batches of the same distribution.
    """

    def __init__(self, model: ComponentModel, problem: Problem, held_out: Sequence[Batch]) -> None:
        self.share: float | None = None
        """of rows with input; None: batches stay as they are"""
        if problem.independent_rows and _silence_is_silent(model, held_out[0]):
            rows = [_has_input(batch) for batch in held_out if isinstance(batch, Tensor)]
            self.share = torch.cat(rows).float().mean().item()

    def merge(self, batch: Batch) -> Rows:
        """The rows with input, then silent ones that share the weight of all silent ones."""
        if self.share is None or not isinstance(batch, Tensor):
            return Rows(batch)
        room = room_for(self.share, len(batch))
        return Rows(batch) if room is None else merge_silent_rows(batch, room)


def room_for(share: float, batch_size: int) -> int | None:
    """How many rows a batch without its silent rows is given; None where little is to be gained."""
    spread = math.sqrt(batch_size * share * (1 - share))
    needed = batch_size * share + MARGIN * spread + 1  # one for the silent rows
    room = MULTIPLE * math.ceil(needed / MULTIPLE)
    return room if room <= (1 - MIN_SAVING) * batch_size else None


def merge_silent_rows(batch: Float[Tensor, "rows n"], room: int) -> Rows:
    """`room` rows that stand for the whole batch.

    Shapes do not depend on the data, and nothing waits for a GPU. On the CPU a batch that needs more
    room is returned as it is; elsewhere it stops the run.
    """
    has_input = _has_input(batch)
    n_with_input = has_input.sum()
    if batch.device.type == "cpu":
        if n_with_input >= room:
            return Rows(batch)
    else:
        torch._assert_async(n_with_input < room, "more rows with input than there is room for")
    kept = has_input.to(torch.uint8).argsort(descending=True, stable=True)[:room]
    n_each = (len(batch) - n_with_input) / (room - n_with_input)
    weights = torch.where(has_input[kept], 1.0, n_each) * (room / len(batch))
    return Rows(batch[kept], weights)


def _has_input(batch: Float[Tensor, "rows n"]) -> Bool[Tensor, " rows"]:
    return (batch != 0).any(dim=1)


def _silence_is_silent(model: ComponentModel, batch: Batch) -> bool:
    """Whether the target feeds nothing but zeros to every site on a row of zeros."""
    if not isinstance(batch, Tensor) or batch.dim() != 2 or not batch.is_floating_point():
        return False
    inputs = model.target_forward(torch.zeros_like(batch[:1])).site_inputs
    return not any(isinstance(x, RoutedInput) or x.any() for x in inputs.values())
