"""What is searched: a sweep in W&B's own schema, its points, and whether an experiment takes them."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from spd.config import (
    BaseConfig,
    UserError,
    full_key,
    nearest,
    parse,
    read_yaml,
)

if TYPE_CHECKING:
    from spd.sweeps.logged import Logged

Point = dict[str, Any]
"""swept key → value"""
MAX_CHECKED = 10_000
"""points of a grid"""
Distribution = Literal[
    "constant",
    "categorical",
    "categorical_w_probabilities",
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "q_log_uniform",
    "q_log_uniform_values",
    "inv_log_uniform",
    "inv_log_uniform_values",
    "normal",
    "q_normal",
    "log_normal",
    "q_log_normal",
    "beta",
    "q_beta",
]
OF_EXPONENTS = ("log_uniform", "q_log_uniform", "inv_log_uniform")
"""distributions whose min and max are those of the logarithm"""
BETWEEN = (math.sqrt(5) - 1) / 2
"""where between the ends of an interval a value is tried"""
NEEDS_BOUNDS = ("int_uniform", "uniform", "q_uniform", "log_uniform", "log_uniform_values")


class Parameter(BaseConfig):
    """The values of one setting."""

    value: Any = None
    values: list[Any] | None = Field(default=None, min_length=1)
    probabilities: list[float] | None = None
    distribution: Distribution | None = None
    min: float | int | None = None
    max: float | int | None = None
    mu: float | None = None
    sigma: float | None = None
    q: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in ("value", "values") if name in self.model_fields_set]
        if self.min is not None or self.max is not None or self.distribution in NEEDS_BOUNDS:
            ways.append("min and max")
            if self.min is None or self.max is None:
                raise ValueError("both min and max are needed")
            if not self.min < self.max:
                raise ValueError(f"min {self.min} is not below max {self.max}")
        if len(ways) > 1:
            raise ValueError(f"one of them is allowed, not {' with '.join(ways)}")
        if not ways and self.distribution is None:
            raise ValueError("needs value, values, min and max, or a distribution")
        if self.values is not None and len(_distinct(self.values)) < len(self.values):
            raise ValueError(f"a value stands twice in {self.values}")
        return self

    @property
    def kind(self) -> str:
        """Its distribution, as W&B infers it where none is named."""
        if self.distribution is not None:
            return self.distribution
        if self.values is not None:
            return "categorical"
        if self.min is None:
            return "constant"
        whole = isinstance(self.min, int) and isinstance(self.max, int)
        return "int_uniform" if whole else "uniform"


class Metric(BaseConfig):
    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None


class EarlyTermination(BaseConfig):
    """Pruning of hopeless trials; an iteration is one logged value of the metric."""

    type: Literal["hyperband"]
    min_iter: int | None = Field(default=None, ge=1)
    max_iter: int | None = Field(default=None, ge=1)
    s: int | None = Field(default=None, ge=1)
    eta: float = Field(default=3, gt=1)
    strict: bool = False

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        if (self.min_iter is None) == (self.max_iter is None):
            raise ValueError("one of min_iter and max_iter is needed")
        if self.max_iter is not None and self.s is None:
            raise ValueError("max_iter needs s")
        return self

    @property
    def first(self) -> int:
        """The iteration at which trials are compared first."""
        if self.min_iter is not None:
            return self.min_iter
        assert self.max_iter is not None and self.s is not None, "validated"
        return max(1, math.floor(self.max_iter / self.eta**self.s))


class Definition(BaseConfig):
    """A sweep, in the keys that W&B documents; `program` and `command` are added by `spd-sweep`."""

    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: dict[str, Parameter] = Field(min_length=1)
    early_terminate: EarlyTermination | None = None
    run_cap: int | None = Field(default=None, ge=1)
    name: str | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None

    @model_validator(mode="after")
    def _can_be_listed(self) -> Self:
        for key, parameter in self.parameters.items():
            if self.method == "grid" and parameter.kind not in (
                *("constant", "categorical", "int_uniform"),
            ):
                raise ValueError(
                    f"parameters.{key}: a grid takes value, values, or whole min and max,"
                    f" not {parameter.kind}"
                )
        return self

    def points(self) -> Iterator[Point]:
        """Of a grid, the last key changing fastest."""
        assert self.method == "grid", "only a grid can be listed"
        flat = self.parameters
        for values in itertools.product(*(choices(parameter) for parameter in flat.values())):
            yield dict(zip(flat, values, strict=True))

    @property
    def n_points(self) -> int | None:
        """How many there are to run; None where there is no end."""
        if self.method != "grid":
            return self.run_cap
        n = math.prod(len(choices(parameter)) for parameter in self.parameters.values())
        return min(n, self.run_cap or n)


def choices(parameter: Parameter) -> list[Any]:
    """The values of a setting that can be listed."""
    if parameter.values is not None:
        return parameter.values
    if parameter.kind == "int_uniform":
        assert parameter.min is not None and parameter.max is not None, "validated"
        return list(range(int(parameter.min), int(parameter.max) + 1))
    return [parameter.value]


def read_definition(path: Path) -> Definition:
    raw = read_yaml(path)
    ours = [key for key in ("program", "command") if key in raw]
    if ours:
        raise UserError(f"{path}: {ours[0]}: is set by spd-sweep")
    parameters = raw.get("parameters")
    if isinstance(parameters, dict):
        pairs = list(_flat("", parameters))
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise UserError(
                f"{path}: parameters.{twice[0]}: stands twice, with dots and below another key"
                " (allowed: one of them)"
            )
        raw["parameters"] = dict(pairs)
    return parse(Definition, raw, str(path))


def overrides_of(point: Mapping[str, Any]) -> list[str]:
    """`key=value`, as an experiment's command line takes it."""
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def check(definition: Definition, experiment: str, fixed: Sequence[str], source: str) -> None:
    """`UserError` unless the experiment takes every key and every value, and logs the metric."""
    from spd.runs.cli import checked_config
    from spd.sweeps.logged import logged

    base = checked_config(experiment, fixed)
    flat = definition.parameters
    set_already = {full_key(type(base), override.partition("=")[0].strip()) for override in fixed}
    known = sorted(_dotted("", base.model_dump(mode="json")))
    full = {key: full_key(type(base), key) for key in flat}
    if "seeds" in set_already or "seeds" in flat:
        raise UserError(f"{source}: seeds: every point of a sweep is one run; sweep over seed")
    for key in flat:
        if full[key] in set_already or key in ("device", "experiment"):
            raise UserError(f"{source}: parameters.{key}: is set for all trials already")
        if list(full.values()).count(full[key]) > 1:
            raise UserError(f"{source}: parameters.{key}: stands twice, also as {full[key]}")
        if full[key] not in known:
            raise UserError(
                f"{source}: parameters.{key}: {experiment} has no such setting"
                f"{nearest(key, known)} (allowed: {', '.join(known)})"
            )
    for point in _to_check(definition):
        try:
            checked_config(experiment, [*fixed, *overrides_of(point)])
        except UserError as error:
            raise UserError(f"{source}: parameters: {error}") from None
    _check_metric(definition, logged(base), source)


def only_at_end(definition: Definition, experiment: str, fixed: Sequence[str]) -> bool:
    """Whether its runs are known to log the metric in their last evaluation alone."""
    from spd.runs.cli import checked_config
    from spd.sweeps.logged import logged

    return logged(checked_config(experiment, fixed)).only_at_end(definition.metric.name)


def _check_metric(definition: Definition, figures: "Logged", source: str) -> None:
    """`UserError` unless the metric has a value in the end, and where trials may end early, before it."""
    name = definition.metric.name
    if not figures.ends_with(name):
        raise UserError(f"{source}: metric.name: {figures.said_of(name)}")
    if definition.early_terminate is not None and figures.only_at_end(name):
        raise UserError(
            f"{source}: early_terminate: {name!r} is logged by the last evaluation alone, when there is"
            " nothing left to end early; allowed with a figure that every evaluation has"
        )


def _to_check(definition: Definition) -> Iterator[Point]:
    """All points of a grid; else some values of every interval, and each that is listed."""
    if definition.method == "grid":
        yield from itertools.islice(definition.points(), MAX_CHECKED)
        return
    tried = {key: _tried(parameter) for key, parameter in definition.parameters.items()}
    first = {key: values[0] for key, values in tried.items() if values}
    yield first
    for key, values in tried.items():
        for value in values:
            yield {**first, key: value}


def _tried(parameter: Parameter) -> list[Any]:
    """Both ends of an interval and a value between them that is whole by chance only; what is listed.

    Nothing of what has no ends, as a normal distribution: the experiment's own value stands for it.
    """
    kind, q = parameter.kind, parameter.q or 1.0
    if kind in ("constant", "categorical"):
        return choices(parameter)
    if kind == "int_uniform":
        return [choices(parameter)[index] for index in (0, -1)]
    if parameter.min is not None and parameter.max is not None:
        low, high = parameter.min, parameter.max
        values = [low, low + BETWEEN * (high - low), high]
    elif kind in ("beta", "q_beta"):
        values = [1 - BETWEEN, BETWEEN]
    else:
        return []
    if kind in OF_EXPONENTS:
        sign = -1 if kind == "inv_log_uniform" else 1
        values = [math.exp(sign * value) for value in values]
    if kind == "q_uniform":
        return [values[0], min(values[0] + q, values[-1]), values[-1]]
    return [q * round(value / q) for value in values] if kind.startswith("q_") else values


def _flat(place: str, parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings below others, as W&B nests them, under their dotted keys."""
    for key, parameter in parameters.items():
        dotted = f"{place}.{key}" if place else str(key)
        if isinstance(parameter, dict) and isinstance(parameter.get("parameters"), dict):
            yield from _flat(dotted, parameter["parameters"])
        else:
            yield dotted, parameter


def _dotted(place: str, node: Mapping[str, Any]) -> Iterator[str]:
    for key, value in node.items():
        dotted = f"{place}.{key}" if place else str(key)
        yield dotted
        if isinstance(value, Mapping):
            yield from _dotted(dotted, value)


def _distinct(values: Sequence[Any]) -> set[str]:
    return {json.dumps(value, sort_keys=True) for value in values}
