"""Which figures the runs of a configuration log: what can be the metric of a sweep."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from spd.config import nearest
from spd.masks import MASK_KINDS, rounded_name
from spd.metrics import (
    SCOPES,
    ColumnMatchMetric,
    LadderMetric,
    MetricSpec,
    UpstreamPatternMetric,
    UsageMetric,
    rung,
)
from spd.metrics.baselines import COMPARED
from spd.metrics.baselines import NAMES as BASELINES
from spd.metrics.ladder import PERMUTED, STEPS
from spd.spd_config import SPDConfig

ALONE = ("matches", "solved", "scored", "ladder_l0", "ladder_C", "ladder_rows")
"""figures that have no place; all others of the package's metrics are `<name>/<place>`"""
ANY = "?*"
"""a place that is not known before the run"""
GROUPS = ("components", "importances")


class Logged(NamedTuple):
    """Names of figures, or patterns of them (`fnmatch`)."""

    always: list[str]
    """in every line of training, or in every evaluation"""
    at_the_end: list[str]
    """in the lines of training, or in the last evaluation"""

    def ends_with(self, name: str) -> bool:
        """Whether the figure has a value when a run has finished."""
        return _fits(name, self.at_the_end)

    def only_at_end(self, name: str) -> bool:
        """Whether no evaluation but the last is known to have the figure."""
        return self.ends_with(name) and not _fits(name, self.always)

    def said_of(self, name: str) -> str:
        """What is wrong with a figure that has no value in the end, and what is allowed."""
        known = [one.replace(ANY, "…") for one in dict.fromkeys(self.at_the_end)]
        when = " by the last evaluation" if _fits(name, self.always) else ""
        hint = nearest(name, [one for one in known if "…" not in one])
        return f"{name!r} is not logged{when}{hint} (allowed: {', '.join(known)})"


def logged(config: SPDConfig) -> Logged:
    """By runs of this configuration; sites are given by their patterns."""
    sites, specs = list(config.sites), list(config.metrics.values())
    losses = [f"loss/{term}" for term in ("total", *config.losses)]
    training = [*losses, *(f"l0/{site}" for site in sites), "lr"]
    training += [f"grad_norm/{group}" for group in GROUPS]
    for group in GROUPS:
        own = getattr(config, group)
        if own.lr is not None or own.lr_schedule is not None:
            training.append(f"lr/{group}")
    usual = [name for spec in specs for name in _figures(spec, sites, at_end=False)]
    last = [name for spec in specs for name in _figures(spec, sites, at_end=True)]
    always, at_the_end = ([f"eval/{name}" for name in (*losses, *own)] for own in (usual, last))
    return Logged([*training, *always], [*training, *at_the_end])


def _fits(name: str, known: Iterable[str]) -> bool:
    return any(name == one or fnmatchcase(name, one) for one in known)


def _figures(spec: MetricSpec, sites: Sequence[str], *, at_end: bool) -> Iterator[str]:
    """What a metric computes in the last evaluation, or is known to compute in every one before it."""
    own = type(spec).__module__.startswith("spd.")
    differs = type(spec).build_at_end is not MetricSpec.build_at_end
    if not at_end and (spec.at_end or (differs and not own)):
        return
    if isinstance(spec, LadderMetric):
        yield from _of_ladder(spec, spec.steps_at_end if at_end else STEPS, at_end=at_end)
        return
    for name in _names(spec):
        alone = "/" in name or name in ALONE
        if alone or not own:
            yield name
        if not alone or not own:
            yield from (f"{name}/{place}" for place in _places(spec, sites))


def _names(spec: MetricSpec) -> list[str]:
    spreads = [quantity.spread for quantity in spec.quantities.values() if quantity.spread]
    names = [*spec.quantities, *spreads]
    if isinstance(spec, UsageMetric):
        names = [name for name in names if not name.startswith("l0_above_")]
        names += [f"l0_above_{threshold:g}" for threshold in spec.thresholds]
    return names


def _places(spec: MetricSpec, sites: Sequence[str]) -> list[str]:
    if not type(spec).__module__.startswith("spd.metrics."):
        return [ANY]  # an experiment's own figures
    if isinstance(spec, ColumnMatchMetric):
        return [spec.site]
    return [*sites, *["total"] * isinstance(spec, UsageMetric | UpstreamPatternMetric)]


def _of_ladder(spec: LadderMetric, steps: Sequence[int], *, at_end: bool) -> Iterator[str]:
    masks = [*MASK_KINDS, PERMUTED, *["random"] * spec.random, *map(rounded_name, spec.thresholds)]
    rungs = [*masks, *(rung(n, scope) for scope in SCOPES for n in steps)]
    yield from (f"ladder/{name}" for name in rungs)
    yield from (f"ladder_recovered/{name}" for name in rungs if name != "ablated")
    yield from (f"ladder_share/{rung(max(steps), scope)}" for scope in SCOPES)
    if at_end:
        beside = [*COMPARED, *(rung(n, scope) for scope in SCOPES for n in STEPS)]
        yield from (f"ladder_{name}/{own}" for name in BASELINES for own in beside)
    yield from (name for name in ALONE if name in spec.quantities)
