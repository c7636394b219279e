"""What each subcomponent does on data: sums over one pass, in memory that does not grow with the data."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd.analysis.contexts import Contexts, TopContexts
from spd.metrics import ALIVE_THRESHOLD
from spd.problem import of_ids

N_CONTEXTS, LEFT, RIGHT = 12, 16, 8
TABLE_ENTRIES = 2**26
"""of importance per token and subcomponent: 256 MB"""
PAIR_ENTRIES = 2**26
"""of joint counts of pairs of subcomponents: 256 MB"""
SUMS = ("total", "highest", "n_active", "n_positive")
PARTS = ("contexts", "tokens", "pairs")
"""what the state of `SubcomponentStatistics` is made of"""


class TokenImportances:
    """Σ of a value of every subcomponent, such as g, over the occurrences of every token.

    Of the tokens, the first `capacity` to appear have a row of their own; what comes later is in
    `others`, so that shares of the total stay exact.
    """

    def __init__(self, C: int, capacity: int) -> None:
        self.capacity = capacity
        self.ids: list[int] = []
        """the tokens with a row of their own, in the order of the rows"""
        self.row_of: dict[int, int] = {}
        self.sums = torch.zeros(0, C)
        self.counts = torch.zeros(0, dtype=torch.float64)
        """occurrences of each, or their weight"""
        self.others = torch.zeros(C)

    def update(self, tokens: Int[Tensor, " rows"], g: Float[Tensor, "rows C"]) -> None:
        unique, inverse = tokens.unique(return_inverse=True)
        sums = torch.zeros(len(unique), g.shape[1], device=g.device).index_add_(0, inverse, g)
        self._add(unique, sums, inverse.bincount(minlength=len(unique)))

    def update_weighted(
        self,
        tokens: Int[Tensor, "rows m"],
        weights: Float[Tensor, "rows m"],
        g: Float[Tensor, "rows C"],
    ) -> None:
        """Where a row has several tokens, each with a weight, such as its probability."""
        unique, inverse = tokens.unique(return_inverse=True)
        rows = torch.arange(len(tokens), device=g.device)[:, None].expand_as(tokens)
        places = torch.stack([inverse.flatten(), rows.flatten()])
        size = (len(unique), len(tokens))
        matrix = torch.sparse_coo_tensor(places, weights.flatten(), size, check_invariants=False)
        counts = torch.zeros(len(unique), dtype=torch.float64, device=g.device)
        counts.index_add_(0, inverse.flatten(), weights.flatten().double())
        self._add(unique, torch.sparse.mm(matrix, g), counts)

    def _add(self, unique: Tensor, sums: Tensor, counts: Tensor) -> None:
        seen, sums, counts = unique.tolist(), sums.cpu(), counts.cpu()
        for token in seen:
            if token not in self.row_of and len(self.ids) < self.capacity:
                self.row_of[token] = len(self.ids)
                self.ids.append(token)
        n_new = len(self.ids) - len(self.sums)
        self.sums = torch.cat([self.sums, torch.zeros(n_new, sums.shape[1])])
        self.counts = torch.cat([self.counts, torch.zeros(n_new, dtype=torch.float64)])
        rows = torch.tensor([self.row_of.get(token, -1) for token in seen])
        own = rows >= 0
        self.sums[rows[own]] += sums[own]
        self.counts[rows[own]] += counts[own]
        self.others += sums[~own].sum(dim=0)

    def state(self) -> dict[str, Tensor]:
        """What it goes on from."""
        ids = torch.tensor(self.ids, dtype=torch.long)
        return {"ids": ids, "sums": self.sums, "counts": self.counts, "others": self.others}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.ids = state["ids"].tolist()
        self.row_of = {token: row for row, token in enumerate(self.ids)}
        self.sums, self.counts, self.others = state["sums"], state["counts"], state["others"]

    def means(self, min_count: int) -> Float[Tensor, "tokens C"]:
        """Mean importance on each token; 0 for tokens seen less than `min_count` times."""
        means = self.sums / self.counts.clamp(min=1).float()[:, None]
        return means * (self.counts >= min_count)[:, None]

    def shares(self) -> Float[Tensor, "tokens C"]:
        """Fraction of all the importance of a subcomponent that falls on each token."""
        return self.sums / (self.sums.sum(dim=0) + self.others).clamp(min=1e-30)


class JointCounts:
    """How often two subcomponents are active at the same position.

    Of all pairs, or, where their number would be too large, of those within each site.
    """

    def __init__(self, sizes: list[int], *, across_sites: bool) -> None:
        self.across_sites = across_sites
        self.sizes = [sum(sizes)] if across_sites else sizes
        self.blocks = [torch.zeros(size, size, dtype=torch.int32) for size in self.sizes]

    def update(self, active: Float[Tensor, "rows C"]) -> None:
        for block, columns in zip(self.blocks, active.split(self.sizes, dim=1), strict=True):
            (fired,) = columns.any(dim=0).nonzero(as_tuple=True)
            columns = columns[:, fired]
            joint = (columns.mT @ columns).int().cpu()  # exact: far fewer than 2²⁴ rows at a time
            fired = fired.cpu()
            block[fired[:, None], fired] += joint

    def with_all(self, c: int) -> tuple[int, Int[Tensor, " others"]]:
        """The first subcomponent of c's block, and the counts of c with each of the block."""
        start = 0
        for block in self.blocks:
            if c < start + len(block):
                return start, block[c - start]
            start += len(block)
        raise IndexError(c)

    def state(self) -> dict[str, Tensor]:
        """What it goes on from."""
        return {str(place): block for place, block in enumerate(self.blocks)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.blocks = [state[str(place)] for place in range(len(self.sizes))]


class Statistics(NamedTuple):
    """Sums for all subcomponents, site after site. A subcomponent is active where g > 0.1."""

    n_positions: int
    mean: Float[Tensor, " C"]
    """mean importance over all positions"""
    highest: Float[Tensor, " C"]
    n_active: Int[Tensor, " C"]
    """positions at which it is active"""
    positive: Float[Tensor, " C"]
    """of these, the fraction with a positive inner activation; 0 where there are none"""
    contexts: Contexts
    left: int
    """tokens before the middle of each context"""
    tokens: TokenImportances
    pairs: JointCounts


class SubcomponentStatistics:
    """Collects them batch after batch, from the importances and inner activations of every site."""

    def __init__(
        self,
        C_of: Mapping[str, int],
        *,
        n_contexts: int = N_CONTEXTS,
        left: int = LEFT,
        right: int = RIGHT,
        table_entries: int = TABLE_ENTRIES,
        pair_entries: int = PAIR_ENTRIES,
    ) -> None:
        self.sites = list(C_of)
        C = sum(C_of.values())
        self.n_positions = 0
        self.total = torch.zeros(C, dtype=torch.float64)
        self.highest = torch.zeros(C)
        self.n_active = torch.zeros(C, dtype=torch.long)
        self.n_positive = torch.zeros(C, dtype=torch.long)
        self.contexts = TopContexts(
            C, k=n_contexts, left=left, right=right, threshold=ALIVE_THRESHOLD
        )
        self.tokens = TokenImportances(C, max(1, table_entries // C))
        self.pairs = JointCounts(list(C_of.values()), across_sites=pair_entries >= C * C)

    def update(
        self,
        tokens: Tensor,
        upper: Mapping[str, Float[Tensor, "batch position _C"]],
        acts: Mapping[str, Float[Tensor, "batch position _C"]],
        kept: Bool[Tensor, "batch position"] | None = None,
    ) -> None:
        """`upper` are the upper-leaky importances: above 1 they still have an order.

        What is not `kept` counts nowhere, and is the middle of no context. Of toys `tokens` are inputs,
        `[batch, 1, width]`, which have contexts and no table of their own.
        """
        raw = torch.cat([upper[path] for path in self.sites], dim=-1).float()
        if kept is None:
            kept = torch.ones(raw.shape[:-1], dtype=torch.bool, device=raw.device)
        raw = raw * kept[..., None]
        g = raw.clamp(0.0, 1.0)
        active = g > ALIVE_THRESHOLD
        activation = torch.cat([acts[path] for path in self.sites], dim=-1).float()
        positive = (activation > 0) & active
        rows = g[kept]
        self.n_positions += len(rows)
        self.total += rows.sum(dim=0, dtype=torch.float64).cpu()
        self.highest = self.highest.maximum(rows.amax(dim=0).cpu())
        self.n_active += active[kept].sum(dim=0).cpu()
        self.n_positive += positive[kept].sum(dim=0).cpu()
        self.contexts.update(tokens, raw, activation)
        if of_ids(tokens):
            self.tokens.update(tokens[kept], rows)
        self.pairs.update(active[kept].float())

    def compute(self) -> Statistics:
        assert self.n_positions, "no batch was seen"
        kept = Contexts(*(tensor.cpu() for tensor in self.contexts.kept))
        return Statistics(
            n_positions=self.n_positions,
            mean=(self.total / self.n_positions).float(),
            highest=self.highest,
            n_active=self.n_active,
            positive=self.n_positive / self.n_active.clamp(min=1),
            contexts=kept._replace(importances=kept.importances.clamp(0.0, 1.0)),
            left=self.contexts.left,
            tokens=self.tokens,
            pairs=self.pairs,
        )

    def state(self) -> dict[str, Tensor]:
        """What it goes on from."""
        sums = {name: getattr(self, name) for name in SUMS}
        parts = {name: getattr(self, name).state() for name in PARTS}
        nested = {f"{name}.{key}": t for name, own in parts.items() for key, t in own.items()}
        return {**sums, **nested, "n_positions": torch.tensor(self.n_positions)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name in SUMS:
            setattr(self, name, state[name])
        for name in PARTS:
            getattr(self, name).load_state(part_of(state, name))
        self.n_positions = int(state["n_positions"])


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a state holds below a name."""
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in state.items()
        if key.startswith(f"{name}.")
    }
