"""The numbers by which a record of a run is found stale."""

from typing import get_args

import pytest
import torch
from torch import Tensor

import spd.importance.sigmoids
import spd.losses
from spd.engine import fingerprint
from spd.engine.fingerprint import compute_fingerprint, is_stale
from spd.losses import Loss


def test_the_same_every_time_and_nothing_else_is_drawn() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = compute_fingerprint()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert compute_fingerprint() == first
    assert not is_stale(first, first)
    assert all(abs(value) > 1e-3 for value in first.values()), "rounding would decide otherwise"


def test_every_loss_is_in_it() -> None:
    names = {spec.model_fields["type"].default for spec in get_args(Loss)}
    found = {key.split("/")[2] for key in compute_fingerprint() if "/loss/" in key}
    assert found == names | {"total"}


def test_rounding_is_not_stale_and_a_missing_number_is() -> None:
    first = compute_fingerprint()
    assert not is_stale({key: value * (1 + 1e-5) for key, value in first.items()}, first)
    key = next(iter(first))
    assert is_stale(first | {key: first[key] * 1.001}, first)
    assert is_stale(first, {k: v for k, v in first.items() if k != key})
    assert not is_stale({key: first[key]}, first), "of a loss that came later nothing was stored"
    assert is_stale({}, first) and is_stale(None, first)


def test_a_changed_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compute_fingerprint()
    true_mean = spd.losses.importance_minimality
    monkeypatch.setattr(spd.losses, "importance_minimality", lambda *args: 1.01 * true_mean(*args))
    assert is_stale(first, compute_fingerprint())


def test_a_slope_at_exactly_zero_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of zeros has logits of exactly 0 at first, where `x > 0` and `x ≥ 0` differ."""
    first = compute_fingerprint()

    def with_slope_one_at_zero(x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, 0.0).clamp(max=1.0) + 0.01 * (x - 1).clamp(min=0)

    monkeypatch.setattr(spd.importance.sigmoids, "upper_leaky_hard_sigmoid", with_slope_one_at_zero)
    changed = compute_fingerprint()
    gradients = [key for key in first if "/gradient/" in key and key.startswith("tied/")]
    assert any(is_stale({key: first[key]}, changed) for key in gradients)
    assert not is_stale({"tied/loss/total": first["tied/loss/total"]}, changed)


def test_every_number_counts() -> None:
    first = compute_fingerprint()
    for key, value in first.items():
        assert is_stale(first | {key: value + 2 * fingerprint.RELATIVE_TOLERANCE * value}, first)
