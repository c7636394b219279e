"""The residual MLP and its labels, by hand-computed values."""

import math

import pytest
import torch

from spd.config import UserError, parse
from spd.experiments.resid_mlp.model import (
    LabelConfig,
    ResidMLP,
    ResidMLPModelConfig,
    initial_weights,
    label_coefficients,
    make_labels,
)

SMALL = {"n_features": 2, "d_embed": 3, "d_mlp": 2, "n_layers": 2}


def sizes(**changes: object) -> ResidMLPModelConfig:
    return parse(ResidMLPModelConfig, {**SMALL, **changes}, "test")


def drawn(config: ResidMLPModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return initial_weights(config, generator=torch.Generator().manual_seed(seed))


def test_two_layers_by_hand():
    model = ResidMLP(sizes(n_features=1, d_embed=2, d_mlp=1))
    model.load_state_dict(
        {
            "W_E": torch.tensor([[1.0, 2.0]]),
            "W_U": torch.tensor([[1.0], [1.0]]),
            "layers.0.mlp_in.weight": torch.tensor([[1.0, 1.0]]),
            "layers.0.mlp_out.weight": torch.tensor([[1.0], [-2.0]]),
            "layers.1.mlp_in.weight": torch.tensor([[1.0, 2.0]]),
            "layers.1.mlp_out.weight": torch.tensor([[10.0], [0.0]]),
        }
    )
    # x = 1: stream (1, 2); layer 0 reads 3, adds (3, -6): (4, -4); layer 1 reads -4: nothing
    # x = -1: stream (-1, -2); layer 0 reads -3: nothing; layer 1 reads -5: nothing
    out = model(torch.tensor([[1.0], [-1.0]]))
    assert out.tolist() == [[0.0], [-3.0]]
    assert model.residual(torch.tensor([[1.0]])).tolist() == [[4.0, -4.0]]


def test_biases_and_gelu_by_hand():
    model = ResidMLP(
        sizes(n_features=1, d_embed=1, d_mlp=1, n_layers=1, act_fn="gelu").model_copy(
            update={"in_bias": True, "out_bias": True}
        )
    )
    weights = {"W_E": [[1.0]], "W_U": [[2.0]], "layers.0.mlp_in.weight": [[3.0]]}
    weights |= {"layers.0.mlp_in.bias": [0.5], "layers.0.mlp_out.weight": [[4.0]]}
    weights["layers.0.mlp_out.bias"] = [-1.0]
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    before = 3 * 0.2 + 0.5
    gelu = before * 0.5 * (1 + math.erf(before / math.sqrt(2)))
    expected = 2 * (0.2 + 4 * gelu - 1)
    assert model(torch.tensor([[0.2]])).item() == pytest.approx(expected, rel=1e-6)


def test_names_and_shapes_of_the_weights():
    config = sizes(in_bias=True, out_bias=True)
    expected = {
        "W_E": (2, 3),
        "W_U": (3, 2),
        **{f"layers.{i}.mlp_in.weight": (2, 3) for i in range(2)},
        **{f"layers.{i}.mlp_in.bias": (2,) for i in range(2)},
        **{f"layers.{i}.mlp_out.weight": (3, 2) for i in range(2)},
        **{f"layers.{i}.mlp_out.bias": (3,) for i in range(2)},
    }
    for state in (ResidMLP(config).state_dict(), drawn(config)):
        assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert not [name for name in ResidMLP(sizes()).state_dict() if "bias" in name]


def test_fixed_embeddings_have_unit_rows_and_are_tied():
    weights = drawn(sizes(n_features=50, d_embed=200))
    torch.testing.assert_close(weights["W_E"].norm(dim=1), torch.ones(50))
    assert torch.equal(weights["W_U"], weights["W_E"].T)
    assert (
        weights["W_U"].untyped_storage().data_ptr() != weights["W_E"].untyped_storage().data_ptr()
    )


def test_identity_embeddings():
    weights = drawn(sizes(d_embed=2, embedding="identity"))
    assert torch.equal(weights["W_E"], torch.eye(2)) and torch.equal(weights["W_U"], torch.eye(2))
    with pytest.raises(UserError, match="needs n_features = d_embed, got 2 and 3"):
        sizes(embedding="identity")


def test_trained_embeddings_and_blocks_start_at_their_scales():
    weights = drawn(sizes(n_features=50, d_embed=400, d_mlp=100, embedding="trained"))
    assert weights["W_E"].std().item() == pytest.approx(50**-0.5, rel=0.03)
    assert weights["W_U"].std().item() == pytest.approx(400**-0.5, rel=0.03)
    for layer in range(2):
        for name, d_in in (("mlp_in", 400), ("mlp_out", 100)):
            weight = weights[f"layers.{layer}.{name}.weight"]
            assert weight.abs().max().item() == pytest.approx(d_in**-0.5, rel=0.01)
            assert weight.std().item() == pytest.approx((3 * d_in) ** -0.5, rel=0.03)


@pytest.mark.parametrize(
    ("labels", "act_fn", "expected"),
    [
        ({}, "relu", [1.0, -1.0]),
        ({"type": "abs"}, "relu", [0.5, 1.0]),
        ({}, "gelu", [0.5 + 0.5 * 0.691462, -1.0 - 0.158655]),
    ],
)
def test_labels_by_hand(labels: dict[str, str], act_fn: str, expected: list[float]):
    function = make_labels(parse(LabelConfig, labels, "test"), sizes(act_fn=act_fn))
    assert function(torch.tensor([0.5, -1.0])).tolist() == pytest.approx(expected, abs=1e-5)


def test_label_coefficients_come_from_their_own_seed():
    torch.manual_seed(0)
    c = label_coefficients(LabelConfig(coeff_seed=3), 1000)
    torch.manual_seed(1)
    assert torch.equal(c, label_coefficients(LabelConfig(coeff_seed=3), 1000))
    assert not torch.equal(c, label_coefficients(LabelConfig(coeff_seed=4), 1000))
    assert (
        1 <= c.min() < 1.01 and 1.99 < c.max() <= 2 and c.mean().item() == pytest.approx(1.5, 0.05)
    )
    assert label_coefficients(LabelConfig(), 3).tolist() == [1, 1, 1]

    x = torch.tensor([0.5, -0.5])
    c = label_coefficients(LabelConfig(coeff_seed=3), 2)
    plain = make_labels(LabelConfig(coeff_seed=3), sizes())(x)
    torch.testing.assert_close(plain, torch.stack([0.5 + 0.5 * c[0], -x[0]]))
    absolute = make_labels(LabelConfig(type="abs", coeff_seed=3), sizes())(x)
    torch.testing.assert_close(absolute, 0.5 * c)
