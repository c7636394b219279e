"""How many threads a step gets: told by its nominal cost and the environment, by nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spd.engine.prepare import prepare
from spd.engine.step import JointStep
from spd.engine.threads import as_before, one_for_a_light_step
from spd.optimize import Silent, run_steps
from spd.problem import Problem
from tests.toy import ALL_LOSSES, MLP, make_config


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with as_before():
        torch.set_num_threads(2)
        yield


def square(x: Tensor) -> Tensor:
    return x @ x


LIGHT = torch.ones(10, 10)
HEAVY = torch.ones(1500, 1500)


@pytest.mark.usefixtures("two_threads")
def test_a_light_step_gets_one_thread_a_heavy_one_all():
    one_for_a_light_step(square, HEAVY)
    assert torch.get_num_threads() == 2
    one_for_a_light_step(square, LIGHT)
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("two_threads")
def test_what_the_user_says_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    one_for_a_light_step(square, LIGHT)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_run_of_light_steps_has_one_thread_and_gives_the_others_back(
    monkeypatch: pytest.MonkeyPatch,
):
    seen = []
    original = JointStep.__call__

    def step(self: JointStep, inputs: Any) -> Any:
        result = original(self, inputs)
        seen.append(torch.get_num_threads())
        return result

    monkeypatch.setattr(JointStep, "__call__", step)
    batches = [torch.rand(8, 4)] * 4
    run_steps(
        prepare(Problem(MLP(), batches, batches), make_config(ALL_LOSSES, steps=2)),
        Silent(),
    )
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
