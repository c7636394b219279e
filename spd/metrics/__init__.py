"""Figures of merit on held-out data: accumulators behind specs, and the formulas they call."""

from collections.abc import Iterable, Mapping
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    runtime_checkable,
)

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict, model_validator
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import (
    BY_TYPE,
    NAME_IS_TYPE,
    BaseConfig,
    UserError,
    nearest,
)
from spd.losses import Loss, StepContext, loss_terms
from spd.metrics.causes import LIMITS, causes_of, dense_shortfall
from spd.problem import (
    Dense,
    Identity,
    Pattern,
    Problem,
)

L0_THRESHOLD = 0.01
ALIVE_THRESHOLD = 0.1
ALWAYS_ON = 0.99
"""share of the rows on which a subcomponent that is always on is active"""
PATTERN_TOLERANCE = 0.1
INERT_FRACTION = 0.1


Value = TypeVar("Value")


@runtime_checkable
class Accumulator(Protocol[Value]):
    """Sees every held-out batch, then gives named results: the protocol of metrics and figures."""

    def update(self, ctx: StepContext) -> None: ...
    def compute(self) -> dict[str, Value]: ...


Metric = Accumulator[float]
"""Keys are `<metric>/<site>`."""


# --- the mathematics -------------------------------------------------------------------------------


class ColumnMatch(NamedTuple):
    """How well single subcomponents reproduce single columns of a weight matrix (paper, section 3.1)."""

    mmcs: Float[Tensor, " features"]
    """for every input feature, the best cosine similarity"""
    ml2r: Float[Tensor, " features"]
    """norm of that subcomponent's column over the norm of the target's"""
    best: Tensor
    """which subcomponent, `[features]`; -1 where none is large enough"""


def column_match(
    weight: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    *,
    min_ratio: float = 0.0,
) -> ColumnMatch:
    """Per feature j the c with the best cosine between U_c V_jc and W[:, j].

    Only subcomponents with ‖U_c V_jc‖ ≥ `min_ratio` · ‖W[:, j]‖ compete; 0 is the paper's definition,
    in which an inert subcomponent can win by chance. Without any competitor, or with W[:, j] = 0,
    feature j counts 0.
    """
    norms = V.abs() * U.norm(dim=1)
    target_norms = weight.norm(dim=1, keepdim=True)
    directions = torch.nn.functional.normalize(U, dim=1)
    cosines = V.sign() * (torch.nn.functional.normalize(weight, dim=1) @ directions.mT)
    eligible = (norms >= min_ratio * target_norms) & (target_norms > 0)
    cosine, best = cosines.masked_fill(~eligible, -torch.inf).max(dim=1)
    ratio = (norms / target_norms).gather(1, best[:, None]).squeeze(1)
    any_eligible = eligible.any(dim=1)
    return ColumnMatch(
        torch.where(any_eligible, cosine, 0.0),
        torch.where(any_eligible, ratio, 0.0),
        torch.where(any_eligible, best, -1),
    )


def assignment(g: Float[Tensor, "probes C"]) -> Tensor:
    """A permutation of all C columns: first the optimal one-to-one partner of every probe, in order.

    The rest follows by falling maximum.
    """
    rows, columns = _partners(g)
    partners = columns[np.argsort(rows)]
    rest = [c for c in g.amax(dim=0).argsort(descending=True).tolist() if c not in set(partners)]
    return torch.tensor([*partners.tolist(), *rest], dtype=torch.long)


def identity_errors(g: Float[Tensor, "probes C"], n: int) -> int:
    """Wrong entries after the best permutation: a diagonal one below 0.9, any other above 0.1."""
    assert g.shape[0] == n, f"{g.shape[0]} probes for a pattern of {n}"
    rows, columns = _partners(g)
    expected = torch.zeros_like(g, dtype=torch.bool)
    expected[torch.as_tensor(rows), torch.as_tensor(columns)] = True
    missing = expected & (g < 1 - PATTERN_TOLERANCE)
    extra = ~expected & (g > PATTERN_TOLERANCE)
    return int(missing.sum() + extra.sum()) + n - len(rows)


def _partners(g: Float[Tensor, "probes C"]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the one-to-one assignment with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # half a second that few runs need

    return linear_sum_assignment(g.numpy(force=True), maximize=True)


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


@torch.no_grad()
def probe_importances(model: ComponentModel, probes: Tensor) -> dict[str, Tensor]:
    """Causal importances on the probes, clipped to [0, 1]: site → `[probes, C]`."""
    ci = model.causal_importances(model.target_forward(probes).site_inputs)
    return {path: g.clamp(0, 1) for path, g in ci.lower.items()}


# --- what a metric says about its figures ----------------------------------------------------------


class Quantity(BaseConfig):
    """How the figures of one name are shown, wherever they are: `<name>/<place>`, or this name alone."""

    label: str
    meaning: str = ""
    """for readers who do not know it: a phrase that goes on after the label and a colon"""
    format: str = ""
    """as Python's `format` takes it; empty: as the size of the value suggests"""
    headline: bool = True
    """stands where there is room for a few figures only, as in a table of many runs"""
    spread: str | None = None
    """the name of what stands behind its ±, in place of a line of its own"""
    published_as: str | None = None
    """the name whose published figure this one is compared with, too"""


class Published(BaseConfig):
    """A published figure and its spread over the features of one run."""

    value: float
    spread: float | None = None


class Conclusion(BaseConfig):
    """What a run comes to, by one of its metrics."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    headline: str
    detail: str = ""
    solved: bool | None = None
    """None: there is no known solution"""


class MetricSpec(BaseConfig):
    """A metric as a configuration names it, by the field `type` of its class."""

    at_end: ClassVar[bool] = False
    """costs too much for every evaluation: it is computed at the end of a run alone"""
    quantities: ClassVar[Mapping[str, Quantity]] = {}
    """what it computes, by name; an exact key (`errors/total`) goes before its name (`errors`)"""

    published: Mapping[str, Published] = {}
    """key → the figure to show beside this run's"""
    expected: Mapping[str, tuple[float, float]] = {}
    """key → lowest and highest mean over the seeds, as `spd-evals` judges it"""

    @model_validator(mode="after")
    def _computes_them(self) -> Self:
        for field, keys in (("published", self.published), ("expected", self.expected)):
            for key in keys if self.quantities else ():
                if quantity_of(key, self.quantities) is None:
                    known = ", ".join(self.quantities)
                    hint = nearest(key.partition("/")[0], self.quantities)
                    raise ValueError(f"{field}: {key!r} is not computed{hint} (computed: {known})")
        for key, (low, high) in self.expected.items():
            if not low <= high:
                raise ValueError(f"expected: {key}: from {low} to {high} is no range")
        return self

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        """A fresh accumulator, or a `UserError` where this metric makes no sense."""
        raise NotImplementedError

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        """What the figures of an evaluation come to; None if this metric does not say."""
        return None


def quantity_of(key: str, quantities: Mapping[str, Quantity]) -> Quantity | None:
    """What a figure is: what its key itself is declared as, else what its name is."""
    return quantities.get(key) or quantities.get(key.partition("/")[0])


# --- the specs -------------------------------------------------------------------------------------


class ColumnMatchMetric(MetricSpec):
    """MMCS and ML2R of one site, by the paper's definition and with inert subcomponents left out."""

    quantities = {
        "mmcs": Quantity(
            label="MMCS",
            meaning="how well the direction of each column of the target's matrix is met by a single"
            " subcomponent (cosine; 1 is perfect), mean over the input features ± their standard"
            " deviation (n − 1); subcomponents shorter than a tenth of the column do not compete",
            spread="mmcs_sd",
        ),
        "ml2r": Quantity(
            label="ML2R",
            meaning="the length of that subcomponent over the column's (1 is perfect)",
            spread="ml2r_sd",
        ),
        "mmcs_paper": Quantity(
            label="MMCS (paper's definition)",
            meaning="the same if subcomponents of any length compete",
            headline=False,
            spread="mmcs_paper_sd",
            published_as="mmcs",
        ),
        "ml2r_paper": Quantity(
            label="ML2R (paper's definition)",
            headline=False,
            spread="ml2r_paper_sd",
            published_as="ml2r",
        ),
    }

    type: Literal["column_match"] = "column_match"
    site: str

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        if self.site not in model.sites:
            raise UserError(
                f"metrics.column_match.site: {self.site!r} is no site"
                f" (sites: {', '.join(model.sites)})"
            )
        return _ColumnMatch(model, self.site)


class _ColumnMatch:
    def __init__(self, model: ComponentModel, path: str) -> None:
        self.model, self.path = model, path

    def update(self, ctx: StepContext) -> None:
        pass

    def compute(self) -> dict[str, float]:
        site = self.model.sites[self.path]
        parts = site.subcomponents
        values = {}
        for suffix, min_ratio in (("", INERT_FRACTION), ("_paper", 0.0)):
            match = column_match(site.target_weight, parts.V, parts.U, min_ratio=min_ratio)
            for name in ("mmcs", "ml2r"):
                per_feature = getattr(match, name)
                values[f"{name}{suffix}/{self.path}"] = per_feature.mean().item()
                spread = per_feature.std().item() if len(per_feature) > 1 else 0.0
                values[f"{name}{suffix}_sd/{self.path}"] = spread
        return values


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
            headline="does not match the known importance pattern:"
            f" {total} error{'' if total == 1 else 's'}",
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


class CausesMetric(MetricSpec):
    """Whether the run is solved: five points by what its subcomponents cause (`spd.metrics.causes`).

    Without a known solution those on mechanisms and weights are left out.
    """

    at_end = True
    quantities = {
        "solved": Quantity(
            label="solved",
            meaning="1 if matrices, mechanisms, weights, adversarial masks and importances on data are all"
            " within the limits that docs/running.md names",
            headline=False,
        ),
        "unfaithful": Quantity(
            label="unfaithful", meaning="‖W − V U‖ over ‖W‖", format=".3f", headline=False
        ),
        "effect_errors": Quantity(
            label="effect errors",
            meaning="deviations of the effects of ablating single subcomponents on the probes from the"
            " known mechanisms",
            headline=False,
        ),
        "wrong_weights": Quantity(
            label="wrong weights",
            meaning="features whose weights are not the target's",
            headline=False,
        ),
        "lost_effect": Quantity(
            label="lost effect",
            meaning="share of the effects that lies where g < 0.5",
            format=".3f",
            headline=False,
        ),
        "idle_importance": Quantity(
            label="idle importance",
            meaning="share of g that lies where ablation does nothing",
            format=".3f",
            headline=False,
        ),
        "never_active": Quantity(
            label="never active",
            meaning="Σ ‖U_c‖ ‖V_c‖ of what is never on, over ‖W‖",
            format=".3f",
            headline=False,
        ),
        "adversarial": Quantity(
            label="adversarial error",
            meaning="mean D under masks that so many steps of gradient ascent found for each row, over that"
            " of ablating everything",
            format=".3f",
            headline=False,
        ),
    }

    type: Literal["causes"] = "causes"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _Causes(model, problem)

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        if "solved" not in values:
            return None
        known = any(key.startswith("effect_errors/") for key in values)
        if values["solved"]:
            how = "by causes" if known else "as far as it is known without a solution"
            return Conclusion(headline=f"solved {how}", solved=True)
        return Conclusion(
            headline="not solved by causes", detail="; ".join(_beyond(values)), solved=False
        )


def _beyond(values: Mapping[str, float]) -> list[str]:
    """Which figures are beyond their limits, in words."""
    found = []
    for key, value in values.items():
        name, _, place = key.partition("/")
        if name in LIMITS and not value <= LIMITS[name]:
            label = CausesMetric.quantities[name].label
            found.append(f"{label} {place} {value:.3g} (at most {LIMITS[name]:g})")
    return found


class _Causes:
    def __init__(self, model: ComponentModel, problem: Problem) -> None:
        self.model, self.problem = model, problem
        self.batches: list[Tensor] = []

    def update(self, ctx: StepContext) -> None:
        self.batches.append(ctx.batch)

    def compute(self) -> dict[str, float]:
        causes = causes_of(self.model, self.problem, self.batches)
        return {**causes.figures(), "solved": float(causes.solved)}


class SparsityMetric(MetricSpec):
    """Per site: L0 (mean number of g > 0.01), alive (g > 0.1 at least once), density (mean of g > 0.1)."""

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
    }

    type: Literal["sparsity"] = "sparsity"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _Sparsity(model)


class _Sparsity:
    def __init__(self, model: ComponentModel) -> None:
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
        return values


class HeldOutLosses:
    """Every loss of the run as a mean over the held-out batches: `loss/<name>`, and their weighted sum."""

    quantities: ClassVar[Mapping[str, Quantity]] = {
        "loss": Quantity(label="held-out", format=".3g", headline=False),
        "loss/total": Quantity(label="held-out total", format=".3g"),
    }

    def __init__(self, losses: Mapping[str, Loss]) -> None:
        self.losses = losses
        self.totals = dict.fromkeys(losses, 0.0)
        self.n_batches = 0

    def update(self, ctx: StepContext) -> None:
        for name, term in loss_terms(self.losses, ctx).items():
            self.totals[name] += term.item()
        self.n_batches += 1

    def compute(self) -> dict[str, float]:
        means = {name: total / self.n_batches for name, total in self.totals.items()}
        weighted = sum(self.losses[name].coeff * mean for name, mean in means.items())
        return {"loss/total": weighted, **{f"loss/{name}": mean for name, mean in means.items()}}


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


def collect(
    makers: Iterable[Accumulator[Value]], contexts: Iterable[StepContext]
) -> dict[str, Value]:
    """Show every context to every accumulator, then put all their results together."""
    makers = list(makers)
    for ctx in contexts:
        for maker in makers:
            maker.update(ctx)
    return {key: value for maker in makers for key, value in maker.compute().items()}


GeneralMetric = ColumnMatchMetric | PatternErrorsMetric | CausesMetric | SparsityMetric
"""The metrics of any decomposition; experiments add their own."""
Metrics = Annotated[Mapping[str, Annotated[GeneralMetric, BY_TYPE]], NAME_IS_TYPE]
