"""How many subcomponents are on above several thresholds, and how many are alive by two definitions."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.losses import StepContext
from spd.masks import Thresholds
from spd.metrics.sparsity import ALIVE_THRESHOLD
from spd.metrics.spec import Metric, MetricSpec, Quantity
from spd.problem import Problem

MEAN_ALIVE = 1e-6
"""a mean importance above which a subcomponent is alive, by the definition of the paper"""


def l0_above(g: Float[Tensor, "rows C"], threshold: float) -> float:
    """Mean over the rows of the number of g > τ."""
    return (g > threshold).double().sum(dim=-1).mean().item()


class UsageMetric(MetricSpec):
    """Per site and in all: L0 above each threshold, and alive by both published definitions.

    `l0_above_τ`: mean number of g > τ. `alive_by_mean`: mean g > 1e-6 over the held-out data;
    `alive_by_largest`: g > 0.1 at least once.
    """

    quantities = {
        "alive_by_mean": Quantity(
            label="alive by mean",
            meaning=f"subcomponents with a mean importance above {MEAN_ALIVE}",
            headline=False,
        ),
        "alive_by_largest": Quantity(
            label="alive by largest",
            meaning=f"subcomponents above {ALIVE_THRESHOLD} on at least one input",
            headline=False,
        ),
        **{
            f"l0_above_{threshold:g}": Quantity(
                label=f"L0 above {threshold:g}",
                meaning=f"subcomponents with an importance above {threshold:g}, mean per input",
                headline=False,
            )
            for threshold in (0.0, 0.01, 0.1, 0.5)
        },
    }

    type: Literal["usage"] = "usage"
    thresholds: Thresholds = (0.0, 0.1, 0.5)
    """of the L0"""

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _Usage(model, self.thresholds)


class _Usage:
    def __init__(self, model: ComponentModel, thresholds: tuple[float, ...]) -> None:
        self.thresholds = thresholds
        zeros = {
            path: torch.zeros(site.C, dtype=torch.float64, device=site.subcomponents.V.device)
            for path, site in model.sites.items()
        }
        self.sums, self.largest = zeros, {path: zero.clone() for path, zero in zeros.items()}
        self.counts = {path: [0.0] * len(thresholds) for path in zeros}
        self.n_rows = dict.fromkeys(zeros, 0)

    def update(self, ctx: StepContext) -> None:
        for path, g in ctx.ci.lower.items():
            rows = ctx.counted(g).detach().double().clamp(0, 1)
            self.n_rows[path] += len(rows)
            self.sums[path] += rows.sum(dim=0)
            self.largest[path] = torch.maximum(self.largest[path], rows.amax(dim=0))
            found = [l0_above(rows, threshold) * len(rows) for threshold in self.thresholds]
            self.counts[path] = [a + b for a, b in zip(self.counts[path], found, strict=True)]

    def compute(self) -> dict[str, float]:
        names = [f"l0_above_{threshold:g}" for threshold in self.thresholds]
        found: dict[str, dict[str, float]] = {}
        for path, n in self.n_rows.items():
            alive = (self.sums[path] / n > MEAN_ALIVE, self.largest[path] > ALIVE_THRESHOLD)
            found[path] = {
                name: count / n for name, count in zip(names, self.counts[path], strict=True)
            }
            kinds = ("alive_by_mean", "alive_by_largest")
            found[path] |= {
                name: float(on.sum().item()) for name, on in zip(kinds, alive, strict=True)
            }
        return {**_by_key(found), **_totals(found)}


def _by_key(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name}/{path}": v for path, own in found.items() for name, v in own.items()}


def _totals(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(found.values()))
    return {f"{name}/total": sum(own[name] for own in found.values()) for name in names}
