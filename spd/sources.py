"""Adversarial mask sources that live from step to step: where they start, and how they climb.

A source r of one site has a channel for each subcomponent, from which m = g + (1 − g) r, and one more,
r_Δ, the mask of the remainder W − V U (VPD, section on persistent adversaries; Bushnaq et al. 2026). Knows
no model.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from spd.config import BaseConfig, UserError
from spd.noise import Share, seeded, uniform
from spd.schedule import PositiveScheduled, value_at

Scope = Literal["c", "sc", "bc", "bsc"]
"""What has a source of its own: `c` the batch, `sc` each position, `bc` each example, `bsc` each position
of each example"""
Beta = Field(ge=0.0, lt=1.0)


def source_shape(scope: Scope, rows: torch.Size, C: int) -> torch.Size:
    """`[*scope, C + 1]` for a site whose importances are `[*rows, C]`, examples along the first axis.

    Axes that share a source have the length 1. `UserError` where positions are wanted and there are none.
    """
    if "s" in scope and len(rows) < 2:
        allowed = "c or bc is allowed"
        raise UserError(
            f"scope: {scope!r} has a source for each position, and a batch has none here; {allowed}"
        )
    examples = rows[0] if "b" in scope else 1
    positions = rows[1:] if "s" in scope else [1] * (len(rows) - 1)
    return torch.Size((examples, *positions, C + 1))


def draw_sources(
    shape: torch.Size, device: torch.device, share: Share, *place: object
) -> Float[Tensor, "*scope channels"]:
    """U(0, 1), the same every time for a `place`; of several processes the examples of one."""
    drawn = uniform(shape, seeded(device, "sources", *place))
    return drawn if share.of == 1 else drawn[share.rows(shape[0])].clone()


def of_slots(
    r: Float[Tensor, "slots *rest"], slots: Int[Tensor, " rows"] | None
) -> Float[Tensor, "rows *rest"]:
    """The sources of the rows of a batch, of which each is that of a slot; None: all, in order.

    Rows that fill a batch up have the number of slots as theirs.
    """
    return r if slots is None else r[slots.clamp(max=len(r) - 1)]


def to_slots(
    slopes: Float[Tensor, "rows *rest"], slots: Int[Tensor, " rows"] | None, n_slots: int
) -> Float[Tensor, "{n_slots} *rest"]:
    """The inverse for gradients: 0 where a slot has no row."""
    if slots is None:
        return slopes
    n_rows = len(slots)
    row_of = slots.new_full((n_slots + 1,), n_rows)  # one more, for what fills up
    row_of = row_of.scatter(0, slots, torch.arange(n_rows, device=slots.device))[:n_slots]
    return torch.cat([slopes, torch.zeros_like(slopes[:1])])[row_of]


def adam_ascent(
    r: Float[Tensor, "*shape"],
    moments: tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]],
    slope: Float[Tensor, "*shape"],
    *,
    powers: tuple[Float[Tensor, ""], Float[Tensor, ""]],
    lr: float | Float[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam upwards, then into [0, 1]; r and both moments.

    r + lr m̂ / (√v̂ + ε) with m̂ = m / (1 − β₁ⁿ) and v̂ = v / (1 − β₂ⁿ) in the n-th update; `powers` are β₁ⁿ
    and β₂ⁿ.
    """
    first = betas[0] * moments[0] + (1 - betas[0]) * slope
    second = betas[1] * moments[1] + (1 - betas[1]) * slope.square()
    step = (first / (1 - powers[0])) / ((second / (1 - powers[1])).sqrt() + eps)
    return (r + lr * step).clamp(0.0, 1.0), first, second


class AdamAscent(BaseConfig):
    """Sources that are kept from step to step and climb by Adam, `n_warmup` + 1 times in each."""

    scope: Scope
    n_warmup: int = Field(default=2, ge=0, le=100)
    """ascents before the step that trains the model, which see the whole batch and fixed V, U and g"""
    lr: PositiveScheduled = 0.01
    lr_ramp: float = Field(default=0.025, ge=0.0, le=1.0)
    """the fraction of the run over which the rate rises from 0; afterwards it is constant"""
    betas: tuple[Annotated[float, Beta], Annotated[float, Beta]] = (0.5, 0.99)
    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)

    @property
    def by_example(self) -> bool:
        """Whether each example of a batch, a slot, has sources of its own."""
        return "b" in self.scope

    def rate(self, progress: Float[Tensor, ""]) -> float | Float[Tensor, ""]:
        """The learning rate of all updates of a step."""
        lr = value_at(self.lr, progress)
        return lr if self.lr_ramp == 0.0 else lr * (progress / self.lr_ramp).clamp(max=1.0)

    def begun(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of sources, by site, that have not moved yet."""
        some = next(iter(sources.values()))
        kept = {N_UPDATES: some.new_zeros(()), **{name: some.new_ones(()) for name in POWERS}}
        for path, r in sources.items():
            none = torch.zeros_like(r), torch.zeros_like(r)
            kept |= dict(zip(kept_names(path), (r, *none), strict=True))
        return kept

    def moved(
        self,
        kept: Mapping[str, Tensor],
        slopes: Mapping[str, Tensor],
        progress: Float[Tensor, ""],
    ) -> dict[str, Tensor]:
        """What is kept after one more update, by the slopes of every site's sources."""
        rate = self.rate(progress)
        # products rather than powers, which a compiled step would compute for every entry
        powers = (kept[POWERS[0]] * self.betas[0], kept[POWERS[1]] * self.betas[1])
        new = {N_UPDATES: kept[N_UPDATES] + 1, **dict(zip(POWERS, powers, strict=True))}
        for path, slope in slopes.items():
            names = kept_names(path)
            r, *moments = (kept[name] for name in names)
            moved = adam_ascent(
                r,
                (moments[0], moments[1]),
                slope,
                powers=powers,
                lr=rate,
                betas=self.betas,
                eps=self.eps,
            )
            new |= dict(zip(names, moved, strict=True))
        return new


N_UPDATES = "n_updates"
POWERS = ("power_of_first_beta", "power_of_second_beta")
"""β₁ⁿ and β₂ⁿ after n updates"""
COUNTS = (N_UPDATES, *POWERS)
"""what is kept once for all sites"""


def kept_names(path: str) -> tuple[str, str, str]:
    """Under which a site's sources and their two moments are kept."""
    return source_name(path), f"first_moment.{path}", f"second_moment.{path}"


def source_name(path: str) -> str:
    return f"r.{path}"
