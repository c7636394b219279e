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
    climb,
    deepest,
    rung,
    share_recovered,
    some_rows,
)
from spd.metrics.ladder_metric import LadderMetric
from spd.metrics.pattern import (
    PATTERN_TOLERANCE,
    PatternErrorsMetric,
    UpstreamPatternMetric,
    assignment,
    columns_in_use,
    dense_errors,
    identity_errors,
    pattern_errors,
    probe_importances,
    upstream_dense_errors,
    upstream_errors,
    upstream_identity_errors,
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
from spd.metrics.usage import MEAN_ALIVE, UsageMetric, l0_above

GeneralMetric = (
    ColumnMatchMetric
    | PatternErrorsMetric
    | UpstreamPatternMetric
    | CausesMetric
    | SparsityMetric
    | UsageMetric
    | LadderMetric
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
    "MEAN_ALIVE",
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
    "UpstreamPatternMetric",
    "UsageMetric",
    "assignment",
    "climb",
    "collect",
    "column_match",
    "columns_in_use",
    "deepest",
    "dense_errors",
    "identity_errors",
    "l0_above",
    "pattern_errors",
    "probe_importances",
    "quantity_of",
    "rung",
    "share_recovered",
    "site_usage",
    "some_rows",
    "upstream_dense_errors",
    "upstream_errors",
    "upstream_identity_errors",
]
