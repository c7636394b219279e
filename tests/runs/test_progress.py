"""How far a run is: a bar on a terminal, plain lines elsewhere, nothing of it in the numbers."""

import re

from tests.run_fixtures import (
    Command,
    command_fixture,
    finished_run,
    log_lines,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

STEPS = 300
LONGER = (f"steps={STEPS}", "eval_every=1000", "save_every=1000", "log_every=1", "compile=false")
LOSS_KEYS = {"loss/total", "loss/stochastic_recon", "l0/linear1", "l0/linear2"}
KEYS = {"step", *LOSS_KEYS, "grad_norm/components", "grad_norm/importances", "lr"}
EVAL_KEYS = {"step", "eval/loss/total", "eval/loss/stochastic_recon"}


def test_a_bar_with_loss_l0_and_time_left_on_a_terminal(command: Command):
    done = command.tms(*LONGER, terminal=True)
    assert done.status == 0
    frames = [frame for frame in done.err.split("\r") if "/300 [" in frame]
    assert frames[0].strip().startswith("0%|")
    bar = re.compile(
        r" *(\d+)%\|.*\| (\d+)/300 \[\d\d:\d\d<\d\d:\d\d, .*L0=(\d+\.\d\d), loss=\d\.\d\de-\d\d\]"
    )
    filled = [match for frame in frames if (match := bar.search(frame))]
    assert filled, done.err
    steps = [int(match[2]) for match in filled]
    assert steps == sorted(set(steps)) and 0 < steps[-1] <= STEPS
    assert all(0 <= float(match[3]) <= 12 for match in filled)
    assert "s left" not in done.err
    assert "run directory: " in done.err and "300/300" not in done.out


def test_plain_lines_elsewhere(command: Command):
    done = finished_run(command, *LONGER)
    lines = [line for line in done.err.splitlines() if line.startswith("step ")]
    form = re.compile(r"step (\d+)/300  loss \d\.\d{3}e[+-]\d\d  L0 \d+\.\d\d(  \d+ s left)?")
    matches = [form.fullmatch(line) for line in lines]
    assert all(matches) and len(lines) <= 10, done.err
    steps = [int(match[1]) for match in matches if match]
    assert steps[0] == 1 and steps[-1] == STEPS and steps == sorted(set(steps))
    assert lines[-1].endswith(" 0 s left") and "|" not in done.err and "\r" not in done.err


def test_the_numbers_hold_nothing_of_it(command: Command):
    finished_run(command)
    keys = [set(line) for line in log_lines(command.only_run())]
    assert [k for k in keys if k not in (KEYS, EVAL_KEYS)] == []
    assert keys.count(KEYS) == 6 and keys.count(EVAL_KEYS) == 3
