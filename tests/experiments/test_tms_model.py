"""The toy model of superposition: names, formula, initialisation, tie."""

import pytest
import torch

from spd.config import UserError, parse
from spd.experiments.tms.model import (
    TMSModel,
    TMSModelConfig,
    empty_model,
    initial_weights,
    with_tie,
)


def draw(config: TMSModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return initial_weights(config, generator=torch.Generator().manual_seed(seed))


def test_parameter_names_are_those_that_patterns_name():
    names = [name for name, _ in TMSModel(5, 2, n_hidden_layers=2).named_parameters()]
    assert names == [
        "linear1.weight",
        "hidden_layers.0.weight",
        "hidden_layers.1.weight",
        "linear2.weight",
        "linear2.bias",
    ]


@pytest.mark.parametrize("n_hidden_layers", [0, 1, 2])
def test_forward_is_the_formula(n_hidden_layers: int):
    config = TMSModelConfig(
        n_features=5, n_hidden=3, n_hidden_layers=n_hidden_layers, tied_weights=False
    )
    weights = draw(config)
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    x = torch.randn(7, 5)
    hidden = x @ weights["linear1.weight"].T
    for i in range(n_hidden_layers):
        hidden = hidden @ weights[f"hidden_layers.{i}.weight"].T
    expected = torch.relu(hidden @ weights["linear2.weight"].T + weights["linear2.bias"])
    torch.testing.assert_close(model(x), expected)


def test_weights_start_uniform_as_in_nn_linear():
    weights = draw(TMSModelConfig(n_features=400, n_hidden=100, tied_weights=False))
    for name, d_in in (("linear1.weight", 400), ("linear2.weight", 100), ("linear2.bias", 100)):
        bound = d_in**-0.5
        assert 0.98 * bound < weights[name].abs().max() <= bound
        assert weights[name].std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_bias_starts_at_zero_if_asked_for():
    config = TMSModelConfig(n_features=5, n_hidden=2, init_bias_to_zero=True)
    assert not draw(config)["linear2.bias"].any()


def test_the_bias_option_leaves_the_other_draws_alone():
    random, zero = (
        draw(TMSModelConfig(n_features=5, n_hidden=2, init_bias_to_zero=flag))
        for flag in (False, True)
    )
    assert torch.equal(random["linear1.weight"], zero["linear1.weight"])


def test_hidden_layers_are_the_identity_or_standard_normal():
    identity = TMSModelConfig(n_features=4, n_hidden=50, n_hidden_layers=2)
    for i in range(2):
        assert torch.equal(draw(identity)[f"hidden_layers.{i}.weight"], torch.eye(50))
    random = identity.model_copy(update={"hidden_init": "random"})
    first, second = (draw(random)[f"hidden_layers.{i}.weight"] for i in range(2))
    assert first.mean().abs() < 0.1
    assert first.std() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(first, second)


def test_draws_depend_on_the_generator_alone():
    config = TMSModelConfig(n_features=5, n_hidden=2)
    before = torch.get_rng_state()
    first, same, other = draw(config, 1), draw(config, 1), draw(config, 2)
    empty_model(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["linear1.weight"], same["linear1.weight"])
    assert not torch.equal(first["linear1.weight"], other["linear1.weight"])


def test_the_tie_is_a_view_and_a_free_matrix_is_left_alone():
    tied = draw(TMSModelConfig(n_features=5, n_hidden=2))
    assert "linear2.weight" not in tied
    both = with_tie(tied)
    tied["linear1.weight"][0, 3] = 9.0
    assert both["linear2.weight"][3, 0] == 9.0

    free = draw(TMSModelConfig(n_features=5, n_hidden=2, tied_weights=False))
    assert with_tie(free)["linear2.weight"] is free["linear2.weight"]


def test_a_random_hidden_layer_needs_a_hidden_layer():
    raw = {"n_features": 5, "n_hidden": 2, "hidden_init": "random"}
    with pytest.raises(UserError, match="n_hidden_layers"):
        parse(TMSModelConfig, raw, "model")
