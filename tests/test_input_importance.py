"""Importance functions of a site's whole input vector, against loops over single values."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import UserError, parse
from spd.importance import (
    ImportanceConfig,
    SharedMLPImportance,
    SharedMLPImportanceConfig,
    VectorMLPImportance,
    VectorMLPImportanceConfig,
    WholeImportanceSpec,
    lower_leaky_hard_sigmoid,
    rms_normalized,
    upper_leaky_hard_sigmoid,
)
from spd.spd_config import SPDConfig
from tests import naive
from tests.toy import ALL_LOSSES, MLP, MLP_SITES, TokenModel, make_config, terms_of
from tests.toy import make_objective as objective_of

SHARED = SharedMLPImportanceConfig(hidden_widths=(6, 3))
VECTOR = VectorMLPImportanceConfig(n_hidden=2)
BOTH = pytest.mark.parametrize("config", [SHARED, VECTOR], ids=["shared", "vector"])


def made(config: ImportanceConfig, C: int = 5, d_in: int = 4) -> Any:
    """In float64, with biases that are not zero."""
    assert not isinstance(config, WholeImportanceSpec)
    function = config.build(C, d_in, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(1)
    for name, parameter in function.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return function


def one_neuron(x: list[float], weights: Tensor, bias: Tensor) -> float:
    return sum(a * w for a, w in zip(x, weights.tolist(), strict=True)) + bias.item()


def gelu(z: float) -> float:
    return naive.gelu(torch.tensor(z, dtype=torch.float64)).item()


def test_the_shared_mlp_layer_by_layer():
    function = made(SHARED)
    assert isinstance(function, SharedMLPImportance)
    x = torch.randn(2, 3, 4).double()
    out = function(x)
    assert out.shape == (2, 3, 5)
    for row, result in zip(x.reshape(-1, 4).tolist(), out.reshape(-1, 5), strict=True):
        for index, (weight, bias) in enumerate(zip(function.weights, function.biases, strict=True)):
            row = [one_neuron(row, w, b) for w, b in zip(weight.mT, bias, strict=True)]
            row = row if index == 2 else [gelu(z) for z in row]
        assert result.tolist() == pytest.approx(row, abs=1e-12)


def test_one_mlp_of_the_vector_per_subcomponent():
    function = made(VECTOR)
    assert isinstance(function, VectorMLPImportance)
    x = torch.randn(2, 3, 4).double()
    out = function(x)
    for row, result in zip(x.reshape(-1, 4).tolist(), out.reshape(-1, 5), strict=True):
        for c in range(5):
            expected = function.out_bias[c].item()
            for k in range(2):
                z = one_neuron(row, function.mlp_in[c, :, k], function.in_bias[c, k])
                expected += function.mlp_out[c, k].item() * gelu(z)
            assert result[c].item() == pytest.approx(expected, abs=1e-12)


def test_nothing_but_its_own_weights_moves_a_subcomponent_of_the_vector_mlp():
    function = made(VECTOR)
    function(torch.randn(7, 4).double())[:, 2].sum().backward()
    for name, parameter in function.named_parameters():
        others = [c for c in range(5) if c != 2]
        assert parameter.grad[2].any() and not parameter.grad[others].any(), name


def test_initial_weights():
    generator = torch.Generator().manual_seed(0)
    shared = SharedMLPImportanceConfig().build(300, 200, generator=generator)
    assert isinstance(shared, SharedMLPImportance)
    assert [tuple(w.shape) for w in shared.weights] == [(200, 128), (128, 300)]
    sds = [w.std().item() for w in shared.weights]
    assert sds == pytest.approx([math.sqrt(2 / 200), math.sqrt(1 / 128)], rel=0.02)
    vector = VectorMLPImportanceConfig().build(300, 200, generator=generator)
    assert isinstance(vector, VectorMLPImportance)
    assert vector.mlp_in.shape == (300, 200, 16)
    assert vector.mlp_in.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    assert vector.mlp_out.std().item() == pytest.approx(1 / math.sqrt(16), rel=0.05)
    biases = [p for m in (shared, vector) for n, p in m.named_parameters() if "bias" in n]
    assert len(biases) == 4 and not any(b.any() for b in biases)


@BOTH
def test_normalized_inputs_have_lost_their_size_and_nothing_else(config: Any):
    plain, normal = made(config), made(config.model_copy(update={"normalize": True}))
    x = torch.randn(6, 4).double()
    length = x.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(normal(x), plain(x / length))
    torch.testing.assert_close(normal(0.1 * x), normal(x))
    assert not torch.allclose(plain(0.5 * x), plain(x))
    zero = torch.zeros(1, 4, requires_grad=True)
    rms_normalized(zero).sum().backward()
    assert not rms_normalized(zero).any() and zero.grad is not None and zero.grad.isfinite().all()


@BOTH
def test_many_members_side_by_side_equal_one_after_another(config: Any):
    members = [config.build(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    names = [name for name, _ in members[0].named_parameters()]
    stacked = {n: torch.stack([m.get_parameter(n).detach() for m in members]) for n in names}
    x = torch.randn(3, 6, 4)
    out = torch.func.vmap(lambda p, x: torch.func.functional_call(members[0], p, (x,)))(stacked, x)
    for i, member in enumerate(members):
        torch.testing.assert_close(out[i], member(x[i]))


# --- in a model ------------------------------------------------------------------------------------


@BOTH
def test_every_site_sees_what_the_target_feeds_to_it(config: Any):
    torch.manual_seed(0)
    model = ComponentModel(MLP(), MLP_SITES, config)
    inputs = model.target_forward(torch.randn(8, 4)).site_inputs
    ci = model.causal_importances(inputs)
    for path, site in model.sites.items():
        logits = site.own_importance()(inputs[path])
        torch.testing.assert_close(ci.lower[path], lower_leaky_hard_sigmoid(logits))
        torch.testing.assert_close(ci.upper[path], upper_leaky_hard_sigmoid(logits))


@BOTH
def test_an_embedding_is_read_by_the_rows_of_the_target(config: Any):
    torch.manual_seed(0)
    target = TokenModel()
    rows = target.embed.weight.detach().clone()
    model = ComponentModel(target, {"embed": 6, "mid": 3}, config)
    tokens = torch.randint(0, 11, (2, 5))
    ci = model.causal_importances(model.target_forward(tokens).site_inputs)
    site = model.sites["embed"]
    expected = lower_leaky_hard_sigmoid(site.own_importance()(rows[tokens]))
    torch.testing.assert_close(ci.lower["embed"], expected)


@BOTH
def test_gradients_reach_every_parameter(config: Any):
    torch.manual_seed(0)
    objective = objective_of(ComponentModel(MLP(), MLP_SITES, config), ALL_LOSSES)
    torch.stack(list(terms_of(objective, torch.randn(64, 4)).values())).sum().backward()
    for name, parameter in objective.model.subcomponent_parameters().items():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_named_in_a_configuration():
    config = make_config(ALL_LOSSES, importance={"type": "shared_mlp", "hidden_widths": [8, 4]})
    assert config.importance == SharedMLPImportanceConfig(hidden_widths=(8, 4))
    config = make_config(ALL_LOSSES, importance={"type": "vector_mlp", "normalize": True})
    assert config.importance == VectorMLPImportanceConfig(n_hidden=16, normalize=True)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (
            {"type": "shared_mlp", "hidden_widths": []},
            "importance.shared_mlp.hidden_widths.*1 item",
        ),
        (
            {"type": "shared_mlp", "hidden_widths": [0]},
            "hidden_widths.0.*greater than or equal to 1",
        ),
        ({"type": "vector_mlp", "n_hidden": 0}, "importance.vector_mlp.n_hidden"),
        ({"type": "vectors"}, "'vectors'.*did you mean 'vector_mlp'.*shared_mlp"),
    ],
)
def test_settings_that_make_no_sense(importance: dict[str, Any], message: str):
    raw = {"sites": MLP_SITES, "losses": ALL_LOSSES, "steps": 1, "lr": 1e-3}
    with pytest.raises(UserError, match=message):
        parse(SPDConfig, {**raw, "importance": importance}, "test")
