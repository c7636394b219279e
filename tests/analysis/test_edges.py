"""Direct effects between subcomponents, against numbers computed by hand and sums that must agree."""

import math

import pytest
import torch
from torch import Tensor, nn

from spd.analysis.edges import INPUT, Node, direct_effects, over_data, to_unembedding, trace
from spd.component_model import ComponentModel
from spd.importance import AffineImportanceConfig, CausalImportances
from tests.little_lm import little_model


class Residual(nn.Module):
    """x, then twice x + act(x W), then a number per subcomponent of the last matrix."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.three = nn.Linear(2, 1, bias=False)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.one(x)
        x = x + (out.relu() if self.relu else out)
        x = x + self.two(x)
        return self.three(x)


def by_hand(relu: bool) -> ComponentModel:
    """V₁ (1, 1), U₁ (1, −1); V₂ (2, 1), U₂ (0, 1); V₃ (1, 1); nothing is left over."""
    rows = {
        "one": ([1.0, 1.0], [1.0, -1.0]),
        "two": ([2.0, 1.0], [0.0, 1.0]),
        "three": ([1.0, 1.0], [1.0]),
    }
    target = Residual(relu)
    with torch.no_grad():
        for name, (V, U) in rows.items():
            target.get_parameter(f"{name}.weight").copy_(
                torch.outer(torch.tensor(U), torch.tensor(V))
            )
    model = ComponentModel(target, dict.fromkeys(rows, 1), AffineImportanceConfig())
    with torch.no_grad():
        for name, (V, U) in rows.items():
            parts = model.sites[name].subcomponents
            parts.V.copy_(torch.tensor(V)[:, None])
            parts.U.copy_(torch.tensor(U)[None])
    return model


@pytest.mark.parametrize(
    ("relu", "acts", "edges", "one_to_two"),
    [(False, [3, 7, 10], [3, 0, 7], 3), (True, [3, 10, 16], [3, 3, 10], 6)],
)
def test_a_residual_network_by_hand(
    relu: bool, acts: list[float], edges: list[float], one_to_two: float
):
    model = by_hand(relu)
    x = torch.tensor([[1.0, 2.0]])
    traced = trace(model, x)
    assert [traced.acts[name].item() for name in model.sites] == acts
    assert torch.equal(traced.output, model(x, {}))
    g = {name: torch.ones(1, 1) for name in model.sites}
    found = direct_effects(traced, traced.acts["three"].sum(), g)
    assert found[INPUT].sum().item() == edges[0]
    assert [found.get(name, torch.zeros(1)).item() for name in ("one", "two")] == edges[1:]
    assert sum(edges) == acts[2], "all direct effects are the activation"
    found = direct_effects(traced, traced.acts["two"].sum(), g)
    assert found["one"].item() == one_to_two
    assert "two" not in found and "three" not in found, "nothing comes from itself or from later"
    if not relu:  # the total derivative ∂a₃/∂a₁ is 1, the direct one 0
        unit = torch.tensor([[1.0, -1.0]])
        later = [model(x + e * unit, {}).item() for e in (0.0, 1.0)]
        assert later[1] - later[0] == pytest.approx(1.0)


class Slope(nn.Module):
    """The second activation is twice the first, plus a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_the_data_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Source a (3, −2, 1), g (1, .5, 0), slope 2; target (7, −3, 3)."""
    target = Slope()
    model = ComponentModel(target, {"first": 2, "second": 1}, AffineImportanceConfig())
    first, second = (model.sites[name].subcomponents for name in ("first", "second"))
    with torch.no_grad():
        first.V.copy_(torch.eye(2))
        first.U.copy_(torch.eye(2))
        second.V.copy_(torch.tensor([[2.0], [1.0]]))
        target.first.weight.copy_(torch.eye(2))
    a, rest = torch.tensor([3.0, -2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    x = torch.stack([a, rest], dim=1)
    g = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    given = {"first": g, "second": torch.ones(3, 1)}
    monkeypatch.setattr(model, "importances", lambda batch: CausalImportances(given, given))
    node = Node("second", 0)
    sums = over_data(model, [x], [node])
    assert (x @ second.V).flatten().tolist() == [7.0, -3.0, 3.0]
    assert sums.effects[node]["first"][0].item() == pytest.approx(4.0)
    assert sums.normalised(node, "first")[0].item() == pytest.approx(0.564276, abs=1e-6)
    assert sums.absolute[node]["first"][0].item() == pytest.approx(8.0)
    found = sums.normalised(node, "first", absolute=True)[0].item()
    assert found == pytest.approx(1.128553, abs=1e-6)
    assert sums.rms(node) == pytest.approx(math.sqrt(67 / 3))
    assert sums.normalised(node, "first")[1].item() == 0.0, "a source that is never on"


def test_of_a_language_model_the_sums_are_those_of_every_position():
    """And effects on the unembedding's input, projected, are those on a logit."""
    model = ComponentModel(
        little_model("llama"),
        {"model.layers.*.mlp.*_proj": 3, "model.layers.*.self_attn.*_proj": 2},
        AffineImportanceConfig(),
    )
    batches = [
        torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    up, out = Node("model.layers.1.mlp.up_proj", 1), Node("model.layers.1.self_attn.o_proj", 0)
    sums = over_data(model, batches, [up, out], n_tokens=40)
    across = {f"model.layers.1.self_attn.{x}_proj" for x in "kv"}
    for node in (up, out):
        expected: dict[str, Tensor] = {}
        for ids in batches:
            traced = trace(model, ids)
            assert torch.allclose(traced.output, model(ids, {}), atol=1e-5)
            g = model.importances(ids).lower
            for b, t in ((b, t) for b in range(2) for t in range(6)):
                a = traced.acts[node.site][b, t, node.c]
                for path, effect in direct_effects(traced, a, g).items():
                    assert not effect[b, t + 1 :].any() and not effect[1 - b].any(), "no way back"
                    if path == INPUT:
                        total = torch.zeros(40).index_add(0, ids.flatten(), effect.flatten())
                    else:
                        total = effect.flatten(end_dim=-2).sum(dim=0)
                        assert path in across or not effect[b, :t].any(), "position-wise"
                    expected[path] = expected.get(path, torch.zeros(())) + total
        found = sums.effects[node]
        assert found.keys() == expected.keys()
        for path, own in expected.items():
            assert torch.allclose(found[path], own, atol=1e-5), path
    layers = [
        f"model.layers.{i}.{part}" for i, part in ((0, "mlp.down_proj"), (0, "self_attn.o_proj"))
    ]
    assert sums.effects[up].keys() == {INPUT, *layers, out.site}, "through the stream alone"
    assert sums.effects[out].keys() == across | {"model.layers.1.self_attn.q_proj"}
    counts = torch.bincount(torch.cat(batches).flatten(), minlength=40)
    assert torch.equal(sums.importance[INPUT], counts.float())

    towards = to_unembedding(model, batches, "lm_head")
    column = model.target.get_parameter("lm_head.weight")[7]
    assert isinstance(column, Tensor)
    for path, own in towards.items():
        direct = torch.zeros(())
        for ids in batches:
            traced = trace(model, ids)
            g = model.importances(ids).lower
            effect = direct_effects(traced, traced.output[..., 7].sum(), g).get(path)
            if effect is not None:
                direct = direct + (effect.sum() if path == INPUT else effect.flatten(0, -2).sum(0))
        assert torch.allclose(own @ column, direct.reshape(-1), atol=1e-4), path
