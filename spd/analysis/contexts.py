"""The places in which each subcomponent matters, kept in one pass over any amount of data.

Of text a context is a piece of it, of toys the input of one row. Kept are those of highest importance, and
a uniform sample of all in which a subcomponent is on, from which come its quantiles.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd.noise import seeded, uniform

OUTSIDE = -1
"""stands for a token where a context reaches over the border of its sequence"""


class Contexts(NamedTuple):
    """Up to k contexts of each subcomponent, the highest score first."""

    scores: Float[Tensor, "C k"]
    """by which they were kept; -inf where there are fewer than k"""
    tokens: Int[Tensor, "C k window"] | Float[Tensor, "C k window width"]
    """token ids; of toys inputs, one row in each context"""
    importances: Float[Tensor, "C k window"]
    """of the subcomponent at every position of the context, 0 outside the sequence"""
    activations: Float[Tensor, "C k window"]
    """‖U_c‖ h_c there; 0 where they were not given"""
    sequences: Int[Tensor, "C k"]
    """which sequence of the pass each is cut out of, from 0"""
    positions: Int[Tensor, "C k"]
    """of the middle in its sequence"""


class KeptContexts:
    """Keeps, for each of C subcomponents, the k contexts of the highest scores.

    A context is `left` positions, the position itself, and `right` positions, cut at the sequence's
    borders. No two of a subcomponent have the same content. Of one batch the 2k best of a subcomponent
    compete. Memory: C · k · (left + 1 + right).
    """

    def __init__(self, *, k: int, left: int, right: int) -> None:
        self.k, self.left, self.right = k, left, right
        self.found: Contexts | None = None
        self.n_sequences = 0
        """seen so far"""

    @property
    def kept(self) -> Contexts:
        assert self.found is not None, "no batch was seen"
        return self.found

    def add(
        self,
        candidates: Float[Tensor, "batch position C"],
        tokens: Tensor,
        importance: Float[Tensor, "batch position C"],
        activation: Float[Tensor, "batch position C"] | None,
    ) -> None:
        """`candidates`: scores, -inf where there is no context; `tokens`: `[batch, position, ...]`."""
        found = self._best_of(candidates, tokens, importance, activation)
        self.n_sequences += len(tokens)
        if self.found is not None:
            pairs = zip(self.found, found, strict=True)
            found = Contexts(*(torch.cat([old.to(new.device), new], dim=1) for old, new in pairs))
        found = _sorted(found)
        repeated = _repeated(found.tokens)
        found = _sorted(found._replace(scores=found.scores.masked_fill(repeated, -torch.inf)))
        self.found = Contexts(*(own[:, : self.k] for own in found))

    def _best_of(
        self,
        candidates: Float[Tensor, "batch position C"],
        tokens: Tensor,
        importance: Float[Tensor, "batch position C"],
        activation: Float[Tensor, "batch position C"] | None,
    ) -> Contexts:
        """The 2k highest of each subcomponent in one batch."""
        n_positions, C = candidates.shape[1:]
        flat = candidates.flatten(0, 1)
        scores, places = flat.topk(min(2 * self.k, len(flat)), dim=0)
        scores, places = scores.mT, places.mT
        offsets = torch.arange(-self.left, self.right + 1, device=flat.device)
        positions = (places % n_positions)[..., None] + offsets
        sequences = (places // n_positions)[..., None]
        inside = (positions >= 0) & (positions < n_positions)
        positions = positions.clamp(0, n_positions - 1)
        columns = torch.arange(C, device=flat.device)[:, None, None]
        content = tokens[sequences, positions]
        outside = ~inside.reshape(*inside.shape, *[1] * (content.dim() - inside.dim()))
        g = importance[sequences, positions, columns].masked_fill(~inside, 0.0)
        acts = (
            torch.zeros_like(g)
            if activation is None
            else activation[sequences, positions, columns].masked_fill(~inside, 0.0)
        )
        return Contexts(
            scores,
            content.masked_fill(outside, OUTSIDE),
            g,
            acts,
            sequences[..., 0] + self.n_sequences,
            places % n_positions,
        )

    def state(self) -> dict[str, Tensor]:
        """What it goes on from."""
        return {**self.kept._asdict(), "n_sequences": torch.tensor(self.n_sequences)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.found = Contexts(*(state[name] for name in Contexts._fields))
        self.n_sequences = int(state["n_sequences"])


class TopContexts(KeptContexts):
    """Those around the highest importances, which do not overlap (see `peaks`)."""

    def __init__(self, C: int, *, k: int, left: int, right: int, threshold: float) -> None:
        super().__init__(k=k, left=left, right=right)
        self.C, self.threshold = C, threshold

    def update(
        self,
        tokens: Tensor,
        importance: Float[Tensor, "batch position C"],
        activation: Float[Tensor, "batch position C"] | None = None,
    ) -> None:
        is_peak = peaks(importance, self.left + self.right) & (importance > self.threshold)
        candidates = importance.masked_fill(~is_peak, -torch.inf)
        self.add(candidates, tokens, importance, activation)


class SampledContexts(KeptContexts):
    """A uniform sample of all positions at which a subcomponent is on (a reservoir, by random keys).

    What has the same content as another one of the sample is in it once. The keys of a batch depend on
    `seed` and the number of sequences before it, so that a pass that is gone on with draws the same.
    """

    def __init__(self, *, k: int, left: int, right: int, threshold: float, seed: int) -> None:
        super().__init__(k=k, left=left, right=right)
        self.threshold, self.seed = threshold, seed

    def update(
        self,
        tokens: Tensor,
        importance: Float[Tensor, "batch position C"],
        activation: Float[Tensor, "batch position C"],
    ) -> None:
        generator = seeded(importance.device, "contexts", self.seed, self.n_sequences)
        keys = uniform(importance.shape, generator)
        candidates = keys.masked_fill(importance <= self.threshold, -torch.inf)
        self.add(candidates, tokens, importance, activation)


def by_quantile(contexts: Contexts, c: int, left: int, n_groups: int) -> list[list[int]]:
    """The places in a sample of c's contexts, in groups from the highest importance to the lowest.

    Equal importances are ordered by the size of the activation. Groups differ by one in size at most; of
    a uniform sample they are the quantiles of all contexts.
    """
    there = (contexts.scores[c] > -torch.inf).nonzero().flatten().tolist()
    g, a = contexts.importances[c, :, left].tolist(), contexts.activations[c, :, left].tolist()
    ordered = sorted(there, key=lambda place: (-g[place], -abs(a[place]), place))
    bounds = [round(i * len(ordered) / n_groups) for i in range(n_groups + 1)]
    return [ordered[begin:end] for begin, end in pairwise(bounds)]


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


def _sorted(contexts: Contexts) -> Contexts:
    scores, order = contexts.scores.sort(dim=1, descending=True, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    return Contexts(scores, *(own[rows, order] for own in contexts[1:]))


def _repeated(tokens: Tensor) -> Bool[Tensor, "C n"]:
    """Which contexts have the same content as an earlier one of their subcomponent.

    Compared by a random linear hash modulo 2⁶⁴, the window times faster than token by token.
    """
    content = tokens.view(torch.int32) if tokens.dtype == torch.float32 else tokens
    content = content.flatten(2).long()
    generator = torch.Generator().manual_seed(0)
    top = 2**62
    factors = torch.randint(-top, top, content.shape[-1:], generator=generator).to(tokens.device)
    hashes = (content * factors).sum(dim=-1)
    return (hashes[:, :, None] == hashes[:, None]).tril(diagonal=-1).any(dim=-1)
