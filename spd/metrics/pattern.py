"""Errors against the known importance pattern on probes: the published criterion."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError, counted
from spd.losses import StepContext
from spd.metrics.causes import dense_shortfall, partners
from spd.metrics.spec import Conclusion, Metric, MetricSpec, Quantity
from spd.problem import Dense, Identity, Pattern, Problem

PATTERN_TOLERANCE = 0.1
UPSTREAM_TOLERANCES = (0.1, 0.2)
LARGE = 500
"""probes above which the published criterion takes pairs greedily instead of the best assignment"""


def assignment(g: Float[Tensor, "probes C"]) -> Tensor:
    """A permutation of all C columns: first the optimal one-to-one partner of every probe, in order.

    The rest follows by falling maximum.
    """
    rows, columns = partners(g)
    own = columns[np.argsort(rows)]
    rest = [c for c in g.amax(dim=0).argsort(descending=True).tolist() if c not in set(own)]
    return torch.tensor([*own.tolist(), *rest], dtype=torch.long)


def identity_errors(g: Float[Tensor, "probes C"], n: int) -> int:
    """Wrong entries after the best permutation: a diagonal one below 0.9, any other above 0.1."""
    assert g.shape[0] == n, f"{g.shape[0]} probes for a pattern of {n}"
    rows, columns = partners(g)
    expected = torch.zeros_like(g, dtype=torch.bool)
    expected[torch.as_tensor(rows), torch.as_tensor(columns)] = True
    missing = expected & (g < 1 - PATTERN_TOLERANCE)
    extra = ~expected & (g > PATTERN_TOLERANCE)
    return int(missing.sum() + extra.sum()) + n - len(rows)


def columns_in_use(g: Float[Tensor, "probes C"]) -> Bool[Tensor, " C"]:
    return (g > PATTERN_TOLERANCE).any(dim=0)


def dense_errors(
    g: Float[Tensor, "probes C"],
    pattern: Dense,
    *,
    weight: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
) -> int:
    """Errors against "k subcomponents are used, and they make up the matrix as it is read downstream".

    |columns in use − k|, plus columns in use that reach 0.9 on no probe, plus 1 if they leave more
    than a tenth of P W, plus 1 if the k-th singular value of their sum is below a tenth of P W's.
    """
    used = columns_in_use(g)
    weak = used & (g < 1 - PATTERN_TOLERANCE).all(dim=0)
    return int(weak.sum()) + dense_shortfall(used, pattern, weight=weight, V=V, U=U)


def pattern_errors(
    pattern: Pattern, g: Float[Tensor, "probes C"], model: ComponentModel, path: str
) -> int:
    """Errors of one site's importances on the probes against its known pattern; 0 is solved."""
    match pattern:
        case Identity(n):
            return identity_errors(g, n)
        case Dense():
            site = model.sites[path]
            parts = site.subcomponents
            return dense_errors(g, pattern, weight=site.target_weight, V=parts.V, U=parts.U)


def upstream_identity_errors(g: Float[Tensor, "probes C"], tolerance: float) -> int:
    """Columns permuted so that the diagonal sum is largest; off it entries above the tolerance, and on it
    entries below 1 − tolerance. Every probe owes a diagonal entry, also where there is no column for it.
    """
    rows, columns = _greedy(g) if len(g) > LARGE else partners(g)
    diagonal = torch.zeros_like(g, dtype=torch.bool)
    diagonal[torch.as_tensor(rows), torch.as_tensor(columns)] = True
    extra = (~diagonal & (g > tolerance)).sum()
    right = (diagonal & (g >= 1 - tolerance)).sum()
    return int(extra) + len(g) - int(right)


def _greedy(g: Float[Tensor, "probes C"]) -> tuple[np.ndarray, np.ndarray]:
    """The largest entry first, then the largest of what is left without its row and column."""
    values = g.detach().double().numpy(force=True).copy()
    rows, columns = [], []
    for _ in range(min(values.shape)):
        row, column = np.unravel_index(values.argmax(), values.shape)
        rows.append(row)
        columns.append(column)
        values[row], values[:, column] = -np.inf, -np.inf
    return np.array(rows), np.array(columns)


def upstream_dense_errors(g: Float[Tensor, "probes C"], k: int, tolerance: float) -> int:
    """Columns by total mass: each of the first k owes one entry of at least 1 − tolerance, and in the
    others every entry above the tolerance is an error. Nothing is asked of the weights.
    """
    ordered = g[:, g.sum(dim=0).argsort(descending=True, stable=True)]
    first, others = ordered[:, :k], ordered[:, k:]
    weak = k - int((first >= 1 - tolerance).any(dim=0).sum())
    return weak + int((others > tolerance).sum())


def upstream_errors(pattern: Pattern, g: Float[Tensor, "probes C"], tolerance: float) -> int:
    """Errors of one site by the criterion of the method's authors; 0 is solved by it."""
    match pattern:
        case Identity():
            return upstream_identity_errors(g, tolerance)
        case Dense(k):
            return upstream_dense_errors(g, k, tolerance)


@torch.no_grad()
def probe_importances(model: ComponentModel, probes: Tensor) -> dict[str, Tensor]:
    """Causal importances on the probes, clipped to [0, 1]: site → `[probes, C]`."""
    ci = model.causal_importances(model.target_forward(probes).site_inputs)
    return {path: g.clamp(0, 1) for path, g in ci.lower.items()}


class PatternErrorsMetric(MetricSpec):
    """Errors against the known importance pattern, per site and in all; `matches` is 1 at no error.

    The published criterion, and a weak one: it looks at importances on one input per feature. Whether a
    run is solved, `CausesMetric` says.
    """

    quantities = {
        "errors": Quantity(
            label="errors",
            meaning="deviations from the known importance pattern",
            headline=False,
        ),
        "errors/total": Quantity(label="errors total"),
        "matches": Quantity(
            label="matches the pattern", meaning="1 if there is no error", headline=False
        ),
    }

    type: Literal["pattern_errors"] = "pattern_errors"

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_runs(cls, raw: Any) -> Any:
        """What is `matches` was called `solved` in runs made before there was a verdict by causes."""
        expected = raw.get("expected") if isinstance(raw, dict) else None
        if not isinstance(expected, dict) or "solved" not in expected:
            return raw
        renamed = {("matches" if key == "solved" else key): ends for key, ends in expected.items()}
        return {**raw, "expected": renamed}

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        if problem.probes is None or not problem.solution.keys() & model.sites.keys():
            raise UserError(
                "metrics.pattern_errors: these sites have no known solution; remove the metric"
            )
        return _PatternErrors(model, problem.probes, problem.solution)

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        if "matches" not in values:
            return None
        if values["matches"]:
            return Conclusion(headline="every site matches the known importance pattern")
        errors = {
            key.removeprefix("errors/"): int(value)
            for key, value in values.items()
            if key.startswith("errors/")
        }
        total = errors.pop("total")
        return Conclusion(
            headline=f"does not match the known importance pattern: {counted(total, 'error')}",
            detail="errors: " + ", ".join(f"{p} {n}" for p, n in errors.items()),
        )


class _PatternErrors:
    def __init__(
        self, model: ComponentModel, probes: Tensor, solution: Mapping[str, Pattern]
    ) -> None:
        self.model, self.probes, self.solution = model, probes, solution

    def update(self, ctx: StepContext) -> None:
        pass

    def compute(self) -> dict[str, float]:
        importances = probe_importances(self.model, self.probes)
        errors = {
            path: pattern_errors(self.solution[path], g, self.model, path)
            for path, g in importances.items()
            if path in self.solution
        }
        total = sum(errors.values())
        values = {f"errors/{path}": float(n) for path, n in errors.items()}
        return {**values, "errors/total": float(total), "matches": float(total == 0)}


class UpstreamPatternMetric(MetricSpec):
    """Errors against the known pattern as the method's authors count them, at the tolerances 0.1 and 0.2.

    For comparison with published figures: nothing is asked of the weights, so that a matrix whose
    subcomponents write nothing can have no error. `CausesMetric` is the criterion here.
    """

    quantities = {
        "upstream_errors_0.1": Quantity(
            label="errors, published criterion, 0.1",
            meaning="deviations of importances on the probes from the known pattern, as the authors count",
            headline=False,
        ),
        "upstream_errors_0.2": Quantity(
            label="errors, published criterion, 0.2",
            meaning="the same with a tolerance of 0.2",
            headline=False,
        ),
    }

    type: Literal["upstream_pattern"] = "upstream_pattern"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        if problem.probes is None or not problem.solution.keys() & model.sites.keys():
            raise UserError(
                "metrics.upstream_pattern: these sites have no known solution; remove the metric"
            )
        return _UpstreamErrors(model, problem.probes, problem.solution)


class _UpstreamErrors(_PatternErrors):
    def compute(self) -> dict[str, float]:
        importances = probe_importances(self.model, self.probes)
        values = {}
        for tolerance in UPSTREAM_TOLERANCES:
            name = f"upstream_errors_{tolerance}"
            errors = {
                path: upstream_errors(self.solution[path], g, tolerance)
                for path, g in importances.items()
                if path in self.solution
            }
            values |= {f"{name}/{path}": float(n) for path, n in errors.items()}
            values[f"{name}/total"] = float(sum(errors.values()))
        return values
