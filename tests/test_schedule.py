"""Schedules where they are easily wrong: first and last step, one step, warm-up."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from spd.config import UserError
from spd.schedule import ScheduleConfig, schedule_factor

TYPES = ("constant", "linear", "cosine", "half_cosine", "exponential")


def schedule(kind: str, **options: Any) -> ScheduleConfig:
    half_life = {"half_life": 10.0} if kind == "exponential" else {}
    return ScheduleConfig.model_validate({"type": kind, **half_life, **options})


def factors(kind: str, steps: int, **options: Any) -> list[float]:
    return [schedule_factor(schedule(kind, **options), step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", TYPES)
def test_every_schedule_starts_at_one_also_when_there_is_but_one_step(kind: str):
    assert factors(kind, 1) == [1.0]
    assert factors(kind, 100)[0] == 1.0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("warmup_frac", [0.0, 0.01, 0.5, 0.999])
def test_factors_stay_between_zero_and_one(kind: str, steps: int, warmup_frac: float):
    assert all(0 <= factor <= 1 for factor in factors(kind, steps, warmup_frac=warmup_frac))


def test_formulas():
    steps = 11
    for step in range(steps):
        expected = {
            "constant": 1.0,
            "linear": 1 - step / 11,
            "cosine": math.cos(math.pi / 2 * step / 10),
            "half_cosine": (1 + math.cos(math.pi * step / 10)) / 2,
            "exponential": 0.5 ** (step / 10),
        }
        for kind, value in expected.items():
            assert schedule_factor(schedule(kind), step, steps) == pytest.approx(value)


def test_the_published_cosine_is_a_quarter_period():
    assert factors("cosine", 101)[50] == pytest.approx(math.sqrt(0.5))
    assert factors("half_cosine", 101)[50] == pytest.approx(0.5)
    for kind in ("cosine", "half_cosine"):
        assert factors(kind, 101)[-1] == pytest.approx(0, abs=1e-12)
    assert factors("linear", 101)[-1] == pytest.approx(1 / 101)


@pytest.mark.parametrize("kind", TYPES)
def test_after_the_warm_up_steps_count_as_in_a_shorter_run(kind: str):
    warm = factors(kind, 50, warmup_frac=0.2)
    assert warm[:10] == [step / 10 for step in range(10)]
    assert warm[10:] == factors(kind, 40)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_the_warm_up_is_rounded_down(steps: int, warmup: int):
    found = factors("constant", steps, warmup_frac=0.25)
    assert found == [step / warmup for step in range(warmup)] + [1.0] * (steps - warmup)


def test_half_life_goes_with_exponential_alone():
    for options in ({"type": "exponential"}, {"type": "linear", "half_life": 3.0}):
        with pytest.raises(ValidationError, match="half_life"):
            ScheduleConfig.model_validate(options)


@pytest.mark.parametrize("warmup_frac", [-0.1, 1.0])
def test_a_warm_up_must_leave_something_of_the_run(warmup_frac: float):
    with pytest.raises(UserError, match="ScheduleConfig: warmup_frac"):
        ScheduleConfig(warmup_frac=warmup_frac)


@pytest.mark.parametrize("step", [-1, 5, 6])
def test_steps_outside_the_run_are_refused(step: int):
    with pytest.raises(AssertionError, match=f"step {step}"):
        schedule_factor(ScheduleConfig(), step, 5)
