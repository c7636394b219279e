"""The pieces of text in which each subcomponent matters most, kept in one pass over any amount of text."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

OUTSIDE = -1
"""stands for a token where a context reaches over the border of its sequence"""


class Contexts(NamedTuple):
    """Up to k contexts of each subcomponent, the most important first."""

    scores: Float[Tensor, "C k"]
    """the importance at the middle token; -inf where there are fewer than k"""
    tokens: Int[Tensor, "C k window"]
    importances: Float[Tensor, "C k window"]
    """of the subcomponent at every token of the context, 0 outside the sequence"""


class TopContexts:
    """Keeps, for each of C subcomponents, the k contexts around its highest importances.

    A context is `left` tokens, the token itself, and `right` tokens, cut at the sequence's borders.
    Contexts do not overlap (see `peaks`) and no two of a subcomponent have the same tokens. Of one
    batch the 2k best peaks of a subcomponent compete. Memory: C · k · (left + 1 + right).
    """

    def __init__(self, C: int, *, k: int, left: int, right: int, threshold: float) -> None:
        self.k, self.left, self.right, self.threshold = k, left, right, threshold
        window = left + 1 + right
        self.kept = Contexts(
            torch.full((C, 0), -torch.inf),
            torch.full((C, 0, window), OUTSIDE),
            torch.zeros(C, 0, window),
        )

    def update(
        self,
        tokens: Int[Tensor, "batch position"],
        importance: Float[Tensor, "batch position C"],
    ) -> None:
        found = self._best_of(tokens, importance)
        device = importance.device
        scores, tokens, importances = (
            torch.cat([old.to(device), new], dim=1)
            for old, new in zip(self.kept, found, strict=True)
        )
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        rows = torch.arange(len(order), device=device)[:, None]
        tokens, importances = tokens[rows, order], importances[rows, order]
        scores = scores.masked_fill(_repeated(tokens), -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        order = order[:, : self.k]
        self.kept = Contexts(scores[:, : self.k], tokens[rows, order], importances[rows, order])

    def _best_of(
        self,
        tokens: Int[Tensor, "batch position"],
        importance: Float[Tensor, "batch position C"],
    ) -> Contexts:
        """The 2k highest peaks of each subcomponent in one batch."""
        n_positions, C = importance.shape[1:]
        is_peak = peaks(importance, self.left + self.right) & (importance > self.threshold)
        candidates = importance.masked_fill(~is_peak, -torch.inf).flatten(0, 1)
        scores, places = candidates.topk(min(2 * self.k, len(candidates)), dim=0)
        scores, places = scores.mT, places.mT
        offsets = torch.arange(-self.left, self.right + 1, device=importance.device)
        positions = (places % n_positions)[..., None] + offsets
        sequences = (places // n_positions)[..., None]
        inside = (positions >= 0) & (positions < n_positions)
        positions = positions.clamp(0, n_positions - 1)
        columns = torch.arange(C, device=importance.device)[:, None, None]
        return Contexts(
            scores,
            tokens[sequences, positions].masked_fill(~inside, OUTSIDE),
            importance[sequences, positions, columns].masked_fill(~inside, 0.0),
        )


def peaks(x: Float[Tensor, "batch position C"], distance: int) -> Bool[Tensor, "batch position C"]:
    """Where x is above everything up to `distance` positions before, and not below what follows.

    Two peaks are therefore always more than `distance` apart; of a plateau the first position is one.
    """
    if distance == 0:
        return torch.ones_like(x, dtype=torch.bool)
    n_positions = x.shape[1]
    padded = F.pad(x.mT, (distance, distance), value=-torch.inf)
    highest = F.max_pool1d(padded, distance, stride=1).mT
    before, after = highest[:, :n_positions], highest[:, -n_positions:]
    return (x > before) & (x >= after)


def _repeated(tokens: Int[Tensor, "C n window"]) -> Bool[Tensor, "C n"]:
    """Which contexts have the same tokens as an earlier one of their subcomponent.

    Compared by a random linear hash modulo 2⁶⁴, the window times faster than token by token.
    """
    generator = torch.Generator().manual_seed(0)
    top = 2**62
    factors = torch.randint(-top, top, tokens.shape[-1:], generator=generator).to(tokens.device)
    hashes = (tokens * factors).sum(dim=-1)
    return (hashes[:, :, None] == hashes[:, None]).tril(diagonal=-1).any(dim=-1)
