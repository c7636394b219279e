"""The target with sites in it: unchanged by itself, replaced call by call, chosen by pattern."""

import pytest
import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, Site
from spd.components import resolve_sites
from spd.config import UserError
from tests.toy import MLP, MLP_SITES, TokenModel, decompose, inputs_of, make_objective


@pytest.fixture
def model() -> ComponentModel:
    torch.manual_seed(0)
    return decompose(MLP(), MLP_SITES)


def original(site: Site, x: Tensor) -> Tensor:
    """What the `nn.Linear` at a site computes."""
    return nn.functional.linear(x, site.weight, site.bias)


# --- the target stays what it was ------------------------------------------------------------------


def test_wrapping_changes_neither_output_nor_weights():
    torch.manual_seed(0)
    target = nn.Sequential(MLP(), nn.Dropout(0.5), nn.Linear(3, 2))
    target.eval()
    x = torch.randn(8, 4)
    output = target(x)
    weights = {name: value.clone() for name, value in target.state_dict().items()}

    target.train()
    model = decompose(target, {"0.first": 3, "2": 4})
    assert model.target is target and not target.training
    assert torch.equal(target(x), output)
    assert torch.equal(model.target_forward(x).output, output)
    assert torch.equal(model(x, {}), output)
    after = {k.replace(".original", ""): v for k, v in target.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_training_steps_leave_the_target_bitwise_alone(model: ComponentModel):
    x = torch.randn(8, 4)
    before = model.target_forward(x).output
    frozen = {id(p): p for p in model.target.parameters() if not p.requires_grad}
    assert len(frozen) == 5  # three matrices, two biases
    losses = {"faithfulness": {"coeff": 1.0}, "stochastic_recon": {"coeff": 1.0}}
    objective = make_objective(model, losses)
    optimizer = torch.optim.AdamW(model.subcomponent_parameters().values(), lr=0.1)
    for step in range(3):
        noise = objective.draw_noise(x, stream="train", seed=0, step=step)
        total, _, _ = objective(x, torch.tensor(0.0), noise)
        total.backward()
        optimizer.step()
    assert torch.equal(model.target_forward(x).output, before)
    assert all(p.grad is None for p in frozen.values())


def test_what_the_target_feeds_to_each_site(model: ComponentModel):
    x = torch.randn(2, 3, 4, requires_grad=True)
    output, inputs = model.target_forward(x).output, inputs_of(model, x)
    first, mid = model.sites["first"], model.sites["deep.mid"]
    assert list(inputs) == ["first", "deep.mid", "last"]
    assert torch.equal(inputs["first"], x)
    torch.testing.assert_close(inputs["deep.mid"], original(first, x).relu())
    torch.testing.assert_close(inputs["last"], original(mid, inputs["deep.mid"]).relu())
    assert not output.requires_grad and not inputs["last"].requires_grad
    assert model.running.current is None, "memory is let go"


def test_code_that_reads_weight_and_bias_directly():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            assert self.b.bias is None
            return self.b(self.a(x)).to(self.a.weight.dtype) + self.a.bias

    torch.manual_seed(0)
    target, x = Direct(), torch.randn(2, 3)
    weight, bias, expected = target.a.weight, target.a.bias, target(x)
    site = decompose(target, {"a": 2, "b": 2}).sites["a"]
    assert site.weight is weight and site.bias is bias
    assert torch.equal(target(x), expected)
    assert torch.equal(site.target_weight, weight.T)


# --- masks -----------------------------------------------------------------------------------------


def test_only_the_sites_named_in_the_masks_are_replaced(model: ComponentModel):
    x = torch.randn(6, 4)
    first, mid, last = (model.sites[path] for path in MLP_SITES)
    masks = {path: torch.rand(6, C) for path, C in MLP_SITES.items()}

    def rebuilt(path: str, h: Tensor) -> Tensor:
        site = model.sites[path]
        out = ((h @ site.subcomponents.V) * masks[path]) @ site.subcomponents.U
        return out if site.bias is None else out + site.bias

    hidden = original(first, x).relu()
    only_mid = original(last, rebuilt("deep.mid", hidden).relu())
    torch.testing.assert_close(model(x, {"deep.mid": masks["deep.mid"]}), only_mid)
    two = rebuilt("last", original(mid, rebuilt("first", x).relu()).relu())
    torch.testing.assert_close(model(x, {p: masks[p] for p in ("first", "last")}), two)


def test_no_masks_means_all_subcomponents_on(model: ComponentModel):
    x = torch.randn(6, 4)
    ones = {path: torch.ones(6, C) for path, C in MLP_SITES.items()}
    torch.testing.assert_close(model(x), model(x, ones))
    torch.testing.assert_close(model(x, {"last": None}), model(x, {"last": ones["last"]}))
    assert not torch.allclose(model(x), model.target_forward(x).output)


def test_masks_do_not_outlive_a_call_that_fails():
    class Fragile(MLP):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.broken:
                raise RuntimeError("broken")
            return out

    torch.manual_seed(0)
    target = Fragile()
    model = decompose(target, MLP_SITES)
    x = torch.randn(6, 4)
    expected = target(x)
    target.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        model(x)
    with pytest.raises(RuntimeError, match="broken"):
        model.target_forward(x)
    target.broken = False
    assert torch.equal(target(x), expected)
    assert model.running.current is None


def test_a_mask_for_an_unknown_site_is_refused_and_leaves_nothing_behind(model: ComponentModel):
    x = torch.randn(6, 4)
    expected = model.target(x)
    with pytest.raises(AssertionError, match="lst"):
        model(x, {"first": None, "lst": None})
    assert torch.equal(model.target(x), expected)


# --- patterns --------------------------------------------------------------------------------------


def test_sites_stand_in_the_order_of_the_modules_whatever_the_order_of_the_patterns():
    torch.manual_seed(0)
    model = decompose(MLP(), {"last": 9, "deep.*": 5, "fir?t": 7})
    assert list(model.sites) == ["first", "deep.mid", "last"]
    assert {path: site.C for path, site in model.sites.items()} == MLP_SITES
    assert list(model.target_forward(torch.randn(2, 4)).site_inputs) == list(model.sites)


def test_a_pattern_reaches_every_layer_and_keeps_dotted_names():
    layers = nn.ModuleList(
        nn.ModuleDict({"mlp_in": nn.Linear(2, 3), "mlp_out": nn.Linear(3, 2)}) for _ in range(11)
    )
    target = nn.ModuleDict({"layers": layers})
    sites = resolve_sites(target, {"layers.*.mlp_in": 4, "layers.1?.mlp_out": 5})
    expected = {}
    for i in range(11):
        expected[f"layers.{i}.mlp_in"] = 4
        if i >= 10:
            expected[f"layers.{i}.mlp_out"] = 5
    assert list(sites.items()) == list(expected.items())
    names = decompose(target, {"layers.3.mlp_in": 4}).subcomponent_parameters()
    assert "layers.3.mlp_in.subcomponents.V" in names


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "at least one"),
        ({"frist": 3}, "frist.*did you mean 'first'"),
        ({"first": 3, "fir*": 3}, "'first' is matched by both"),
        ({"deep": 3}, "ModuleDict"),
        ({"first": 0}, "C = 0"),
    ],
)
def test_patterns_that_cannot_be_resolved(sites: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        resolve_sites(MLP(), sites)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ScaledRows(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_a_linear_module_that_computes_something_else_is_refused():
    target = nn.Sequential(Doubled(2, 2), nn.Linear(2, 2))
    assert resolve_sites(target, {"1": 2}) == {"1": 2}
    with pytest.raises(
        UserError,
        match=r"'0', a tests\.test_component_model\.Doubled, which computes something else",
    ):
        resolve_sites(target, {"*": 2})


def test_the_matrix_of_an_embedding_is_what_it_gives_out():
    target = nn.Sequential(ScaledRows(4, 2))
    site = decompose(target, {"0": 2}).sites["0"]
    ids = torch.arange(4)
    assert torch.equal(site.target_weight, target(ids))
    assert torch.equal(site.target_weight, 3 * site.weight)
    with torch.no_grad():
        site.subcomponents.V.copy_(site.target_weight)
        site.subcomponents.U.copy_(torch.eye(2))
        torch.testing.assert_close(site.subcomponents(ids, None), target(ids))


@pytest.mark.parametrize("path", ["idle", "twice"])
def test_a_site_must_be_called_exactly_once(path: str):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)
            self.twice = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x))

    model = decompose(Odd(), {path: 2})
    with pytest.raises(UserError, match=f"'{path}' [02] times"):
        model.target_forward(torch.randn(3, 2))


# --- tokens, several shapes, saved parameters ------------------------------------------------------


def test_token_ids_reach_the_embedding():
    torch.manual_seed(0)
    model = decompose(TokenModel(), {"embed": 6, "mid": 3})
    tokens = torch.randint(0, 11, (2, 5))
    inputs = inputs_of(model, tokens)
    assert torch.equal(inputs["embed"], tokens)
    ci = model.causal_importances(inputs)
    assert ci.lower["embed"].shape == (2, 5, 6) and ci.upper["mid"].shape == (2, 5, 3)
    same = tokens == tokens[0, 0]
    g = ci.lower["embed"]
    assert torch.equal(g[same], g[0, 0].expand(int(same.sum()), -1))


def test_parameters_are_copied_in_exactly_or_not_at_all(model: ComponentModel):
    torch.manual_seed(1)
    saved = {n: torch.randn_like(p) for n, p in model.subcomponent_parameters().items()}
    model.load_subcomponents(saved)
    assert all(torch.equal(p, saved[n]) for n, p in model.subcomponent_parameters().items())
    name = "first.subcomponents.V"
    without = {key: value for key, value in saved.items() if key != name}
    with pytest.raises(ValueError, match=name):
        model.load_subcomponents(without)
    with pytest.raises(ValueError, match=name):
        model.load_subcomponents({**saved, name: torch.zeros(4, 8)})
