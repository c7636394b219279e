"""How many subcomponents are on: L0, alive, density, and whether that is a decomposition at all."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from spd.component_model import ComponentModel, Site
from spd.losses import StepContext
from spd.metrics.spec import Metric, MetricSpec, Quantity
from spd.problem import Problem

L0_THRESHOLD = 0.01
ALIVE_THRESHOLD = 0.1
ALWAYS_ON = 0.99
"""share of the rows on which a subcomponent that is always on is active"""


class SparsityMetric(MetricSpec):
    """Per site: L0 (mean number of g > 0.01), alive (g > 0.1 at least once), density (mean of g > 0.1).

    `never_active` is how much of the matrix lies in what is not alive: Σ ‖U_c‖ ‖V_c‖ over ‖W‖. Masks
    between g and 1 may turn it on, so that it is not harmless where it is large.
    """

    quantities = {
        "l0": Quantity(
            label="L0",
            meaning=f"subcomponents with an importance above {L0_THRESHOLD}, mean per input",
            headline=False,
        ),
        "alive": Quantity(
            label="alive",
            meaning=f"subcomponents above {ALIVE_THRESHOLD} on at least one input, of all C",
            headline=False,
        ),
        "density": Quantity(
            label="density",
            meaning=f"mean fraction of inputs on which a subcomponent is above {ALIVE_THRESHOLD}",
            headline=False,
        ),
        "never_active": Quantity(
            label="never active",
            meaning="Σ ‖U_c‖ ‖V_c‖ over the subcomponents that are not alive, over ‖W‖",
            format=".3f",
            headline=False,
        ),
    }

    type: Literal["sparsity"] = "sparsity"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _Sparsity(model)


class _Sparsity:
    def __init__(self, model: ComponentModel) -> None:
        self.sites = model.sites
        self.n_rows = dict.fromkeys(model.sites, 0)
        first = next(iter(model.sites.values())).subcomponents.V
        zeros = {
            path: torch.zeros(site.C, dtype=torch.float64, device=first.device)
            for path, site in model.sites.items()
        }
        self.n_nonzero = {path: zero.clone() for path, zero in zeros.items()}
        self.n_active = zeros

    def update(self, ctx: StepContext) -> None:
        for path, g in ctx.ci.lower.items():
            flat = ctx.counted(g)
            self.n_rows[path] += flat.shape[0]
            self.n_nonzero[path] += (flat > L0_THRESHOLD).sum(dim=0)
            self.n_active[path] += (flat > ALIVE_THRESHOLD).sum(dim=0)

    def compute(self) -> dict[str, float]:
        values = {}
        for path, active in self.n_active.items():
            values[f"l0/{path}"] = self.n_nonzero[path].sum().item() / self.n_rows[path]
            values[f"alive/{path}"] = float((active > 0).sum().item())
            values[f"density/{path}"] = active.mean().item() / self.n_rows[path]
        for path, active in self.n_active.items():
            values[f"never_active/{path}"] = size_of(self.sites[path], active == 0)
        return values


@torch.no_grad()
def size_of(site: Site, which: Bool[Tensor, " C"]) -> float:
    """Σ ‖U_c‖ ‖V_c‖ over these subcomponents, over ‖W‖."""
    parts = site.subcomponents
    size = (parts.V.norm(dim=0) * parts.U.norm(dim=1))[which].sum().item()
    whole = site.target_weight.norm().item()
    return size / whole if whole else (math.inf if size else 0.0)


class SiteUsage(NamedTuple):
    """How many subcomponents of a site held-out data uses."""

    C: int
    l0: float
    """mean number of g > 0.01"""
    alive: int
    """g > 0.1 at least once"""
    always_on: int
    """g > 0.1 nearly everywhere"""

    @property
    def problem(self) -> str | None:
        """Why this is no decomposition, and what to change first; None where it may be one."""
        if self.alive == 0:
            return "no subcomponent is ever on; try a smaller coefficient of importance_minimality"
        if self.C > 1 and self.always_on > self.C / 2:
            return (
                f"{self.always_on} of {self.C} subcomponents are on nearly everywhere; try a larger"
                " coefficient of importance_minimality, or more steps"
            )
        return None


@torch.no_grad()
def site_usage(model: ComponentModel, contexts: Iterable[StepContext]) -> dict[str, SiteUsage]:
    """Of every site, over all contexts."""
    seen = _Sparsity(model)
    for ctx in contexts:
        seen.update(ctx)
    usage = {}
    for path, active in seen.n_active.items():
        n = seen.n_rows[path]
        l0 = seen.n_nonzero[path].sum().item() / n
        counts = [int(on.sum()) for on in (active > 0, active >= ALWAYS_ON * n)]
        usage[path] = SiteUsage(len(active), l0, *counts)
    return usage
