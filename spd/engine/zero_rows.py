"""Leaving out of a step the rows of a batch without any input: exact, and sparse data are full of them.

A *zero row* is all zeros, and the target then feeds zeros to every site. Whatever the masks, a site that
reads zeros writes its bias alone, as the original does: in every masked pass the row's output is the
target's, its reconstruction error and gradient are 0. And all zero rows have the same importances. So one
zero row stands for all of them, with their number as its weight.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd.component_model import ComponentModel
from spd.masks import RoutedInput
from spd.problem import Batch, Problem, of_ids

DOUBT = 4.0
"""standard deviations that the share of rows with input may lie above its estimate (one in 30,000 does)"""
REFUSED = 1e-7
"""bound on the part of the batches of such a share that have more rows with input than there is room for"""
MULTIPLE = 64
MIN_SAVING = 0.05
"""below this share of rows saved, batches stay as they are"""


class Rows(NamedTuple):
    """A batch of which some rows may stand for several."""

    batch: Batch
    weights: Float[Tensor, " rows"] | None = None
    """how many rows of the data each row stands for, scaled to mean 1; None: one each"""
    slots: Int[Tensor, " rows"] | None = None
    """which row of the data each row is, where it is one alone; None: all, in order"""


class ZeroRows:
    """Merges the zero rows of training batches, if that is allowed and worth it for a problem.

    The share of rows with input is estimated from held-out batches of the same distribution.
    """

    def __init__(self, model: ComponentModel, problem: Problem, held_out: Sequence[Batch]) -> None:
        self.share: float | None = None
        """of rows with input; None: batches stay as they are"""
        self.n_counted = sum(len(batch) for batch in held_out)
        """rows of which it is the share"""
        if problem.independent_rows and _zeros_stay_zeros(model, held_out[0]):
            rows = [_has_input(batch) for batch in held_out if isinstance(batch, Tensor)]
            self.share = torch.cat(rows).float().mean().item()

    def merge(self, batch: Batch) -> Rows:
        """The rows with input, then zero rows that share the weight of all zero rows."""
        if self.share is None or not isinstance(batch, Tensor):
            return Rows(batch)
        room = room_for(self.share, self.n_counted, len(batch))
        return Rows(batch) if room is None else merge_zero_rows(batch, room)


def room_for(share: float, n_counted: int, batch_size: int) -> int | None:
    """How many rows a batch without its zero rows is given; None where little is to be gained.

    `share` is that of the rows with input among `n_counted`. Their number in a batch is binomial; its true
    share is taken as large as the estimate allows (Wilson's bound), the number by Bernstein's inequality.
    """
    most = highest_share(share, n_counted)
    log_odds = math.log(1 / REFUSED)
    variance = batch_size * most * (1 - most)
    above = log_odds / 3 + math.sqrt(log_odds**2 / 9 + 2 * log_odds * variance)
    needed = batch_size * most + above + 1  # one for the zero rows
    room = MULTIPLE * math.ceil(needed / MULTIPLE)
    return room if room <= (1 - MIN_SAVING) * batch_size else None


def highest_share(share: float, n_counted: int) -> float:
    """Wilson's upper bound on a probability, `DOUBT` standard deviations above its estimate."""
    squared = DOUBT**2 / n_counted
    spread = DOUBT * math.sqrt(share * (1 - share) / n_counted + squared / (4 * n_counted))
    return min(1.0, (share + squared / 2 + spread) / (1 + squared))


def merge_zero_rows(batch: Float[Tensor, "rows n"], room: int) -> Rows:
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
    return Rows(batch[kept], weights, kept)


def _has_input(batch: Float[Tensor, "rows n"]) -> Bool[Tensor, " rows"]:
    return (batch != 0).any(dim=1)


def _zeros_stay_zeros(model: ComponentModel, batch: Batch) -> bool:
    """Whether the target feeds nothing but zeros to every site on a row of zeros."""
    if not isinstance(batch, Tensor) or batch.dim() != 2 or of_ids(batch):
        return False
    inputs = model.target_forward(torch.zeros_like(batch[:1])).site_inputs
    return not any(isinstance(x, RoutedInput) or x.any() for x in inputs.values())
