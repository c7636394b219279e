"""How few subcomponents are on: the penalty of one importance, and what a frequency costs.

A penalty ψ makes of an upper-leaky importance u what counts as being on. Its mean over the data is the
frequency f_c of a subcomponent; Σ f_c is the activity, and a cost Φ(f) that grows faster than f tells one
subcomponent with two jobs from two with one each.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import BaseConfig
from spd.losses.spec import LossSpec, StepContext
from spd.schedule import PositiveScheduled, value_at

# --- the mathematics -------------------------------------------------------------------------------


def smooth_l0(
    u: Float[Tensor, "*shape"], gamma: float | Tensor, *, normalize_at_one: bool = False
) -> Float[Tensor, "*shape"]:
    """u² / (u² + γ²); times 1 + γ², so that it is 1 at u = 1 whatever γ is, if it is to be normalised."""
    squares = u.square()
    counted = squares / (squares + gamma**2)
    return (1 + gamma**2) * counted if normalize_at_one else counted


def frequency_cost(f: Float[Tensor, "*shape"], reference_count: float) -> Float[Tensor, "*shape"]:
    """Φ(f) = f log2(1 + a′ f): bits that grow with how often something is on, a′ the reference count."""
    return f * torch.log1p(reference_count * f) / math.log(2)


def frequency_cost_slope(
    f: Float[Tensor, "*shape"], reference_count: float
) -> Float[Tensor, "*shape"]:
    """Φ′(f) = log2(1 + a′ f) + a′ f / ((1 + a′ f) ln 2)."""
    scaled = reference_count * f
    return (torch.log1p(scaled) + scaled / (1 + scaled)) / math.log(2)


class RunningMean:
    """An exponential moving average that forgets half of what it holds in `half_life` steps.

    e ← d e + (1 − d) f with d = 2^(−1/half_life) and e₀ = 0; f̂ = e / (1 − d^n) after n updates is what it
    estimates, which is f itself at the first.
    """

    def __init__(self, half_life: float) -> None:
        self.rate = math.log(2) / half_life
        self.new = -math.expm1(-self.rate)
        """1 − d"""

    def updated(self, e: Float[Tensor, " C"], f: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
        return (1 - self.new) * e + self.new * f

    def estimate(self, e: Float[Tensor, " C"], n_updates: Float[Tensor, ""]) -> Float[Tensor, " C"]:
        """f̂ from e, which has been updated so often, at least once."""
        return e / -torch.expm1(-self.rate * n_updates)


def cost_of_estimate(
    f: Float[Tensor, " C"], estimate: Float[Tensor, " C"], reference_count: float
) -> Float[Tensor, " C"]:
    """Φ(f̂), with the gradient Φ′(f̂) ∂f: an average would let through the small part alone that is new."""
    estimate = estimate.detach()
    slope = frequency_cost_slope(estimate, reference_count)
    return frequency_cost(estimate, reference_count) + slope * (f - f.detach())


# --- the penalties, as a configuration names them --------------------------------------------------


class LpPenalty(BaseConfig):
    """ψ(u) = (u + ε)^p: with a p that falls, from a square to nearly a count."""

    type: Literal["lp"] = "lp"
    p: PositiveScheduled
    eps: float = Field(default=1e-12, gt=0.0, allow_inf_nan=False)
    """keeps the slope at 0 finite, p ε^(p − 1)"""

    def __call__(
        self, u: Float[Tensor, "*shape"], progress: Float[Tensor, ""]
    ) -> Float[Tensor, "*shape"]:
        return (u + self.eps) ** value_at(self.p, progress)


class SmoothL0Penalty(BaseConfig):
    """ψ(u) = u² / (u² + γ²): a count of what lies above γ, whose slope is at most 0.65 / γ."""

    type: Literal["smooth_l0"] = "smooth_l0"
    gamma: PositiveScheduled
    normalize_at_one: bool = False
    """times 1 + γ²: ψ(1) = 1 all the while that γ moves, so that a coefficient keeps its meaning"""

    def __call__(
        self, u: Float[Tensor, "*shape"], progress: Float[Tensor, ""]
    ) -> Float[Tensor, "*shape"]:
        gamma = value_at(self.gamma, progress)
        return smooth_l0(u, gamma, normalize_at_one=self.normalize_at_one)


Penalty = Annotated[LpPenalty | SmoothL0Penalty, Field(discriminator="type")]


# --- the losses ------------------------------------------------------------------------------------


class Activity(LossSpec):
    """Σ_l Σ_c f_c, f_c the mean over the data of a penalty of the importance of subcomponent c."""

    type: Literal["activity"] = "activity"
    penalty: Penalty

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            yield ctx.mean(self.penalty(ctx.ci.upper[path], ctx.progress).sum(dim=-1))


class Frequency(LossSpec):
    """Σ_l Σ_c f_c log2(1 + a′ f_c), the mean f_c that of all processes, for each site and c by itself."""

    type: Literal["frequency"] = "frequency"
    penalty: Penalty
    reference_count: float = Field(gt=0.0, allow_inf_nan=False)
    """a′, in rows or positions: published runs have batch size × positions"""
    half_life: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """of the running mean, in steps, that stands for f_c where one batch tells too little; null: none"""

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            f = ctx.frequencies(self.penalty(ctx.ci.upper[path], ctx.progress))
            if self.half_life is None:
                yield frequency_cost(f, self.reference_count).sum()
                continue
            mean = RunningMean(self.half_life)
            updated = mean.updated(ctx.carried(f"mean.{path}"), f.detach())
            estimate = mean.estimate(updated, ctx.carried("n_updates") + 1)
            yield cost_of_estimate(f, estimate, self.reference_count).sum()

    def initial_state(self, model: ComponentModel) -> dict[str, Tensor]:
        if self.half_life is None:
            return {}
        columns = {path: site.subcomponents.V[0] for path, site in model.sites.items()}
        means = {f"mean.{path}": torch.zeros_like(V) for path, V in columns.items()}
        return {**means, "n_updates": next(iter(columns.values())).new_zeros(())}

    def next_state(self, ctx: StepContext) -> dict[str, Tensor]:
        if self.half_life is None:
            return {}
        mean, found = RunningMean(self.half_life), {}
        for path in ctx.ci.upper:
            f = ctx.frequencies(self.penalty(ctx.ci.upper[path], ctx.progress))
            found[f"mean.{path}"] = mean.updated(ctx.carried(f"mean.{path}"), f)
        return {**found, "n_updates": ctx.carried("n_updates") + 1}
