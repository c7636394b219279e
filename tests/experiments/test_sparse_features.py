"""Sparse synthetic features: what is drawn, and that a batch depends on seed and position alone."""

import pytest
import torch

from spd.config import UserError, parse
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures


def batch(config: SparseFeatureConfig, n_features: int, batch_size: int = 20_000) -> torch.Tensor:
    return next(SparseFeatures(config, n_features, batch_size=batch_size, seed=0, stream="test"))


def test_each_feature_is_active_with_its_probability_and_uniform_in_the_range():
    x = batch(SparseFeatureConfig(feature_probability=0.2, value_range=(-1.0, 3.0)), 4)
    torch.testing.assert_close(
        (x != 0).float().mean(dim=0), torch.full((4,), 0.2), atol=0.01, rtol=0
    )
    values = x[x != 0]
    assert -1.0 <= values.min() < -0.99 and 2.99 < values.max() <= 3.0
    assert values.mean() == pytest.approx(1.0, abs=0.05)
    both = ((x[:, 0] != 0) & (x[:, 1] != 0)).float().mean()
    assert both == pytest.approx(0.04, abs=0.01)


def test_exactly_n_active():
    config = SparseFeatureConfig(generation="exactly_n_active", n_active=3)
    x = batch(config, 6)
    assert ((x != 0).sum(dim=-1) == 3).all()
    torch.testing.assert_close(
        (x != 0).float().mean(dim=0), torch.full((6,), 0.5), atol=0.02, rtol=0
    )


def test_a_synced_group_is_active_together_each_member_with_a_value_of_its_own():
    config = SparseFeatureConfig(feature_probability=0.1, synced_inputs=((0, 1, 2), (4, 5)))
    active = (x := batch(config, 7)) != 0
    for group in config.synced_inputs:
        members = active[:, list(group)]
        assert torch.equal(members.any(dim=-1), members.all(dim=-1))
        expected = 1 - 0.9 ** len(group)
        assert members[:, 0].float().mean() == pytest.approx(expected, abs=0.01)
    group = x[active[:, 0]][:, :3]
    assert (group[:, 0] != group[:, 1]).all()
    assert torch.corrcoef(group.T)[0, 1].abs() < 0.05
    assert active[:, 3].float().mean() == pytest.approx(0.1, abs=0.01)


def test_syncing_leaves_what_is_drawn_for_other_inputs_alone():
    plain, synced = (
        batch(SparseFeatureConfig(feature_probability=0.1, synced_inputs=groups), 5)
        for groups in ((), ((0, 1),))
    )
    assert torch.equal(plain[:, 2:], synced[:, 2:])


def test_a_restored_position_continues_the_stream():
    def stream(seed: int = 0, name: str = "a") -> SparseFeatures:
        return SparseFeatures(SparseFeatureConfig(), 5, batch_size=64, seed=seed, stream=name)

    data = stream()
    first, second = next(data), next(data)
    assert not torch.equal(first, second)
    restored = stream()
    restored.load_state_dict({"position": 1})
    assert torch.equal(next(restored), second)
    assert restored.state_dict() == {"position": 2}
    assert not torch.equal(next(stream(seed=1)), first)
    assert not torch.equal(next(stream(name="b")), first)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"feature_probability": 1.5}, "less than or equal to 1"),
        ({"value_range": [1.0, 1.0]}, "low < high"),
        ({"generation": "exactly_n_active"}, "n_active"),
        ({"n_active": 2}, "exactly_n_active"),
        ({"synced_inputs": [[0, 1], [1, 2]]}, "two groups"),
        (
            {"generation": "exactly_n_active", "n_active": 2, "synced_inputs": [[0, 1]]},
            "cannot be combined",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(raw: dict, said: str):
    with pytest.raises(UserError, match=said):
        parse(SparseFeatureConfig, raw, "data")


@pytest.mark.parametrize(
    "config",
    [
        SparseFeatureConfig(generation="exactly_n_active", n_active=6),
        SparseFeatureConfig(synced_inputs=((3, 5),)),
    ],
)
def test_settings_must_fit_the_number_of_features(config: SparseFeatureConfig):
    with pytest.raises(ValueError, match="5|6"):
        SparseFeatures(config, 5, batch_size=4, seed=0, stream="test")
