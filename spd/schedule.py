"""Learning-rate schedules: pure functions of the step."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from spd.config import BaseConfig


class ScheduleConfig(BaseConfig):
    """How a value moves over a run.

    `cosine` is the published quarter period, cos(π/2 · t/(T−1)); `half_cosine` the usual
    (1 + cos(π t/(T−1)))/2; `linear` 1 − t/T; `exponential` 0.5^(t/half_life).
    """

    type: Literal["constant", "linear", "cosine", "half_cosine", "exponential"] = "constant"
    warmup_frac: float = Field(default=0.0, ge=0.0, lt=1.0)
    half_life: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _half_life_belongs_to_exponential(self) -> Self:
        if (self.type == "exponential") != (self.half_life is not None):
            raise ValueError(
                f"half_life (in steps) goes with type exponential and only with it, got type"
                f" {self.type!r} and half_life {self.half_life!r}"
            )
        return self


def schedule_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor in [0, 1] at `step` of `steps` (published schedules).

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
