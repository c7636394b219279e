"""Merging subcomponents into groups so that it takes fewer bits to say which are on.

Binary importances: a group is on where any of its members is. Of k groups, group i is on at s_i positions
and costs r_i to send each time, its size; S = Σ s_i. The cost of saying at every position which
groups are on and what they are is

    Σ_i s_i (log2 k + α r_i)

and merging i and j, which are on together at n_ij positions, changes it by

    ΔL = S log2((k − 1)/k) − n_ij log2(k − 1) + α [r_j (s_i − n_ij) + r_i (s_j − n_ij)]

The first summand is common to all pairs, so that only counts decide, and only row i changes by a merge.
Greedy merging with these counts: every round costs O(k) and what the positions hold that both groups share.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray

BLOCK = 512
"""rows of the table of joint counts that are computed at a time"""
NOWHERE = np.inf


class Merge(NamedTuple):
    """Group `j` became part of group `i`; groups go by their first members."""

    i: int
    j: int
    change: float
    """ΔL, in bits"""


class Merging(NamedTuple):
    """All merges, in their order, from single subcomponents on."""

    sizes: Int[ndarray, " k"]
    """s_i: positions at which each is on"""
    start: float
    """the cost before the first"""
    merges: list[Merge]

    def costs(self) -> Float[ndarray, " rounds"]:
        """Of the partition before the first merge, after it, after the second, …"""
        return self.start + np.cumsum([0.0, *(merge.change for merge in self.merges)])

    def best_round(self) -> int:
        """After how many merges the cost is lowest, the first of equal ones (up to rounding)."""
        costs = self.costs()
        return int(np.argmax(costs <= costs.min() + 1e-9 * max(1.0, abs(self.start))))

    def labels(self, n_merges: int | None = None) -> Int[ndarray, " k"]:
        """The partition after so many merges, by default the cheapest: of each its group's name."""
        n = self.best_round() if n_merges is None else n_merges
        labels = np.arange(len(self.sizes))
        for merge in reversed(self.merges[:n]):  # where a group went later is known first
            labels[merge.j] = labels[merge.i]
        return labels


def cost(
    sizes: Sequence[int] | ndarray, ranks: Sequence[int] | ndarray, alpha: float, k: int
) -> float:
    """Σ_i s_i (log2 k + α r_i), in bits; sending the dictionary itself is not counted."""
    s, r = np.asarray(sizes, float), np.asarray(ranks, float)
    return float((s * (math.log2(k) + alpha * r)).sum())


def change(
    n: float, s: tuple[float, float], r: tuple[float, float], *, S: float, k: int, alpha: float
) -> float:
    """ΔL of merging two of k groups."""
    penalty = r[1] * (s[0] - n) + r[0] * (s[1] - n)
    return S * math.log2((k - 1) / k) - n * math.log2(k - 1) + alpha * penalty


def alpha_for(share: float, k: int) -> float:
    """α below which two of k subcomponents, equally often on, are merged if they share that part of it.

    `q/(1 − q) · log2(k)/2` with q the share of the positions of one at which the other is on too. The gain
    of a shorter index, `S log2(k/(k − 1))`, is not in it: it lets rarer ones merge at larger α still.
    """
    return share / (1 - share) * math.log2(k) / 2


def break_even_alpha(n: float, s: float, *, k: int, S: float = 0.0) -> float:
    """The exact α at which merging two single subcomponents, each on at s positions, changes nothing."""
    return (n * math.log2(k - 1) - S * math.log2((k - 1) / k)) / (2 * (s - n))


def size_of(on: sp.csr_array) -> tuple[int, int]:
    """Positions and subcomponents."""
    shape = on.shape
    assert shape is not None and len(shape) == 2, "positions and subcomponents"
    return shape[0], shape[1]


def joint_counts(on: sp.csr_array) -> Int[ndarray, "k k"]:
    """n_ij, in rows at a time; on the diagonal s_i. 4 k² bytes."""
    k = size_of(on)[1]
    columns = on.tocsc()
    found = np.empty((k, k), np.int32)
    for begin in range(0, k, BLOCK):
        block = columns[:, begin : begin + BLOCK]
        found[begin : begin + BLOCK] = (block.T @ on).toarray()
    return found


Pick = Callable[[int], int]
"""how many pairs there are → which of them to merge, 0 the best"""


def best_pair(n_pairs: int) -> int:
    """Greedy: always the best."""
    return 0


class RankPicker:
    """The J-th best pair with probability ∝ e^{−γ J}, J = 0, 1, …, N − 1."""

    def __init__(self, gamma: float, seed: int) -> None:
        self.gamma = gamma
        self.generator = np.random.default_rng(seed)

    def __call__(self, n_pairs: int) -> int:
        return rank_of(self.generator.random(), self.gamma, n_pairs)


def rank_of(u: float, gamma: float, n_pairs: int) -> int:
    """J = ⌊−ln(1 − u (1 − e^{−γN}))/γ⌋, the inverse of its distribution, at u in [0, 1)."""
    at_most = -math.expm1(-gamma * n_pairs)
    return min(n_pairs - 1, math.floor(-math.log1p(-u * at_most) / gamma))


class Groups:
    """The groups of a round, their counts, and where each is on.

    A table of a position's groups is kept as compressed rows in which a group appears once; an entry that
    has become part of another group at its position is struck out.
    """

    def __init__(self, on: sp.csr_array) -> None:
        on = on.tocsr()
        self.k = size_of(on)[1]
        self.n = joint_counts(on)
        self.s = self.n.diagonal().astype(np.float64)
        self.r = np.ones(self.k)
        self.alive = np.ones(self.k, bool)
        self.table = on.indices.astype(np.int32)
        ones = np.ones(len(self.table), np.uint8)
        shape = (size_of(on)[0], self.k + 1)
        self.by_position = sp.csr_array((ones, self.table, on.indptr.astype(np.int32)), shape=shape)
        """rows of `table`, whose memory it shares"""
        assert np.shares_memory(self.by_position.indices, self.table), "it is to see every merge"
        self.row = np.repeat(np.arange(size_of(on)[0], dtype=np.int32), np.diff(on.indptr))
        order = np.argsort(self.table, kind="stable")
        bounds = np.searchsorted(self.table[order], np.arange(self.k + 1))
        self.entries = [order[bounds[c] : bounds[c + 1]] for c in range(self.k)]
        """of each group: its places in the table"""
        self.marked = np.zeros(size_of(on)[0], bool)
        np.fill_diagonal(self.n, 0)

    def merge(self, i: int, j: int) -> None:
        """j becomes part of i: n_il = n_il + n_jl − (positions at which i, j and l are on)."""
        rows_i, rows_j = self.row[self.entries[i]], self.row[self.entries[j]]
        self.marked[rows_i] = True
        both = self.marked[rows_j]
        self.marked[rows_i] = False
        three = self._counts(rows_j[both])
        new = self.n[i] + self.n[j] - three
        self.table[self.entries[j][both]] = self.k  # struck out
        kept = self.entries[j][~both]
        self.table[kept] = i
        self.entries[i] = np.concatenate([self.entries[i], kept])
        self.entries[j] = kept[:0]
        self.s[i] += self.s[j] - both.sum()
        self.r[i] += self.r[j]
        self.s[j], self.alive[j] = 0, False
        new[~self.alive] = 0
        new[i] = 0
        self.n[i], self.n[:, i] = new, new
        self.n[j], self.n[:, j] = 0, 0

    def _counts(self, rows: Int[ndarray, " rows"]) -> Int[ndarray, " k"]:
        """At how many of these positions each group is on."""
        found = np.bincount(self.by_position[rows].indices, minlength=self.k + 1)
        return found[: self.k].astype(np.int32)


def merge_all(
    on: sp.csr_array,
    *,
    alpha: float,
    together: bool = True,
    pick: Pick = best_pair,
    watch: Callable[[int], None] | None = None,
) -> Merging:
    """Merge until one group is left, or no pair is allowed.

    `on`: `[positions, k]`, 1 where a subcomponent is on; each must be somewhere. With `together` only
    groups that are on together somewhere may merge; without it rare groups merge for a shorter index, if
    α (r_j s_i + r_i s_j) < S/(k ln 2). `watch` is told the number of groups that are left after each round.
    """
    groups = Groups(on)
    k = groups.k
    assert groups.s.all(), "every subcomponent is on somewhere"
    sizes, total = groups.s.copy(), int(groups.s.sum())
    start = cost(sizes, groups.r, alpha, k) if k else 0.0
    rounds = _Rounds(groups, alpha, together)
    merges: list[Merge] = []
    while k > 1 and rounds.n_pairs() > 0:
        i, j = rounds.pair(pick(rounds.n_pairs()), math.log2(k - 1))
        n, s, r = int(groups.n[i, j]), groups.s, groups.r
        two = ((int(s[i]), int(s[j])), (int(r[i]), int(r[j])))
        merges.append(Merge(i, j, change(n, *two, S=total, k=k, alpha=alpha)))
        total -= n
        rounds.merge(i, j)
        k -= 1
        if watch is not None:
            watch(k)
    return Merging(sizes, start, merges)


class _Rounds:
    """Finds the best pairs of a round without looking at all.

    A row's bound is at most the lowest score of its pairs (i, j > i). As log2(k − 1) falls from round to
    round scores only rise, so that what a row had before stays a bound, and only rows whose bound is below
    what is wanted are looked at again.
    """

    def __init__(self, groups: Groups, alpha: float, together: bool) -> None:
        self.groups, self.alpha, self.together = groups, alpha, together
        self.bound = np.full(groups.k, -NOWHERE)
        self.bound[-1:] = NOWHERE
        self.n_on = np.count_nonzero(groups.n, axis=1)
        """of each group, with how many it is on together"""
        self.k = groups.k

    def n_pairs(self) -> int:
        """How many may be merged."""
        return int(self.n_on.sum()) // 2 if self.together else self.k * (self.k - 1) // 2

    def scores(self, i: int, bits: float) -> Float[ndarray, " after"]:
        """α·penalty − n_ij·log2(k − 1) for all j > i; infinite where the pair is not allowed."""
        own = self.groups
        n, s, r = own.n[i, i + 1 :], own.s[i + 1 :], own.r[i + 1 :]
        found = self.alpha * (r * own.s[i] + own.r[i] * s)
        found -= n * (self.alpha * (r + own.r[i]) + bits)
        allowed = n > 0 if self.together else own.alive[i + 1 :]
        found[~allowed] = NOWHERE
        return found

    def pair(self, rank: int, bits: float) -> tuple[int, int]:
        """The pair of that rank among all, 0 the lowest score; of equal ones the first."""
        found: list[tuple[float, int, int]] = []
        pending = self.bound.copy()
        while True:
            i = int(pending.argmin())
            if len(found) > rank and pending[i] > found[rank][0]:
                break
            if pending[i] == NOWHERE:
                break
            scores = self.scores(i, bits)
            self.bound[i] = scores.min(initial=NOWHERE)
            pending[i] = NOWHERE
            found += [
                (float(scores[j]), i, i + 1 + int(j))
                for j in _lowest(scores, rank + 1)
                if scores[j] < NOWHERE
            ]
            found.sort()
            del found[rank + 1 :]
        _, i, j = found[min(rank, len(found) - 1)]
        return i, j

    def merge(self, i: int, j: int) -> None:
        """After it the pairs of group i have other scores, those of j are gone."""
        own = self.groups
        before_i, before_j = own.n[i] > 0, own.n[j] > 0
        own.merge(i, j)
        self.k -= 1
        after = own.n[i] > 0
        self.n_on -= before_i.astype(np.int64) + before_j - after
        self.n_on[i], self.n_on[j] = after.sum(), 0
        self.bound[j] = NOWHERE
        self.bound[i] = -NOWHERE if i < own.k - 1 else NOWHERE
        # Rows before i have got a new pair; any score of it at fewer bits is above that at as many as now.
        if i:
            bits = math.log2(self.k) if self.k > 1 else 0.0
            n, s, r = own.n[i, :i], own.s[:i], own.r[:i]
            new = self.alpha * (own.r[i] * (s - n) + r * (own.s[i] - n)) - n * bits
            allowed = n > 0 if self.together else own.alive[:i]
            np.minimum(self.bound[:i], np.where(allowed, new, NOWHERE), out=self.bound[:i])


def _lowest(scores: Float[ndarray, " after"], n: int) -> Int[ndarray, " n"]:
    """The places of the n lowest, in no order."""
    if n == 1 and len(scores):
        return np.array([scores.argmin()])
    return np.argpartition(scores, n - 1)[:n] if n < len(scores) else np.arange(len(scores))
