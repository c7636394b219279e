"""The nominal cost of a computation: counted by hand, and the same under any load."""

import pytest
import torch
from torch import Tensor

from spd.engine.cost import LAPTOP, nominal_seconds


def test_operations_numbers_and_products_are_counted():
    def function(x: Tensor) -> Tensor:
        return (x @ x.mT).relu()

    operation, written, product = LAPTOP
    expected = (
        3 * operation + 2 * 9 * written + 2 * 3 * 5 * 3 * product
    )  # the transpose writes nothing
    assert nominal_seconds(function, torch.ones(3, 5)) == pytest.approx(expected, rel=1e-12)


def test_nothing_is_timed(monkeypatch: pytest.MonkeyPatch):
    def clock() -> float:
        raise AssertionError("a clock was read")

    for name in ("perf_counter", "monotonic", "time", "thread_time", "process_time"):
        monkeypatch.setattr(f"time.{name}", clock)
    x = torch.rand(4, 4)
    assert nominal_seconds(torch.matmul, x, x) == nominal_seconds(torch.matmul, x + 1, x)
