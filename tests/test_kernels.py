"""KL divergence piece by piece against the plain formula."""

import pytest
import torch
from torch import Tensor

from spd import kernels as divergence
from spd.kernels import kl_per_row


def plain(logits: Tensor, target: Tensor) -> Tensor:
    p, q = target.softmax(-1), logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def made(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the target's logits, and a gradient for every row, in float64."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    return logits, torch.randn_like(logits), torch.randn(shape[:-1], dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 14, 21, 10**6], ids=lambda n: f"{n} at a time")
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)], ids=str)
def test_values_and_gradients(chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", chunk)
    logits, target, grads = made(*shape)
    own, expected = kl_per_row(logits, target), plain(logits, target)
    torch.testing.assert_close(own, expected)
    (own_grad,) = torch.autograd.grad(own, logits, grads)
    torch.testing.assert_close(own_grad, torch.autograd.grad(expected, logits, grads)[0])


def test_rows_that_do_not_lie_side_by_side():
    logits, target, grads = made(7, 3, 4)
    own = kl_per_row(logits.permute(2, 1, 0), target.permute(2, 1, 0))
    expected = plain(logits.permute(2, 1, 0), target.permute(2, 1, 0))
    torch.testing.assert_close(own, expected)
    grads = grads.new_ones(4, 3)
    (own_grad,) = torch.autograd.grad(own, logits, grads)
    torch.testing.assert_close(own_grad, torch.autograd.grad(expected, logits, grads)[0])


def test_a_target_that_is_trained_gets_its_gradient():
    logits, target, grads = made(5, 7)
    target.requires_grad_()
    own = torch.autograd.grad(kl_per_row(logits, target), (logits, target), grads)
    expected = torch.autograd.grad(plain(logits, target), (logits, target), grads)
    torch.testing.assert_close(own, expected)
    assert own[1].any()


def test_the_gradient_of_logits_far_apart_stays_finite():
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)
    value = kl_per_row(logits, torch.tensor([[-200.0, 0.0]]))
    value.sum().backward()
    assert value.item() == pytest.approx(200)
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0]]))


def test_many_members_side_by_side_equal_one_after_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 14)
    logits, target, _ = made(3, 5, 7)

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        return kl_per_row(logits, target).mean()

    together = torch.func.vmap(torch.func.grad(mean))(logits.detach(), target)
    for i in range(3):
        one = torch.autograd.grad(plain(logits[i], target[i]).mean(), logits)[0]
        torch.testing.assert_close(together[i], one[i])


def test_of_tensors_as_large_as_the_logits_the_gradient_alone_is_stored():
    logits, target, _ = made(6, 4, 7)
    stored: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kl_per_row(logits, target).mean()
    (gradient,) = [tensor for tensor in stored if tensor.numel() >= logits.numel()]
    torch.testing.assert_close(gradient, logits.softmax(dim=-1) - target.softmax(dim=-1))
    with torch.no_grad():
        torch.testing.assert_close(kl_per_row(logits, target), plain(logits, target))


def test_a_target_of_log_probabilities_is_not_normalised_again():
    logits, target, grads = made(6, 4, 7)
    log_p = target.log_softmax(dim=-1)
    own = kl_per_row(logits, log_p, normalized=True)
    torch.testing.assert_close(own, plain(logits, target))
    wrong = kl_per_row(logits, target, normalized=True)
    assert not torch.allclose(wrong, own)
