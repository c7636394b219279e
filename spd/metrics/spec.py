"""What a metric is: an accumulator behind a spec that says how its figures are shown."""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol, Self, TypeVar, runtime_checkable

from pydantic import model_validator

from spd.component_model import ComponentModel
from spd.config import BaseConfig, nearest
from spd.losses import StepContext
from spd.problem import Problem
from spd.quantities import Conclusion, Quantity, quantity_of

Value = TypeVar("Value")


@runtime_checkable
class Accumulator(Protocol[Value]):
    """Sees every held-out batch, then gives named results: the protocol of metrics and figures."""

    def update(self, ctx: StepContext) -> None: ...
    def compute(self) -> dict[str, Value]: ...


Metric = Accumulator[float]
"""Keys are `<metric>/<site>`."""


class Published(BaseConfig):
    """A published figure and its spread over the features of one run."""

    value: float
    spread: float | None = None


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

    def build_at_end(self, model: ComponentModel, problem: Problem) -> Metric:
        """The accumulator of a run's last evaluation, which may take longer than the others."""
        return self.build(model, problem)

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        """What the figures of an evaluation come to; None if this metric does not say."""
        return None


def collect(
    makers: Iterable[Accumulator[Value]], contexts: Iterable[StepContext]
) -> dict[str, Value]:
    """Show every context to every accumulator, then put all their results together."""
    makers = list(makers)
    for ctx in contexts:
        for maker in makers:
            maker.update(ctx)
    return {key: value for maker in makers for key, value in maker.compute().items()}
