"""Schedules where they are easily wrong: first and last step, one step, warm-up."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from spd.config import UserError
from spd.schedule import (
    PositiveScheduled,
    ScheduleConfig,
    ScheduledShare,
    ScheduledValue,
    peak_of,
    schedule_factor,
    value_at,
)
from tests.toy import make_config

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


# --- piecewise curves -------------------------------------------------------------------------------


def values(raw: dict[str, Any], T: int) -> list[float]:
    value = ScheduledValue.model_validate(raw)
    progress = [torch.tensor(t / (T - 1), dtype=torch.float64) for t in range(T)]
    return [float(value_at(value, at)) for at in progress]


def test_an_anneal_reaches_its_end_at_the_last_step():
    anneal = {"peak": 2.0, "segments": [{"to": 0.2}]}
    assert values(anneal, 5) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert values(anneal, 5)[-1] == 2.0 * 0.2
    late = [t / 399_999 for t in (399_998, 399_999)]
    before, last = (
        float(
            value_at(ScheduledValue.model_validate(anneal), torch.tensor(at, dtype=torch.float64))
        )
        for at in late
    )
    assert before > last == 2.0 * 0.2


def test_a_learning_rate_falls_to_a_tenth_at_the_last_step():
    found = factors("piecewise", 5, segments=[{"curve": "cosine", "to": 0.1}])
    assert found == pytest.approx([1.0, 0.8682, 0.55, 0.2318, 0.1], abs=5e-5)
    assert factors("piecewise", 1, segments=[{"curve": "cosine", "to": 0.1}]) == [1.0]


def test_segments_one_after_another():
    raw = {
        "peak": 10.0,
        "start": 0.0,
        "segments": [
            {"to": 1.0, "until": 0.2},
            {"curve": "hold", "until": 0.5},
            {"curve": "cosine", "to": 0.4, "until": 0.9},
        ],
    }
    expected = [0.0, 5.0, 10.0, 10.0, 10.0, 10.0]
    expected += [10 - 6 * (1 - math.cos(math.pi * share)) / 2 for share in (0.25, 0.5, 0.75, 1)]
    assert values(raw, 11) == pytest.approx([*expected, 4.0]), "after the last one it holds"
    lr = {key: value for key, value in raw.items() if key != "peak"}
    assert factors("piecewise", 11, **lr) == pytest.approx([v / 10 for v in [*expected, 4.0]])


def test_a_number_is_itself():
    assert value_at(0.3, torch.tensor(0.5)) == 0.3 and peak_of(0.3) == 0.3
    assert peak_of(ScheduledValue.model_validate({"peak": 2, "segments": [{"to": 0}]})) == 2.0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"segments": [{"curve": "hold", "to": 0.5}]}, "to, the factor that is reached, goes with"),
        ({"segments": [{"curve": "cosine"}]}, "to, the factor that is reached, goes with"),
        ({"segments": [{"to": 0, "until": 0.5}, {"to": 1, "until": 0.5}]}, "each above the one"),
        ({"segments": []}, "at least 1 item"),
        ({"segments": [{"to": 0}]}, "must stay above 0 all through the run, and falls to 0"),
        ({"segments": [{"to": -1}]}, "greater than or equal to 0"),
        (0.0, "greater than 0"),
    ],
)
def test_what_is_no_curve(raw: Any, message: str):
    raw = {"peak": 1.0, **raw} if isinstance(raw, dict) else raw
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(PositiveScheduled).validate_python(raw)


@pytest.mark.parametrize("raw", [1.5, {"peak": 0.9, "segments": [{"to": 2.0}]}])
def test_a_share_is_at_most_one(raw: Any):
    with pytest.raises(ValidationError, match="a share of at most 1 is allowed"):
        TypeAdapter(ScheduledShare).validate_python(raw)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "linear", "segments": [{"to": 0.5}]}, "segments go with type piecewise and only"),
        ({"type": "piecewise"}, "segments go with type piecewise and only with it"),
        ({"type": "cosine", "start": 0.5}, "start goes with type piecewise and only with it"),
        (
            {"type": "piecewise", "segments": [{"to": 0.5}], "warmup_frac": 0.1},
            "a piecewise schedule has a segment for its warm-up",
        ),
    ],
)
def test_what_goes_with_piecewise(options: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig.model_validate(options)


def test_other_schedules_are_written_as_before_there_were_piecewise_ones():
    """A trained target is known by its configuration."""
    dump = ScheduleConfig(type="cosine").model_dump(mode="json")
    assert dump == {"type": "cosine", "warmup_frac": 0.0, "half_life": None}
    own = ScheduleConfig.model_validate({"type": "piecewise", "segments": [{"to": 0.1}]})
    assert ScheduleConfig.model_validate(own.model_dump(mode="json")) == own


def test_a_message_names_the_place_and_nothing_else():
    with pytest.raises(UserError) as found:
        make_config({"recon": {"coeff": -1}})
    text = "test: losses.recon.coeff: input should be greater than or equal to 0, got -1"
    assert str(found.value) == text
    with pytest.raises(UserError) as found:
        make_config({"recon": {"coeff": {"peak": 1.0, "segments": [{"too": 1}]}}})
    assert "losses.recon.coeff.segments.0.too: unknown key; did you mean 'to'?" in str(found.value)
    assert make_config({"recon": {"coeff": "1e-3"}}).losses["recon"].coeff == 1e-3
