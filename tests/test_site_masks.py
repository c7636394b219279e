"""What a site does in one pass: subcomponents, what they leave over of the matrix, and routing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd.component_model import ComponentModel
from spd.masks import SiteMask
from tests.toy import TiedMLP, decompose

KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), {"0": 5}),
    "conv1d": (lambda: nn.Sequential(Conv1D(3, 4)), {"0": 5}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 3)), {"0": 5}),
    "tied": (TiedMLP, {"enc": 6, "dec": 6}),
}


def made(kind: str) -> tuple[ComponentModel, Tensor]:
    torch.manual_seed(0)
    build, sites = KINDS[kind]
    ties = (("enc", "dec"),) if kind == "tied" else ()
    batch = {"embedding": torch.randint(7, (2, 6)), "tied": torch.rand(2, 6, 5)}
    model = decompose(build(), sites, tied_sites=ties)
    with torch.no_grad():
        for site in model.sites.values():
            if site.bias is not None:
                site.bias.normal_()
    return model, batch.get(kind, torch.randn(2, 6, 4))


@pytest.mark.parametrize(
    ("m", "delta", "expected"),
    [(1.0, 1.0, [4, 6]), (1.0, 0.0, [3, 3]), (0.0, 1.0, [1, 3]), (0.5, 0.25, [1.75, 2.25])],
)
def test_a_matrix_worked_out_by_hand(m: float, delta: float, expected: list[float]):
    """x W = [4, 6] and x V U = [3, 3], so that the subcomponents leave over [1, 3]."""
    model = decompose(nn.Sequential(nn.Linear(2, 2, bias=False)), {"0": 1})
    site = model.sites["0"]
    with torch.no_grad():
        site.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]).T)
        site.subcomponents.V.copy_(torch.tensor([[1.0], [2]]))
        site.subcomponents.U.copy_(torch.tensor([[1.0, 1]]))
    mask = SiteMask(components=torch.tensor([[m]]), delta=torch.tensor([delta]))
    assert model(torch.ones(1, 2), {"0": mask}).tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_on_is_the_target(kind: str):
    model, batch = made(kind)
    output = model.target_forward(batch).output
    masks = {path: SiteMask(delta=torch.ones(2, 6)) for path in model.sites}
    torch.testing.assert_close(model(batch, masks), output)
    assert not torch.allclose(model(batch), output), "without what is left over it is not"


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_site_is_not_routed_it_gives_the_originals_output_itself(kind: str):
    model, batch = made(kind)
    output = model.target_forward(batch).output
    off = {path: torch.zeros(2, 6, site.C) for path, site in model.sites.items()}
    routed = torch.rand(2, 6) < 0.5
    assert 0 < routed.sum() < routed.numel()
    mixed = model(batch, {path: SiteMask(m, routed=routed) for path, m in off.items()})
    everywhere = model(batch, off)
    assert torch.equal(mixed[~routed], output[~routed])
    assert torch.equal(mixed[routed], everywhere[routed])
    assert not torch.equal(mixed[routed], output[routed])


def test_gradients_reach_masks_of_all_kinds_and_none_goes_where_it_is_not_routed():
    model, batch = made("linear")
    components, delta = torch.rand(2, 6, 5), torch.rand(2, 6)
    routed = torch.rand(2, 6) < 0.5
    mask = SiteMask(components.requires_grad_(), delta.requires_grad_(), routed)
    model(batch, {"0": mask}).square().sum().backward()
    for grad in (components.grad, delta.grad):
        assert grad is not None
        assert grad[routed].all() and not grad[~routed].any()
    for parameter in (model.sites["0"].subcomponents.V, model.sites["0"].subcomponents.U):
        assert parameter.grad is not None and parameter.grad.any()


def test_a_tensor_or_a_function_stands_for_a_mask():
    model, batch = made("linear")
    mask = torch.rand(2, 6, 5)
    expected = model(batch, {"0": mask})
    whole = SiteMask(mask, delta=torch.rand(2, 6))
    assert torch.equal(model(batch, {"0": SiteMask(mask)}), expected)
    assert torch.equal(model(batch, {"0": lambda: mask}), expected)
    assert torch.equal(model(batch, {"0": lambda: whole}), model(batch, {"0": whole}))
    assert not torch.equal(model(batch, {"0": whole}), expected)


@pytest.mark.parametrize("n_axes", [1, 2])
def test_importances_of_a_batch_have_no_gradient(n_axes: int):
    model, batch = made("tied")
    batch = batch[0] if n_axes == 1 else batch
    ci = model.importances(batch)
    expected = model.causal_importances(model.target_forward(batch).site_inputs)
    for path in model.sites:
        assert (ci.lower[path].numpy() == expected.lower[path].detach().numpy()).all()
        assert (ci.upper[path].numpy() == expected.upper[path].detach().numpy()).all()
        assert expected.lower[path].requires_grad
