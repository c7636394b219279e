"""Values that move over a run: learning rates by step, and any other value by τ = t/(T − 1)."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    model_serializer,
    model_validator,
)
from torch import Tensor

from spd.config import UNSPOKEN, BaseConfig

# --- piecewise curves --------------------------------------------------------------------------------


class Segment(BaseConfig):
    """A part of a curve: from where the one before it ended, `to` a factor that it reaches at τ = `until`.

    `linear` and `cosine` (half a period, flat at both ends) move there; `hold` stays where it is.
    """

    curve: Literal["linear", "cosine", "hold"] = "linear"
    to: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    until: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if (self.curve == "hold") != (self.to is None):
            raise ValueError(
                f"to, the factor that is reached, goes with linear and cosine and only with them, got curve"
                f" {self.curve!r} and to {self.to!r}"
            )
        return self


class ScheduledValue(BaseConfig):
    """`peak` times a piecewise curve on τ = t/(T − 1), which is 0 at the first step and 1 at the last.

    The curve begins at the factor `start`; after the last segment it holds.
    """

    peak: float = Field(ge=0.0, allow_inf_nan=False)
    start: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self.segments)
        return self


_IS_NUMBER, _IS_SCHEDULE = UNSPOKEN


def _kind(raw: Any) -> str:
    return _IS_SCHEDULE if isinstance(raw, Mapping | ScheduledValue) else _IS_NUMBER


def _stays_positive(value: "float | ScheduledValue") -> "float | ScheduledValue":
    factors = _factors(value.start, value.segments) if isinstance(value, ScheduledValue) else [1.0]
    if isinstance(value, ScheduledValue) and not value.peak * min(factors) > 0:
        raise ValueError(
            f"the value must stay above 0 all through the run, and falls to {value.peak * min(factors):g}"
        )
    return value


def _stays_a_share(value: "float | ScheduledValue") -> "float | ScheduledValue":
    if isinstance(value, ScheduledValue):
        largest = value.peak * max(_factors(value.start, value.segments))
    else:
        largest = value
    if not largest <= 1:
        raise ValueError(f"a share of at most 1 is allowed, and the value rises to {largest:g}")
    return value


_BY_KIND = Discriminator(_kind)
_Schedule = Annotated[ScheduledValue, Tag(_IS_SCHEDULE)]
Scheduled = Annotated[
    Annotated[float, Field(ge=0.0, allow_inf_nan=False), Tag(_IS_NUMBER)] | _Schedule, _BY_KIND
]
"""A number, the same all through a run, or a `ScheduledValue`."""
PositiveScheduled = Annotated[
    Annotated[float, Field(gt=0.0, allow_inf_nan=False), Tag(_IS_NUMBER)] | _Schedule,
    _BY_KIND,
    AfterValidator(_stays_positive),
]
"""The same, above 0 all through the run."""


ScheduledShare = Annotated[Scheduled, AfterValidator(_stays_a_share)]
"""The same, between 0 and 1."""


def value_at(value: float | ScheduledValue, progress: Float[Tensor, ""]) -> float | Tensor:
    """The value at τ = `progress`: a 0-d tensor, or the number itself where nothing is scheduled."""
    if isinstance(value, ScheduledValue):
        return value.peak * curve_at(value.start, value.segments, progress)
    return value


def peak_of(value: float | ScheduledValue) -> float:
    """What the curve of a value is multiplied with; a number itself."""
    return value.peak if isinstance(value, ScheduledValue) else value


def curve_at(
    start: float, segments: tuple[Segment, ...], progress: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The factor at τ = `progress`, exact where a segment ends."""
    found = torch.full_like(progress, start)
    begin, levels = 0.0, _factors(start, segments)
    for segment, (before, after) in zip(segments, pairwise(levels), strict=True):
        share = ((progress - begin) / (segment.until - begin)).clamp(0.0, 1.0)
        if segment.curve == "cosine":
            share = (1 - torch.cos(math.pi * share)) / 2
        found = torch.where(progress > begin, (1 - share) * before + share * after, found)
        begin = segment.until
    return found


def _factors(start: float, segments: tuple[Segment, ...]) -> list[float]:
    """Those between segments, the first and the last included."""
    found = [start]
    for segment in segments:
        found.append(found[-1] if segment.to is None else segment.to)
    return found


def _check_order(segments: tuple[Segment, ...]) -> None:
    ends = [0.0, *(segment.until for segment in segments)]
    if not all(earlier < later for earlier, later in pairwise(ends)):
        raise ValueError(
            f"segments: until is {ends[1:]}; numbers up to 1, each above the one before it, are allowed"
        )


# --- learning rates ----------------------------------------------------------------------------------


class ScheduleConfig(BaseConfig):
    """How a learning rate moves over a run.

    `cosine` is the published quarter period, cos(π/2 · t/(T−1)); `half_cosine` the usual
    (1 + cos(π t/(T−1)))/2; `linear` 1 − t/T; `exponential` 0.5^(t/half_life). `piecewise` is the curve of
    a `ScheduledValue`, whose peak the learning rate is.
    """

    type: Literal["constant", "linear", "cosine", "half_cosine", "exponential", "piecewise"] = (
        "constant"
    )
    warmup_frac: float = Field(default=0.0, ge=0.0, lt=1.0)
    half_life: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    start: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """of `piecewise`: the factor at the first step"""
    segments: tuple[Segment, ...] = Field(default=(), max_length=100)
    """of `piecewise`"""

    @model_serializer(mode="wrap")
    def _without_what_is_not_meant(self, dump: Callable[[Any], Any]) -> dict[str, Any]:
        """Other types are written as before there were piecewise ones: by it a trained target is known."""
        kept = dump(self)
        if self.type != "piecewise":
            del kept["start"], kept["segments"]
        return kept

    @model_validator(mode="after")
    def _half_life_belongs_to_exponential(self) -> Self:
        if (self.type == "exponential") != (self.half_life is not None):
            raise ValueError(
                f"half_life (in steps) goes with type exponential and only with it, got type"
                f" {self.type!r} and half_life {self.half_life!r}"
            )
        return self

    @model_validator(mode="after")
    def _segments_belong_to_piecewise(self) -> Self:
        if (self.type == "piecewise") != bool(self.segments):
            raise ValueError(
                f"segments go with type piecewise and only with it, got type {self.type!r} and"
                f" {len(self.segments)} segments"
            )
        if self.type == "piecewise" and self.warmup_frac:
            raise ValueError(
                f"warmup_frac is {self.warmup_frac}, but a piecewise schedule has a segment for its warm-up"
            )
        if self.type != "piecewise" and self.start != 1.0:
            raise ValueError(f"start goes with type piecewise and only with it, got {self.start}")
        _check_order(self.segments)
        return self


def schedule_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor in [0, 1] at `step` of `steps` (published schedules; a piecewise one may go above 1).

    The first W = int(warmup_frac · steps) steps rise as step/W (0 at step 0); afterwards both the step
    and the number of steps count without the warm-up.
    """
    assert 0 <= step < max(steps, 1), f"step {step} lies outside a run of {steps} steps"
    warmup = int(schedule.warmup_frac * steps)
    if step < warmup:
        return step / warmup
    t, total = step - warmup, steps - warmup
    match schedule.type:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - t / total
        case "cosine":
            return math.cos(0.5 * math.pi * t / max(total - 1, 1))
        case "half_cosine":
            return 0.5 * (1.0 + math.cos(math.pi * t / max(total - 1, 1)))
        case "exponential":
            assert schedule.half_life is not None, "validated with the schedule"
            return 0.5 ** (t / schedule.half_life)
        case "piecewise":
            tau = torch.tensor(t / max(total - 1, 1), dtype=torch.float64, device="cpu")
            return curve_at(schedule.start, schedule.segments, tau).item()
