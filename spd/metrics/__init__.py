"""Figures of merit on held-out data: accumulators behind specs, and the formulas they call."""

from collections.abc import Mapping
from typing import Annotated

from spd.config import BY_TYPE, NAME_IS_TYPE
from spd.metrics.column_match import INERT_FRACTION, ColumnMatch, ColumnMatchMetric, column_match
from spd.metrics.held_out import HeldOutLosses
from spd.metrics.ladder import (
    SCOPES,
    SOURCES,
    Ladder,
    LadderMetric,
    climb,
    deepest,
    rung,
    share_recovered,
    some_rows,
)
from spd.metrics.pattern import (
    PATTERN_TOLERANCE,
    PatternErrorsMetric,
    assignment,
    columns_in_use,
    dense_errors,
    identity_errors,
    pattern_errors,
    probe_importances,
)
from spd.metrics.solved import CausesMetric
from spd.metrics.sparsity import (
    ALIVE_THRESHOLD,
    ALWAYS_ON,
    L0_THRESHOLD,
    SiteUsage,
    SparsityMetric,
    site_usage,
)
from spd.metrics.spec import (
    Accumulator,
    Conclusion,
    Metric,
    MetricSpec,
    Published,
    Quantity,
    collect,
    quantity_of,
)

GeneralMetric = (
    ColumnMatchMetric | PatternErrorsMetric | CausesMetric | SparsityMetric | LadderMetric
)
"""The metrics of any decomposition; experiments add their own."""
Metrics = Annotated[Mapping[str, Annotated[GeneralMetric, BY_TYPE]], NAME_IS_TYPE]

__all__ = [
    "ALIVE_THRESHOLD",
    "ALWAYS_ON",
    "Accumulator",
    "CausesMetric",
    "ColumnMatch",
    "ColumnMatchMetric",
    "Conclusion",
    "GeneralMetric",
    "HeldOutLosses",
    "INERT_FRACTION",
    "L0_THRESHOLD",
    "Ladder",
    "LadderMetric",
    "Metric",
    "MetricSpec",
    "Metrics",
    "PATTERN_TOLERANCE",
    "PatternErrorsMetric",
    "Published",
    "Quantity",
    "SCOPES",
    "SOURCES",
    "SiteUsage",
    "SparsityMetric",
    "assignment",
    "climb",
    "collect",
    "column_match",
    "columns_in_use",
    "deepest",
    "dense_errors",
    "identity_errors",
    "pattern_errors",
    "probe_importances",
    "quantity_of",
    "rung",
    "share_recovered",
    "site_usage",
    "some_rows",
]
