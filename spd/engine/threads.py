"""How many of torch's threads a step is given: a light one gets a single thread."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spd.engine.cost import nominal_seconds

LIGHT_SECONDS = 0.02
"""Nominal, of an eager forward pass. A second thread gains little below (`tms_5-2` has 0.007), and 30 to
40 % at 0.08 (`resid_mlp1`); threads of two processes wait for each other at the end of each operation."""


@contextmanager
def as_before() -> Iterator[None]:
    """Gives back, at the end, the number of threads that there was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_for_a_light_step(function: Callable[..., Any], *args: Any) -> None:
    """One thread from here on, if `function(*args)` is light and `OMP_NUM_THREADS` says nothing else.

    Decided by nominal cost, since the number of threads changes sums by rounding: a run has the same
    numbers whatever else the machine is doing.
    """
    if torch.get_num_threads() == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    if nominal_seconds(function, *args) < LIGHT_SECONDS:
        torch.set_num_threads(1)
