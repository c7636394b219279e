"""A user's own module through `spd.decompose`: it is decomposed rightly, or refused in one line."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import spd
from spd.component_model import ComponentModel
from spd.components import decomposable, resolve_sites
from spd.config import UserError
from spd.runs.library import Result

LOSSES: dict[str, Any] = {
    "faithfulness": {"coeff": 1.0},
    "stochastic_recon": {"coeff": 1.0, "n_samples": 1},
    "stochastic_recon_layerwise": {"coeff": 1.0, "n_samples": 1},
    "importance_minimality": {"coeff": 1e-3, "pnorm": 1.0},
}


def decompose(
    target: nn.Module, sites: dict[str, int], batch: Tensor, n_eval_batches: int = 1
) -> Result:
    config = spd.SPDConfig.model_validate(
        {
            "sites": sites,
            "losses": LOSSES,
            "steps": 3,
            "lr": 1e-2,
            "n_eval_batches": n_eval_batches,
            "execution": {"compile": False},
        }
    )
    problem = spd.Problem(target, [batch, batch], [batch])
    return spd.decompose(problem, config, quiet=True)


def mlp(**kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, **kwargs), nn.GELU(), nn.Linear(6, 3, **kwargs))


# --- types of numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_target_of_another_precision(dtype: torch.dtype):
    target, batch = mlp(dtype=dtype), torch.randn(16, 4, dtype=dtype)
    with torch.no_grad():
        before = target(batch)
    result = decompose(target, {"0": 8, "2": 8}, batch)
    model = result.model
    assert all(p.dtype == torch.float32 for p in model.subcomponent_parameters().values())
    with torch.no_grad():
        assert torch.equal(target(batch), before)
        for path, site in model.sites.items():
            left, values, right = torch.linalg.svd(site.target_weight.float(), full_matrices=False)
            site.subcomponents.V.zero_()[:, : len(values)] = left * values
            site.subcomponents.U.zero_()[: len(values)] = right
            assert site.weight.dtype == dtype, path
        output = model(batch)
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (output - before.to(output.dtype)).abs().max() < tolerance
    losses = [value for key, value in result.history[-1].items() if "loss" in key]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))


# --- what is linear --------------------------------------------------------------------------------


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Spelled(nn.Linear):
    """The same map, written otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", input, self.weight) + self.bias


class Int8(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.float()


class Adapter(nn.Module):
    """As peft wraps a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [FalconLinear, Spelled])
def test_what_acts_like_a_linear_module_is_one(kind: type[nn.Linear], dtype: torch.dtype):
    torch.manual_seed(0)
    module = kind(40, 7).to(dtype)
    assert decomposable(module)
    batch = torch.randn(5, 40, dtype=dtype)
    model = decompose(nn.Sequential(module), {"0": 40}, batch).model
    assert model.sites["0"].target_weight.shape == (40, 7)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Twice(4, 4), r"a tests\.test_users_modules\.Twice, which computes something else"),
        (Int8, r"a tests\.test_users_modules\.Int8 with a weight of torch\.int8 .*quantisation"),
        (Adapter, r"a tests\.test_users_modules\.Adapter, .*merge the adapter first"),
        (lambda: nn.Conv2d(1, 1, 3), r"a torch\.nn\.modules\.conv\.Conv2d \(convolutions cannot"),
        (
            lambda: OPTLearnedPositionalEmbedding(8, 4),
            r"a transformers.*OPTLearnedPositionalEmbedding, whose forward",
        ),
        (
            lambda: BartLearnedPositionalEmbedding(8, 4),
            r"a transformers.*BartLearnedPositionalEmbedding, whose forw",
        ),
    ],
)
def test_what_cannot_be_decomposed_is_named_by_its_class(made: Callable[[], nn.Module], said: str):
    target = nn.Sequential(made(), nn.Linear(4, 4))
    with pytest.raises(UserError, match=f"sites: '0' matches '0', {said}.*decomposable here: .*1$"):
        resolve_sites(target, {"0": 3})


def test_the_matrix_inside_an_adapter_can_be_named():
    assert resolve_sites(nn.Sequential(Adapter()), {"*.base_layer": 3}) == {"0.base_layer": 3}


def test_weights_that_are_not_there():
    with pytest.raises(UserError, match="'0' is a LazyLinear that has not seen a batch yet"):
        decompose(nn.Sequential(nn.LazyLinear(3)), {"0": 2}, torch.rand(2, 4))
    with pytest.raises(UserError, match="weight of '0' is on the meta device: it is offloaded"):
        decompose(mlp(device="meta"), {"0": 2}, torch.rand(2, 4))
    target = mlp()
    target.get_parameter("0.weight").data[1, 2] = torch.nan
    with pytest.raises(UserError, match="weight of '0' has entries that are not finite"):
        decompose(target, {"0": 2}, torch.rand(2, 4))


def test_a_lazy_module_that_has_seen_a_batch():
    target, batch = nn.Sequential(nn.LazyLinear(3)), torch.rand(2, 4)
    target(batch)
    assert decompose(target, {"0": 2}, batch).model.sites["0"].C == 2


# --- transformers of torch's own -------------------------------------------------------------------


def test_an_encoder_layer_does_not_go_round_its_modules():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    batch = torch.randn(3, 5, 8)
    with torch.no_grad():
        before = layer(batch)
    model = decompose(layer, {"linear1": 6, "linear2": 6}, batch).model
    with torch.no_grad():
        torch.testing.assert_close(model.target_forward(batch).output, before)
        ablated = model(batch, {"linear1": torch.zeros(3, 5, 6)})
    assert (ablated - before).abs().max() > 1e-3


def test_a_module_whose_weight_is_read_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(
        UserError, match=r"'self_attn.out_proj' 0 times in one pass \(its weight is read"
    ):
        decompose(layer, {"self_attn.out_proj": 4}, torch.randn(3, 5, 8))


# --- around the call -------------------------------------------------------------------------------


def test_within_no_grad_it_trains():
    outside = decompose(mlp(), {"0": 4}, torch.ones(2, 4)).history
    with torch.no_grad():
        inside = decompose(mlp(), {"0": 4}, torch.ones(2, 4)).history
    assert inside == outside and inside[0] != inside[-1]


def test_within_inference_mode_it_is_refused():
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode is on here"):
        decompose(mlp(), {"0": 4}, torch.ones(2, 4))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_batches_of_any_number_of_axes(shape: tuple[int, ...]):
    model = decompose(mlp(), {"0": 5, "2": 5}, torch.rand(shape)).model
    g = model.importances(torch.rand(shape)).lower
    assert g["0"].shape == (*shape[:-1], 5) and g["0"].numpy().max() <= 1


def test_an_empty_batch_is_named():
    with pytest.raises(UserError, match=r"batch 1 is a Tensor of shape \(0, 4\): it is empty"):
        decompose(mlp(), {"0": 4}, torch.ones(0, 4))


def test_a_cell_that_is_run_again_begins_anew():
    target, batch = mlp(), torch.rand(8, 4)
    first = decompose(target, {"0": 4}, batch)
    again = decompose(target, {"[02]": 5}, batch)
    expected = decompose(mlp(), {"[02]": 5}, batch)
    assert again.history == expected.history
    with pytest.raises(UserError, match="decomposed again since"):
        first.model(batch)
    with pytest.raises(UserError, match="decomposed again since"):
        first.model.importances(batch)


def test_a_part_of_the_target_that_is_told_to_train_stays_as_it_was():
    target = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)))
    model = decompose(target, {"0": 4}, torch.rand(8, 4)).model
    batch = torch.rand(8, 4)
    before = model(batch)
    target[1].train()
    assert torch.equal(model(batch), before)


def test_after_a_mistake_the_same_target_can_be_decomposed():
    target, batch = mlp(), torch.rand(8, 4)
    with pytest.raises(UserError, match="n_eval_batches"):
        decompose(target, {"0": 5}, batch, n_eval_batches=2)
    assert decompose(target, {"[02]": 5}, batch).model.sites.keys() == {"0", "2"}


# --- names, and sites that do nothing --------------------------------------------------------------


def test_a_name_with_brackets_is_a_name_first():
    target = nn.Sequential()
    target.add_module("a[0]", nn.Linear(4, 4))
    target.add_module("a0", nn.Linear(4, 4))
    assert resolve_sites(target, {"a[0]": 3}) == {"a[0]": 3}
    assert resolve_sites(target, {"a[[]0]": 3, "a0": 2}) == {"a[0]": 3, "a0": 2}
    model = decompose(target, {"a[0]": 3}, torch.rand(2, 4)).model
    assert list(model.sites) == ["a[0]"]


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.unused(x)


def test_a_site_without_any_effect_is_named(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    torch.manual_seed(0)
    decompose(WithUnused(), {"*used": 4}, torch.rand(8, 4))
    (message,) = [own.message for own in caplog.records if own.name.endswith("target_check")]
    assert message.startswith("site 'unused' has no effect on the output")


# --- the target's own state ------------------------------------------------------------------------


def test_a_target_is_saved_as_if_it_had_never_been_decomposed():
    target, batch = mlp(), torch.rand(8, 4)
    before = deepcopy(target.state_dict())
    model = decompose(target, {"[02]": 5}, batch).model
    state = target.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    mlp().load_state_dict(state)
    other = {name: value + 1 for name, value in before.items()}
    parts = {name: p.detach().clone() for name, p in model.subcomponent_parameters().items()}
    target.load_state_dict(other)
    assert torch.equal(model.sites["0"].weight, other["0.weight"])
    assert all(torch.equal(p, parts[name]) for name, p in model.subcomponent_parameters().items())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.original\.more"):
        target.load_state_dict({**other, "0.more": torch.ones(1)})
    del other["2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.original\.bias"):
        target.load_state_dict(other)


def test_the_state_of_a_model_is_all_of_it():
    def made() -> ComponentModel:
        return decompose(mlp(), {"[02]": 5}, torch.rand(8, 4)).model

    source, copy = made(), made()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    batch = torch.rand(8, 4)
    assert not torch.equal(source(batch), copy(batch))
    state = source.state_dict()
    assert {"target.0.weight", "sites.0.subcomponents.V"} <= state.keys()
    copy.load_state_dict(state)
    assert torch.equal(source(batch), copy(batch))
    with pytest.raises(RuntimeError, match=r"Missing key.*sites\.0\.subcomponents\.V"):
        copy.load_state_dict({k: v for k, v in state.items() if k != "sites.0.subcomponents.V"})
    wrong = {**state, "sites.0.subcomponents.V": torch.zeros(4, 9)}
    with pytest.raises(RuntimeError, match=r"size mismatch for sites\.0\.subcomponents\.V"):
        copy.load_state_dict(wrong)


def test_modules_print_their_sizes():
    text = repr(decompose(mlp(), {"[02]": 5}, torch.rand(8, 4)).model)
    assert "d_in=4, d_out=6, C=5" in text and "d_in=6, d_out=3, C=5" in text
