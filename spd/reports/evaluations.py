"""What the figures of an evaluation come to, by the metrics that computed them; pure functions on data."""

from collections.abc import Mapping, Sequence
from typing import Any

from spd.engine.alarm import alarms_of
from spd.metrics import HeldOutLosses, MetricSpec
from spd.quantities import Quantity, quantity_of
from spd.reports.results import Evaluation, Result, ResultRow, Starts, last_evaluation


def result_of(
    config: Any,
    history: Sequence[Mapping[str, float]],
    seconds: float,
    starts: Starts | None = None,
) -> Result:
    """What result.json holds of a run of this configuration."""
    evaluation = evaluation_of(last_evaluation(history), config.metrics)
    return Result(
        experiment=config.experiment,
        seed=config.seed,
        steps=config.steps,
        seconds=round(seconds, 1),
        starts=() if starts is None else starts.starts,
        warnings=alarms_of(history, config.steps),
        **dict(evaluation),
    )


def described(metrics: Mapping[str, MetricSpec]) -> dict[str, Quantity]:
    """What the metrics of a run compute, by name."""
    specs = [spec.quantities for spec in metrics.values()]
    return {
        name: q
        for quantities in (HeldOutLosses.quantities, *specs)
        for name, q in quantities.items()
    }


def evaluation_of(values: Mapping[str, float], metrics: Mapping[str, MetricSpec]) -> Evaluation:
    """One row for every figure, but for those that stand behind the ± of another."""
    quantities = described(metrics)
    published = {key: p for spec in metrics.values() for key, p in spec.published.items()}
    rows, behind = [], set()
    for key, value in values.items():
        name, slash, place = key.partition("/")
        quantity = quantity_of(key, quantities) or Quantity(label=name)
        spread = f"{quantity.spread}{slash}{place}"
        behind.add(spread)
        reference = published.get(key) or published.get(f"{quantity.published_as}{slash}{place}")
        rows.append(
            ResultRow(
                metric=quantity.label if key in quantities else f"{quantity.label} {place}".strip(),
                key=key,
                value=value,
                spread=values.get(spread),
                published=reference.value if reference else None,
                published_spread=reference.spread if reference else None,
            )
        )
    found = [end for spec in metrics.values() if (end := spec.conclusion(values)) is not None]
    found.sort(key=lambda conclusion: conclusion.solved is None)  # a verdict goes first
    conclusion = found[0] if found else None
    return Evaluation(
        solved=conclusion.solved if conclusion else None,
        conclusion=conclusion,
        rows=tuple(row for row in rows if row.key not in behind),
        expected={key: ends for spec in metrics.values() for key, ends in spec.expected.items()},
        quantities=quantities,
    )
