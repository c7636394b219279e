"""The warning where the gradient of the importance functions explodes."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from spd.engine.alarm import NORM, GradientAlarm, alarms_of
from spd.reports.evaluations import result_of
from spd.reports.results import format_result, read_result
from spd.runs.tracking import RunTracker

STEPS = 10_000
TERMS = {"loss/total": 24.0, "l0/a": 1.0}


def history(exploding: float, at: int = 8_000) -> list[dict[str, float]]:
    """Every hundredth step: the median over steps 500 to 1,499 is 0.2, whatever came before and after."""
    norms = {step: 0.2 for step in range(0, STEPS, 100)}
    norms |= {0: 50.0, 400: 0.001, 500: 0.1, 1_400: 0.3, 2_000: 1.9, at: exploding, at + 100: 99.0}
    return [{"step": step, NORM: norm, **TERMS} for step, norm in norms.items()]


def test_it_speaks_once_at_ten_times_the_median():
    (message,) = alarms_of(history(2.5), STEPS)
    assert message.startswith("step 8000: the gradient norm of the importance functions is 2.5,")
    assert "its median of 0.2 over the 1000 steps from step 500 on" in message
    (later,) = alarms_of(history(1.99), STEPS)
    assert later.startswith("step 8100:")
    assert alarms_of([line for line in history(1.99) if line[NORM] < 2], STEPS) == ()


def test_without_gradients_of_importances_there_is_no_median_to_exceed():
    silent = [{**line, NORM: 0.0} for line in history(0.0)]
    assert alarms_of(silent, STEPS) == ()
    assert alarms_of([{"step": 9_000, **TERMS}], STEPS) == ()


def test_steps_of_the_median_are_the_thousand_after_a_twentieth_of_the_run():
    alarm = GradientAlarm(STEPS)
    for step, norm in ((499, 9.0), (500, 1.0), (1_499, 3.0), (1_500, 4.0)):
        alarm.heard(step, {NORM: norm})
    assert alarm.normal == [1.0, 3.0] and alarm.message is None


def test_a_run_says_it_in_its_log_and_not_again_when_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lines = history(2.5)
    for start in (0, 9_000):
        tracker = RunTracker(tmp_path, eval_every=STEPS)
        tracker.started(start, STEPS)
        for line in lines:
            if line["step"] >= start:
                tracker.stepped(int(line["step"]), {k: v for k, v in line.items() if k != "step"})
        tracker.ended()
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and said[0].getMessage().startswith("step 8000: the gradient norm")


def test_the_result_says_it_too(tmp_path: Path):
    config = SimpleNamespace(experiment="tms_5-2", seed=3, steps=STEPS, metrics={})
    last = {"step": STEPS, "eval/loss/total": 1.0}
    result = result_of(config, [*history(2.5), last], 1.0)
    assert result.warnings == alarms_of(history(2.5), STEPS)
    assert f"  warning: {result.warnings[0]}" in format_result(result).splitlines()
    (tmp_path / "result.json").write_text(json.dumps(result.as_json()), encoding="utf-8")
    assert read_result(tmp_path / "result.json").warnings == result.warnings
    calm = result_of(config, [*history(0.2)[:30], last], 1.0)
    assert "warnings" not in calm.as_json() and "warning" not in format_result(calm)
