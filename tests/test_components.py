"""Subcomponents of each kind of module: they add up to the matrix, and start as published."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd.component_model import ComponentModel
from spd.components import EmbeddingSubcomponents, LinearSubcomponents, init_subcomponents_
from tests.toy import decompose, make_objective, terms_of


def conv1d(d_in: int, d_out: int) -> nn.Module:
    module = Conv1D(d_out, d_in)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "square linear": lambda: nn.Linear(5, 5),
    "embedding": lambda: nn.Embedding(7, 4),
    "conv1d": lambda: conv1d(4, 6),
    "square conv1d": lambda: conv1d(5, 5),
}


class Alone(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.only = module

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def inputs_of(module: nn.Module, *rows: int) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.randint(0, module.num_embeddings, rows)
    if isinstance(module, nn.Linear):
        return torch.randn(*rows, module.in_features)
    assert isinstance(module, Conv1D)
    return torch.randn(*rows, module.weight.shape[0])


def make_exact_(model: ComponentModel, weight: Tensor) -> None:
    """Let V U be the weight, given as `[d_in, d_out]`, through its singular value decomposition."""
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    (site,) = model.sites.values()
    with torch.no_grad():
        site.subcomponents.V.copy_(left * singular)
        site.subcomponents.U.copy_(right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(3,), (2, 3)], ids=["batch", "batch and position"])
def test_exact_subcomponents_reproduce_the_module_with_its_bias(kind: str, rows: tuple[int, ...]):
    torch.manual_seed(0)
    module = KINDS[kind]()
    x = inputs_of(module, *rows)
    expected = module(x).detach()
    weight = module.get_parameter("weight").detach().clone()
    weight = weight.T if isinstance(module, nn.Linear) else weight
    model = decompose(Alone(module), {"only": min(weight.shape)})
    make_exact_(model, weight)

    assert not torch.allclose(model(x, {"only": torch.zeros(*rows, min(weight.shape))}), expected)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x, {"only": torch.ones(*rows, min(weight.shape))}), expected)
    (faithfulness,) = terms_of(make_objective(model, {"faithfulness": {"coeff": 1.0}}), x).values()
    assert faithfulness < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_is_added_once_and_is_not_trained(kind: str):
    torch.manual_seed(0)
    module = KINDS[kind]()
    bias = getattr(module, "bias", None)
    x = inputs_of(module, 3)
    model = decompose(Alone(module), {"only": 5})
    site = model.sites["only"]
    off = torch.zeros(3, 5)
    assert not site.subcomponents(x, off).any()
    out = model(x, {"only": off})
    torch.testing.assert_close(out, torch.zeros_like(out) if bias is None else bias.expand(3, -1))

    trained = model.subcomponent_parameters()
    assert {name.rpartition(".")[2] for name in trained} == {
        *("V", "U", "mlp_in", "in_bias", "mlp_out", "out_bias")
    }
    assert not any(p is q for p in trained.values() for q in module.parameters())
    assert all(not p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in trained.values())


@pytest.mark.parametrize("kind", KINDS)
def test_subcomponents_have_the_shapes_of_the_module(kind: str):
    module = KINDS[kind]()
    d_in, d_out = {
        "linear": (4, 6),
        "linear without bias": (6, 4),
        "square linear": (5, 5),
        "embedding": (7, 4),
        "conv1d": (4, 6),
        "square conv1d": (5, 5),
    }[kind]
    site = decompose(Alone(module), {"only": 9}).sites["only"]
    assert site.C == 9
    assert site.subcomponents.V.shape == (d_in, 9) and site.subcomponents.U.shape == (9, d_out)
    assert site.weight is module.weight and site.bias is getattr(module, "bias", None)


def test_a_mask_scales_every_subcomponent_by_itself():
    torch.manual_seed(0)
    parts = LinearSubcomponents(3, 2, 4)
    nn.init.normal_(parts.V)
    nn.init.normal_(parts.U)
    x, mask = torch.randn(5, 3), torch.rand(5, 4)
    for row in range(5):
        weight = sum(mask[row, c] * torch.outer(parts.V[:, c], parts.U[c]) for c in range(4))
        torch.testing.assert_close(parts(x, mask)[row], x[row] @ weight)


def test_inner_activations():
    torch.manual_seed(0)
    linear, embedding = LinearSubcomponents(3, 2, 4), EmbeddingSubcomponents(6, 2, 4)
    for parts in (linear, embedding):
        nn.init.normal_(parts.V)
    x, tokens = torch.randn(2, 5, 3), torch.randint(0, 6, (2, 5))
    for c in range(4):
        torch.testing.assert_close(linear.acts(x)[..., c], (x * linear.V[:, c]).sum(dim=-1))
        torch.testing.assert_close(embedding.acts(tokens)[..., c], embedding.V[tokens, c])


# --- initialisation --------------------------------------------------------------------------------


def test_published_initialisation():
    torch.manual_seed(0)
    d_in, d_out, C = 4, 3, 500
    weight = torch.randn(d_in, d_out)
    V, U = torch.empty(d_in, C), torch.empty(C, d_out)
    init_subcomponents_(V, U, weight, generator=torch.Generator().manual_seed(1))
    for c in range(C):
        v, size = V[:, c], U[c].norm()
        assert v.norm().item() == pytest.approx(1, abs=1e-5)
        # U_c is s u for a unit vector u and s = u · W v; whatever the sign of s, U_c · W v = s²
        overlap = sum(v[i] * weight[i, j] * U[c, j] for i in range(d_in) for j in range(d_out))
        torch.testing.assert_close(overlap, size.square(), rtol=1e-4, atol=1e-6)
    assert V.mean(dim=1).abs().max() < 0.1, "no direction is preferred"
    assert len({round(value, 4) for value in V[0].tolist()}) > C / 2


def test_initial_values_depend_on_seed_and_site_alone():
    def values(sites: dict[str, int], seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 17)  # the global generator plays no part
        return {
            name: parameter.detach()
            for name, parameter in decompose(target(), sites, seed=seed)
            .subcomponent_parameters()
            .items()
        }

    def target() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

    both, only_b = values({"a": 4, "b": 4}, seed=0), values({"b": 4}, seed=0)
    assert all(torch.equal(both[name], only_b[name]) for name in only_b)
    assert not torch.equal(both["a.subcomponents.V"], both["b.subcomponents.V"])
    other = values({"a": 4, "b": 4}, seed=1)
    assert not torch.equal(both["a.subcomponents.V"], other["a.subcomponents.V"])
