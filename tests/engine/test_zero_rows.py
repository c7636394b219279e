"""Rows without input are left out of the step, and nothing changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.engine.prepare import prepare
from spd.engine.zero_rows import (
    Rows,
    ZeroRows,
    highest_share,
    merge_zero_rows,
    room_for,
)
from spd.problem import Problem
from tests.toy import ALL_LOSSES, TiedMLP, decompose, make_config, make_objective

PROGRESS = torch.tensor(0.5)


class Deep(nn.Module):
    """Two matrices without biases in front of one with a bias: zeros reach every site."""

    def __init__(self, *, early_bias: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, bias=early_bias)
        self.mid = nn.Linear(6, 5, bias=False)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mid(self.first(x).relu()))


def sparse(batch_size: int, *, share: float = 0.2, n: int = 4, seed: int = 0) -> Tensor:
    """About `share` of the rows have an input."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch_size, n, generator=generator) + 0.1
    return values * (torch.rand(batch_size, 1, generator=generator) < share)


def endless(batch: Tensor) -> Iterator[Tensor]:
    while True:
        yield batch


def deep_model(**options: Any) -> ComponentModel:
    torch.manual_seed(0)
    return decompose(Deep(**options), {"first": 7, "mid": 5, "last": 9})


def zero_rows(model: ComponentModel, batch: Tensor, *, independent: bool = True) -> ZeroRows:
    nothing = iter(())
    problem = Problem(model.target, nothing, nothing, independent_rows=independent)
    return ZeroRows(model, problem, [batch])


def gradients(model: ComponentModel, total: Tensor) -> list[Tensor]:
    parameters = model.subcomponent_parameters()
    return list(torch.autograd.grad(total, list(parameters.values())))


def test_every_term_and_gradient_is_that_of_the_whole_batch():
    model = deep_model()
    objective = make_objective(model, ALL_LOSSES)
    batch = sparse(1000)
    rows = zero_rows(model, batch).merge(batch)
    assert rows.weights is not None and len(rows.batch) < 0.4 * len(batch)
    noise = objective.draw_noise(rows.batch, stream="train", seed=0, step=0)
    has_input = batch.any(dim=1)
    n = int(has_input.sum())
    whole = {}
    for (
        key,
        uniform,
    ) in noise.items():  # zero rows have noise of their own, of which nothing depends
        whole[key] = torch.rand(len(batch), uniform.shape[1])
        whole[key][has_input] = uniform[:n]

    total, logged, _ = objective(batch, PROGRESS, whole)
    expected = gradients(model, total)
    total, merged, _ = objective(rows.batch, PROGRESS, noise, rows.weights)
    found = gradients(model, total)

    assert merged.keys() == logged.keys()
    for name, value in logged.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-8, msg=name)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in expected)


def test_the_weights_count_every_row_once():
    batch = sparse(640)
    n = int(batch.any(dim=1).sum())
    kept, weights, slots = merge_zero_rows(batch, 256)
    assert weights is not None and weights.mean().item() == pytest.approx(1.0)
    assert isinstance(kept, Tensor) and slots is not None
    assert torch.equal(batch[slots], kept) and len(slots.unique()) == 256
    counts = weights * (640 / 256)
    assert torch.equal(kept[:n], batch[batch.any(dim=1)]) and not kept[n:].any()
    torch.testing.assert_close(counts[:n], torch.ones(n))
    assert counts[n:].sum().item() == pytest.approx(640 - n, rel=1e-5)


def test_a_batch_with_more_input_than_expected_stays_whole():
    model = deep_model()
    rows = zero_rows(model, sparse(1000)).merge(full := sparse(1000, share=1.0))
    assert rows == Rows(full)


def test_nothing_is_left_out_where_zeros_do_not_stay_zeros():
    biased = deep_model(early_bias=True)
    assert zero_rows(biased, sparse(1000)).share is None, "zeros do not stay zeros"
    model = deep_model()
    assert zero_rows(model, sparse(1000), independent=False).share is None
    tokens = torch.zeros(8, 3, dtype=torch.long)
    assert zero_rows(model, tokens).share is None
    assert zero_rows(model, torch.zeros(8, 3, 4)).share is None, "rows of rows"
    assert zero_rows(model, sparse(1000)).share == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("share", "n_counted", "batch_size", "room"),
    [
        *[(0.226, 16384, 4096, 1152), (0.226, 1024, 4096, 1344), (0.634, 16384, 2048, 1472)],
        *[(0.0, 16384, 1000, 64), (0.0, 100, 1000, 256), (1.0, 16384, 1000, None)],
        *[(0.9, 1024, 64, None)],
    ],
)
def test_room(share: float, n_counted: int, batch_size: int, room: int | None):
    """In steps of 64, more where few rows were counted; None where little is saved."""
    assert room_for(share, n_counted, batch_size) == room


def test_the_highest_share():
    """The estimate lies four standard deviations, of that share, below it."""
    for share, n in ((0.2, 100), (0.0, 64), (0.9, 1000)):
        most = highest_share(share, n)
        assert most - share == pytest.approx(4 * (most * (1 - most) / n) ** 0.5)
    assert highest_share(1.0, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("share", "n_counted", "batch_size"),
    [
        *[(0.226, 16384, 4096), (0.226, 512, 4096), (0.0, 16384, 4096), (0.0, 64, 512)],
        *[(0.001, 1000, 1000), (0.634, 2048, 2048), (0.5, 16384, 256)],
    ],
)
def test_there_is_room_for_ten_thousand_batches_at_the_worst_of_the_estimate(
    share: float, n_counted: int, batch_size: int
):
    """As many rows with input as a batch can have while the estimate is four deviations too low."""
    room = room_for(share, n_counted, batch_size)
    assert room is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        most = torch.full((10_000,), highest_share(share, n_counted))
        n_with_input = torch.binomial(torch.tensor(float(batch_size)).expand(10_000), most)
    assert n_with_input.max() < room


def test_a_run_uses_it():
    """The step of a tied toy model sees fewer rows than the batch has, and the same every time."""
    seen: list[int] = []

    class Counting(TiedMLP):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    target = Counting()
    batch = sparse(1000, n=5)
    problem = Problem(target, endless(batch), endless(batch), independent_rows=True)
    losses = {"stochastic_recon": {"coeff": 1.0}}
    prepared = prepare(problem, make_config(losses, sites={"enc": 6, "dec": 6}))
    rows = prepared.zero_rows.merge(batch)
    noise = prepared.objective.draw_noise(rows.batch, stream="train", seed=0, step=0)
    seen.clear()
    prepared.objective(rows.batch, PROGRESS, noise, rows.weights)
    assert set(seen) == {len(rows.batch)} and len(rows.batch) == room_for(
        prepared.zero_rows.share or 0.0, 4000, 1000
    )
