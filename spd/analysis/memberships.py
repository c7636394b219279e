"""Which subcomponents are on at each of a sample of positions: what co-activation is counted from."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd.config import UserError
from spd.noise import seeded

FLOOR = 0.01
"""an importance above it is kept"""
N_POSITIONS = 2**16
N_ENTRIES = 2**26
"""subcomponents that are on, over all kept positions: 400 MB"""


class Memberships(NamedTuple):
    """Importances above `FLOOR` at sampled positions, as compressed rows: one row for each position."""

    indptr: Int[Tensor, " ends"]
    """row i has the entries `indptr[i]` to `indptr[i + 1]`"""
    columns: Int[Tensor, " entries"]
    """subcomponents, site after site"""
    values: Float[Tensor, " entries"]
    """g, in half precision"""
    sequences: Int[Tensor, " positions"]
    """which sequence of the pass each position is of; sequences are independent, positions are not"""
    positions: Int[Tensor, " positions"]
    """which position of its sequence"""
    C: int

    @property
    def n_positions(self) -> int:
        return len(self.sequences)

    def on(self, threshold: float = FLOOR) -> sp.csr_array:
        """1 where g > threshold, `[positions, C]`; `UserError` below `FLOOR`, where nothing was kept."""
        if not FLOOR <= threshold < 1:
            raise UserError(
                f"threshold: {threshold}; from {FLOOR}, above which importances are kept, to below 1"
            )
        kept = np.ones(len(self.columns), bool)
        if threshold > FLOOR:
            kept = self.values.float().numpy() > threshold
        ends = np.concatenate([[0], np.cumsum(kept)])[self.indptr.numpy()]
        columns = self.columns.numpy()[kept]
        ones = np.ones(len(columns), np.int32)
        return sp.csr_array((ones, columns, ends), shape=(self.n_positions, self.C))

    def rows(self) -> dict[tuple[int, int], int]:
        """The row of each sequence and position that is kept."""
        pairs = zip(self.sequences.tolist(), self.positions.tolist(), strict=True)
        return {pair: row for row, pair in enumerate(pairs)}

    def on_at(self, row: int, c: int) -> bool:
        begin, end = self.indptr[row : row + 2].tolist()
        return bool((self.columns[begin:end] == c).any())

    def co_activation(self, threshold: float = FLOOR) -> sp.csr_array:
        """n_ij, the positions at which both are on, `[C, C]`; on the diagonal those of each."""
        on = self.on(threshold)
        return (on.T @ on).tocsr()


class MembershipSample:
    """A uniform sample of positions, of bounded size, from a pass of any length.

    Every position gets a random key; those with a key below a rate are kept. Whenever there are too many
    the rate is halved. The keys of a batch depend on `seed` and the positions before it.
    """

    def __init__(
        self, C: int, *, seed: int, n_positions: int = N_POSITIONS, n_entries: int = N_ENTRIES
    ) -> None:
        self.C, self.seed, self.rate = C, seed, 1.0
        self.limits = (n_positions, n_entries)
        self.n_seen = 0
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.sizes = torch.zeros(0, dtype=torch.long)
        self.sequences = torch.zeros(0, dtype=torch.long)
        self.positions = torch.zeros(0, dtype=torch.long)
        self.columns = torch.zeros(0, dtype=torch.int32)
        self.values = torch.zeros(0, dtype=torch.float16)

    def update(
        self,
        g: Float[Tensor, "rows C"],
        sequences: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
    ) -> None:
        generator = seeded(torch.device("cpu"), "memberships", self.seed, self.n_seen)
        keys = torch.rand(len(g), generator=generator, dtype=torch.float64)
        self.n_seen += len(g)
        chosen = (keys < self.rate).nonzero().flatten()
        rows = g[chosen.to(g.device)]
        on = rows > FLOOR
        self.keys = torch.cat([self.keys, keys[chosen]])
        self.sizes = torch.cat([self.sizes, on.sum(dim=1).cpu()])
        self.sequences = torch.cat([self.sequences, sequences.cpu()[chosen]])
        self.positions = torch.cat([self.positions, positions.cpu()[chosen]])
        columns = on.nonzero()[:, 1].to(torch.int32).cpu()
        self.columns = torch.cat([self.columns, columns])
        self.values = torch.cat([self.values, rows[on].half().cpu()])
        while (len(self.keys) > self.limits[0] or len(self.columns) > self.limits[1]) and len(
            self.keys
        ) > 1:
            self.rate /= 2
            self._keep(self.keys < self.rate)

    def _keep(self, kept: Tensor) -> None:
        entries = kept.repeat_interleave(self.sizes)
        self.columns, self.values = self.columns[entries], self.values[entries]
        self.keys, self.sizes = self.keys[kept], self.sizes[kept]
        self.sequences, self.positions = self.sequences[kept], self.positions[kept]

    def compute(self) -> Memberships:
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), self.sizes.cumsum(0)])
        where = (self.sequences, self.positions)
        return Memberships(indptr, self.columns, self.values, *where, self.C)

    def state(self) -> dict[str, Tensor]:
        """What it goes on from."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        return {
            **tensors,
            "n_seen": torch.tensor(self.n_seen),
            "rate": torch.tensor(self.rate, dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name in TENSORS:
            setattr(self, name, state[name])
        self.n_seen, self.rate = int(state["n_seen"]), float(state["rate"])


TENSORS = ("keys", "sizes", "sequences", "positions", "columns", "values")
