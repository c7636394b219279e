"""Causal importance functions and leaky hard sigmoids, values and gradients."""

import math

import pytest
import torch
from torch import Tensor, nn

from spd import kernels
from spd.importance import (
    AffineImportance,
    AffineImportanceConfig,
    LowerLeak,
    MLPImportance,
    MLPImportanceConfig,
    lower_leaky_hard_sigmoid,
    upper_leaky_hard_sigmoid,
)
from tests import naive
from tests.toy import MLP, MLP_SITES, decompose, inputs_of

POINTS = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])


def mlp(C: int = 5, n_hidden: int = 3) -> MLPImportance:
    """In float64, with biases that are not zero."""
    function = MLPImportance(C, n_hidden, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(1)
    for bias in (function.in_bias, function.out_bias):
        nn.init.normal_(bias)
    return function


def by_formula(function: MLPImportance, h: Tensor) -> Tensor:
    """Σ_k mlp_out gelu(mlp_in h + in_bias) + out_bias, in plain operations of autograd."""
    z = h[..., None] * function.mlp_in + function.in_bias
    return (naive.gelu(z) * function.mlp_out).sum(dim=-1) + function.out_bias


def gradients(output: Tensor, weight: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad((output * weight).sum(), list(inputs.values()))
    return dict(zip(inputs, grads, strict=True))


# --- importance functions --------------------------------------------------------------------------


def test_initial_weights_of_the_mlp():
    generator = torch.Generator().manual_seed(0)
    function = MLPImportanceConfig(n_hidden=16).build(4000, 3, generator=generator)
    assert isinstance(function, MLPImportance)
    for weight, sd in ((function.mlp_in, math.sqrt(2)), (function.mlp_out, 1 / math.sqrt(16))):
        assert weight.shape == (4000, 16)
        assert weight.std().item() == pytest.approx(sd, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=0.02 * sd)
    assert not function.in_bias.any() and not function.out_bias.any()


def test_initial_weights_of_the_affine_function():
    generator = torch.Generator().manual_seed(0)
    function = AffineImportanceConfig().build(40_000, 3, generator=generator)
    assert isinstance(function, AffineImportance)
    assert function.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert function.weight.mean().item() == pytest.approx(0.0, abs=0.02)
    assert not function.bias.any()


@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["batch", "batch and position"])
def test_the_mlp_is_one_small_network_per_subcomponent(shape: tuple[int, ...]):
    function = mlp()
    h = torch.randn(*shape, 5).double()
    out = function(h)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in h.shape)).tolist():
        c, value = index[-1], h[tuple(index)].item()
        expected = function.out_bias[c].item()
        for k in range(3):
            z = function.mlp_in[c, k].item() * value + function.in_bias[c, k].item()
            exact_gelu = z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
            expected += function.mlp_out[c, k].item() * exact_gelu
        assert out[tuple(index)].item() == pytest.approx(expected, abs=1e-12)


def test_gelu_is_the_exact_one():
    function = MLPImportance(1, 1, generator=torch.Generator()).double()
    with torch.no_grad():
        function.mlp_in.fill_(1.0)
        function.mlp_out.fill_(1.0)
        own = function(torch.tensor([[-2.0]]).double())
    assert own.item() == pytest.approx(-2 * 0.5 * (1 + math.erf(-math.sqrt(2))), abs=1e-12)
    tanh = nn.functional.gelu(torch.tensor(-2.0).double(), approximate="tanh")
    assert abs(own.item() - tanh.item()) > 1e-5


def test_the_affine_function():
    function = AffineImportance(3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        function.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    h = torch.randn(2, 4, 3)
    for c in range(3):
        expected = h[..., c] * function.weight[c] + function.bias[c]
        torch.testing.assert_close(function(h)[..., c], expected)


def test_the_written_gradients_equal_those_of_autograd():
    function = mlp()
    h = torch.randn(2, 7, 5).double().requires_grad_()
    inputs = {"h": h, **dict(function.named_parameters())}
    weight = torch.randn(2, 7, 5).double()
    own = gradients(function(h), weight, inputs)
    expected = gradients(by_formula(function, h), weight, inputs)
    for name in inputs:
        torch.testing.assert_close(own[name], expected[name], msg=name)


def test_blocks_of_subcomponents_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """The last of them is smaller."""
    function = mlp()
    h = torch.randn(7, 5).double().requires_grad_()
    inputs = {"h": h, **dict(function.named_parameters())}
    whole = function(h)
    expected = gradients(whole, h.detach(), inputs)
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 2 * 7 * 3)  # two subcomponents
    sizes: list[tuple[int, ...]] = []
    plain = kernels.normal_cdf_and_gelu_slope

    def recorded(z: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(tuple(z.shape))
        return plain(z)

    monkeypatch.setattr(kernels, "normal_cdf_and_gelu_slope", recorded)
    in_blocks = function(h)
    found = gradients(in_blocks, h.detach(), inputs)
    assert sizes == [(7, 2, 3), (7, 2, 3), (7, 1, 3), (2, 3, 7), (2, 3, 7), (1, 3, 7)]
    assert torch.equal(in_blocks, whole)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_the_written_gradients_equal_finite_differences():
    function = mlp(C=2, n_hidden=2)
    names = list(dict(function.named_parameters()))

    def run(h: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(function, named, (h,))

    h = torch.randn(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (h, *function.parameters()))


def test_many_members_side_by_side_equal_one_after_another():
    members = [MLPImportance(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    names = [name for name, _ in members[0].named_parameters()]
    stacked = {n: torch.stack([m.get_parameter(n).detach() for m in members]) for n in names}
    h = torch.randn(3, 6, 4)

    def loss(parameters: dict[str, Tensor], h: Tensor) -> Tensor:
        out = torch.func.functional_call(members[0], parameters, (h,))
        return lower_leaky_hard_sigmoid(out, "gradient").square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(stacked, h)
    for i, member in enumerate(members):
        own = loss(dict(member.named_parameters()), h[i])
        expected = torch.autograd.grad(own, list(member.parameters()))
        for name, grad in zip(names, expected, strict=True):
            torch.testing.assert_close(grads[name][i], grad, msg=name)


@pytest.mark.parametrize("n_hidden", [0, 3])
def test_the_gradient_of_importances_reaches_V_and_never_U(n_hidden: int):
    torch.manual_seed(0)
    model = decompose(MLP(), MLP_SITES, n_hidden=n_hidden)
    ci = model.causal_importances(model.target_forward(torch.randn(32, 4)).site_inputs)
    torch.stack([g.sum() for g in ci.lower.values()]).sum().backward()
    for site in model.sites.values():
        assert site.subcomponents.V.grad is not None and site.subcomponents.V.grad.any()
        assert site.subcomponents.U.grad is None


def test_no_weights_are_shared_between_subcomponents():
    function = mlp()
    jacobian = torch.autograd.functional.jacobian(function, torch.randn(1, 5).double())
    assert isinstance(jacobian, Tensor)
    square = jacobian.squeeze()
    assert square.diagonal().all() and not (square - square.diagonal().diag()).any()


# --- hard sigmoids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leak", "incoming", "values", "slopes"),
    [
        ("both", 1.0, [-0.01, 0, 0.5, 1, 1], [0.01, 0.01, 1, 1, 0]),
        ("both", -1.0, [-0.01, 0, 0.5, 1, 1], [-0.01, -0.01, -1, -1, 0]),
        # a descent step would lower the importance: no leak
        ("gradient", 1.0, [0, 0, 0.5, 1, 1], [0, 0, 1, 1, 0]),
        # it would raise it: the leak lets it come back
        ("gradient", -1.0, [0, 0, 0.5, 1, 1], [-0.01, -0.01, -1, -1, 0]),
    ],
)
def test_lower_leaky_hard_sigmoid(
    leak: LowerLeak, incoming: float, values: list[float], slopes: list[float]
):
    x = POINTS.clone().requires_grad_()
    y = lower_leaky_hard_sigmoid(x, leak)
    torch.testing.assert_close(y, torch.tensor(values).float())
    (grad,) = torch.autograd.grad(incoming * y.sum(), x)
    torch.testing.assert_close(grad, torch.tensor(slopes).float())


def test_the_squashings_of_vpd_by_hand():
    z = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], requires_grad=True)
    lower, upper = lower_leaky_hard_sigmoid(z, "gradient"), upper_leaky_hard_sigmoid(z)
    assert lower.tolist() == pytest.approx([0, 0, 0.3, 1, 1])
    assert upper.tolist() == pytest.approx([0, 0, 0.3, 1, 1.005])
    assert torch.equal(lower, upper.clamp(0, 1))
    for incoming, slopes in ((1.0, [0, 0, 1, 1, 0]), (-1.0, [-0.01, -0.01, -1, -1, 0])):
        (grad,) = torch.autograd.grad(lower, z, torch.full((5,), incoming), retain_graph=True)
        assert grad.tolist() == pytest.approx(slopes)
    (grad,) = torch.autograd.grad(upper.sum(), z)
    assert grad.tolist() == pytest.approx([0, 0, 1, 1, 0.01])


def test_the_published_form_of_the_lower_sigmoid_is_the_default():
    assert torch.equal(lower_leaky_hard_sigmoid(POINTS), lower_leaky_hard_sigmoid(POINTS, "both"))


@pytest.mark.parametrize("incoming", [1.0, -1.0])
def test_upper_leaky_hard_sigmoid(incoming: float):
    x = POINTS.clone().requires_grad_()
    y = upper_leaky_hard_sigmoid(x)
    torch.testing.assert_close(y, torch.tensor([0, 0, 0.5, 1, 1.01]))
    (grad,) = torch.autograd.grad(incoming * y.sum(), x)
    torch.testing.assert_close(grad, incoming * torch.tensor([0, 0, 1, 1, 0.01]))


@pytest.mark.parametrize("leak", ["both", "gradient"])
def test_masks_and_minimality_get_the_sigmoids_that_are_theirs(leak: LowerLeak):
    torch.manual_seed(0)
    model = decompose(MLP(), MLP_SITES, lower_leak=leak)
    for site in model.sites.values():
        nn.init.normal_(site.own_importance().get_parameter("out_bias"), std=2)
    inputs = inputs_of(model, torch.randn(64, 4))
    ci = model.causal_importances(inputs)
    for path, site in model.sites.items():
        x = site.own_importance()(inputs[path] @ site.subcomponents.V)
        assert (x < 0).any() and (x > 1).any()
        torch.testing.assert_close(ci.lower[path], lower_leaky_hard_sigmoid(x, leak))
        torch.testing.assert_close(ci.upper[path], upper_leaky_hard_sigmoid(x))
