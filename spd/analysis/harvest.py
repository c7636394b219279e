"""All that one pass over data gathers of subcomponents, in memory that does not grow with the data."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

from spd.analysis.contexts import Contexts, SampledContexts
from spd.analysis.memberships import N_POSITIONS, Memberships, MembershipSample
from spd.analysis.observation import Kind, Observation
from spd.analysis.statistics import (
    Statistics,
    SubcomponentStatistics,
    TokenImportances,
    part_of,
)
from spd.metrics import ALIVE_THRESHOLD

N_TOP, N_SAMPLED, LEFT, RIGHT = 12, 32, 20, 20
TABLE_ENTRIES = 2**25
"""of each table of tokens and subcomponents: 128 MB"""
N_LIKELY = 16
"""the most probable next tokens of a position, which are counted"""


class Pmi(NamedTuple):
    """How a subcomponent's being on goes with a token, of n positions."""

    recall: Float[Tensor, "tokens C"]
    """share of the firings that are on the token"""
    precision: Float[Tensor, "tokens C"]
    """share of the token's occurrences that are firings"""
    pmi: Float[Tensor, "tokens C"]
    """log2 of p(token, firing) / (p(token) p(firing)), in bits; -inf where they never meet"""


def association(
    together: Float[Tensor, "tokens C"],
    tokens: Float[Tensor, " tokens"],
    firings: Num[Tensor, " C"],
    n: float,
) -> Pmi:
    """From counts: of firings on each token, of tokens, of firings, and of positions."""
    both, on_token, on = together.double(), tokens.double()[:, None], firings.double()
    recall, precision = both / on.clamp(min=1e-30), both / on_token.clamp(min=1e-30)
    expected = (on_token * on / n).clamp(min=1e-30)
    return Pmi(recall.float(), precision.float(), (both / expected).log2().float())


class Gathered(NamedTuple):
    """What a pass has gathered."""

    C_of: dict[str, int]
    kind: Kind
    statistics: Statistics
    """contexts of the highest importances are among them"""
    sampled: Contexts
    """a uniform sample of the positions at which each is on"""
    rms: Float[Tensor, " C"]
    """of the activations ‖U_c‖ h_c, over all positions"""
    firings: TokenImportances
    """how often each is on at each input token; empty unless there are tokens"""
    outputs: TokenImportances
    """sums of the model's probabilities of next tokens where each is on, of the likeliest tokens"""
    inputs: Float[Tensor, "C width"] | None
    """of toys: the mean size of each input where the subcomponent is on"""
    memberships: Memberships

    @property
    def names(self) -> list[str]:
        """`site:c` of each subcomponent, site after site."""
        return [f"{path}:{c}" for path, C in self.C_of.items() for c in range(C)]

    def name(self, c: int) -> str:
        """That of one of them."""
        for path, C in self.C_of.items():
            if c < C:
                return f"{path}:{c}"
            c -= C
        raise IndexError(c)

    def input_tokens(self, columns: Sequence[int] | None = None) -> Pmi:
        """Of the tokens of `firings.ids`, for some subcomponents or all."""
        return self._tokens(self.firings, columns)

    def output_tokens(self, columns: Sequence[int] | None = None) -> Pmi:
        """Of the tokens of `outputs.ids`, with probabilities in place of counts."""
        return self._tokens(self.outputs, columns)

    def _tokens(self, table: TokenImportances, columns: Sequence[int] | None) -> Pmi:
        sums, on = table.sums, self.statistics.n_active
        if columns is not None:
            sums, on = sums[:, list(columns)], on[list(columns)]
        return association(sums, table.counts, on, self.statistics.n_positions)


class Harvest:
    """Gathers it, observation after observation."""

    def __init__(
        self,
        C_of: Mapping[str, int],
        kind: Kind,
        width: int,
        *,
        seed: int = 0,
        n_positions: int = N_POSITIONS,
    ) -> None:
        """`width`: of the inputs of toys, else 0; `n_positions`: those whose memberships are kept."""
        self.C_of = dict(C_of)
        self.kind: Kind = kind
        C = sum(C_of.values())
        left, right = (LEFT, RIGHT) if kind == "tokens" else (0, 0)
        self.statistics = SubcomponentStatistics(
            C_of, n_contexts=N_TOP, left=left, right=right, table_entries=TABLE_ENTRIES
        )
        self.sampled = SampledContexts(
            k=N_SAMPLED, left=left, right=right, threshold=ALIVE_THRESHOLD, seed=seed
        )
        self.squares = torch.zeros(C, dtype=torch.float64)
        self.firings = TokenImportances(C, max(1, TABLE_ENTRIES // C))
        self.outputs = TokenImportances(C, max(1, TABLE_ENTRIES // C))
        self.inputs = torch.zeros(C, width, dtype=torch.float64)
        self.memberships = MembershipSample(C, seed=seed, n_positions=n_positions)

    def update(self, seen: Observation) -> None:
        upper = torch.cat([seen.upper[path] for path in self.C_of], dim=-1).float()
        acts = torch.cat([seen.acts[path] for path in self.C_of], dim=-1).float()
        kept = seen.kept
        if kept is None:
            kept = torch.ones(upper.shape[:2], dtype=torch.bool, device=upper.device)
        if not kept.any():
            return
        first = self.sampled.n_sequences
        numbers = torch.arange(first, first + len(upper), device=upper.device)
        sequences = numbers[:, None].expand(kept.shape)[kept]
        positions = torch.arange(kept.shape[1], device=upper.device).expand(kept.shape)[kept]
        self.statistics.update(seen.contents, seen.upper, seen.acts, seen.kept)
        g = (upper * kept[..., None]).clamp(0.0, 1.0)
        self.sampled.update(seen.contents, g, acts)
        self.squares += acts[kept].double().square().sum(dim=0).cpu()
        rows = g[kept]
        active = (rows > ALIVE_THRESHOLD).float()
        if seen.kind == "tokens":
            self.firings.update(seen.contents[kept], active)
            if seen.output.shape[:-1] == seen.contents.shape:
                self._outputs(seen.output[kept], active)
        elif seen.kind == "inputs":
            sizes = seen.contents[kept].abs()
            self.inputs += (active.mT @ sizes).double().cpu()
        self.memberships.update(rows, sequences, positions)

    def _outputs(
        self, logits: Float[Tensor, "rows vocab"], active: Float[Tensor, "rows C"]
    ) -> None:
        likely = logits.float().softmax(dim=-1).topk(min(N_LIKELY, logits.shape[-1]), dim=-1)
        self.outputs.update_weighted(likely.indices, likely.values, active)

    def compute(self) -> Gathered:
        statistics = self.statistics.compute()
        n_active = statistics.n_active.clamp(min=1)[:, None]
        contexts = Contexts(*(own.cpu() for own in self.sampled.kept))
        return Gathered(
            C_of=self.C_of,
            kind=self.kind,
            statistics=statistics,
            sampled=contexts,
            rms=(self.squares / statistics.n_positions).sqrt().float(),
            firings=self.firings,
            outputs=self.outputs,
            inputs=(self.inputs / n_active).float() if self.kind == "inputs" else None,
            memberships=self.memberships.compute(),
        )

    def state(self) -> dict[str, Tensor]:
        """What it goes on from."""
        parts = {name: getattr(self, name).state() for name in PARTS}
        nested = {f"{name}.{key}": t for name, own in parts.items() for key, t in own.items()}
        return {**nested, "squares": self.squares, "inputs": self.inputs}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name in PARTS:
            getattr(self, name).load_state(part_of(state, name))
        self.squares, self.inputs = state["squares"], state["inputs"]


PARTS = ("statistics", "sampled", "firings", "outputs", "memberships")
