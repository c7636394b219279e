"""What the core says to data that does not suit it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from spd.config import RunError, UserError
from spd.engine.prepare import prepare
from spd.metrics import column_match
from spd.optimize import decompose
from spd.problem import Problem
from spd.spd_config import SPDConfig

CONFIG = SPDConfig(
    sites={"0": 3},
    losses={"faithfulness": {"coeff": 1.0}},  # pyright: ignore[reportArgumentType]
    steps=5,
    lr=1e-3,
    n_eval_batches=2,
)


def batches(n: int) -> Iterator[Tensor]:
    return iter([torch.ones(4, 2)] * n)


def problem(*, n_train: int = 5, n_eval: int = 2) -> Problem:
    return Problem(nn.Sequential(nn.Linear(2, 2)), batches(n_train), batches(n_eval))


def test_just_enough_data_will_do() -> None:
    decompose(problem(), CONFIG, quiet=True)


def test_training_data_that_ends_early() -> None:
    with pytest.raises(RunError, match="ended before step 3 of 5"):
        decompose(problem(n_train=3), CONFIG, quiet=True)


@pytest.mark.parametrize("n_eval", [0, 1])
def test_too_little_held_out_data(n_eval: int) -> None:
    with pytest.raises(UserError, match=f"n_eval_batches: 2 are wanted.* ended after {n_eval}"):
        prepare(problem(n_eval=n_eval), CONFIG)


def test_a_column_of_zeros_counts_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    match = column_match(weight, torch.eye(2), torch.eye(2).flip(0))
    assert match.mmcs.tolist() == [0.0, 1.0] and match.ml2r.tolist() == [0.0, 1.0]
