"""Forward and backward passes written by hand; knows no model.

The small MLPs of importance functions, the leaky clamp, and the KL divergence in little memory, since the
logits of a language model are the largest tensors of a step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01
"""slope of the leaky hard sigmoids outside [0, 1]"""
BLOCK_ELEMENTS = 2**17
"""of (batch, C, n_hidden), held at a time on the CPU where nothing is compiled: they stay in the cache"""

KLKernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""logits of q and log-probabilities of p → KL(p ‖ q) of every row, and its gradient in those logits"""

CHUNK_ELEMENTS = 2**18
"""of the rows that are worked on at a time: what follows then happens in the cache of a CPU core"""


def kl_per_row(
    logits: Float[Tensor, "*rows d"],
    target_logits: Float[Tensor, "*rows d"],
    *,
    normalized: bool = False,
    kernel: KLKernel | None = None,
) -> Float[Tensor, "*rows"]:
    """KL(target ‖ prediction) over the last axis; `normalized`: the target's are log-probabilities.

    Gradients reach `logits` without any tensor of their size being stored but that gradient; where
    `target_logits` need one too, or the compiler does the same by itself, by the plain formula. A compiled
    `kernel` makes both at once; else they are made for some rows at a time.
    """
    log_p = target_logits if normalized else F.log_softmax(target_logits, dim=-1)
    if target_logits.requires_grad or torch.compiler.is_compiling():
        return _kl_terms(log_p, F.log_softmax(logits, dim=-1), log_p.exp()).sum(dim=-1)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return _KLPerRow.apply(logits, log_p, with_gradient, kernel)[0]


def kl_and_gradient(
    logits: Float[Tensor, "*rows d"], log_p: Float[Tensor, "*rows d"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows d"]]:
    """Σ p (log p − log q) of every row, and its gradient in the logits of q, which is q − p."""
    log_q, p = F.log_softmax(logits, dim=-1), log_p.exp()
    return _kl_terms(log_p, log_q, p).sum(dim=-1), log_q.exp() - p


def _kl_terms(log_p: Tensor, log_q: Tensor, p: Tensor) -> Tensor:
    """p (log p − log q), and 0 where p is 0 because its logit is −inf."""
    return (p * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0)


class _KLPerRow(torch.autograd.Function):
    """`kl_and_gradient`, whose gradient is kept for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, log_p: Tensor, with_gradient: bool, kernel: KLKernel | None
    ) -> tuple[Tensor, Tensor]:
        if kernel is not None and with_gradient:
            return kernel(logits, log_p)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        pieces = []
        for rows, target_rows, place in _chunks(logits, log_p, gradient):
            log_q, p = F.log_softmax(rows, dim=-1), target_rows.exp()
            pieces.append(_kl_terms(target_rows, log_q, p).sum(dim=-1))
            if with_gradient:
                place.copy_(log_q.exp_().sub_(p))
        values = torch.cat(pieces).reshape(logits.shape[:-1])
        return values, gradient if with_gradient else gradient[..., :0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # otherwise autograd makes zeros as large as the logits
        ctx.save_for_backward(output[1])
        ctx.used_up = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        assert grads[0] is not None, "nothing else can be differentiated"
        assert not ctx.used_up, (
            "the backward pass scales the stored gradient in place, so runs once"
        )
        ctx.used_up = True
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0][..., None]), None, None, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all of them, as matrices of at most `CHUNK_ELEMENTS` (but one row at least)."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    n_rows = max(1, CHUNK_ELEMENTS // flat[0].shape[-1])
    for start in range(0, len(flat[0]), n_rows):
        yield tuple(matrix[start : start + n_rows] for matrix in flat)


# --- importance functions and sigmoids


class _ScalarMLPs(torch.autograd.Function):
    """Σ_k w2_ck gelu(w1_ck h_bc + b1_ck) for `h` [B, C] and weights [C, n_hidden], and its slope in h.

    The backward pass is written out so that, compiled, no tensor of shape (B, C, n_hidden) is ever
    stored, and Φ is computed twice for every element instead of three times: the slope comes with the
    value, and the gradients of the weights are reductions over the batch that recompute what they need.
    `exp2` stands for `exp`, which the compiler would store for reuse. Not compiled, such tensors are made
    for a block of subcomponents at a time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        blocks = _blocks(h, w1.shape[1])
        parts = [_values_and_slopes(h[:, c], w1[c], b1[c], w2[c]) for c in blocks]
        values, slopes = _joined(parts, dim=1)
        return values, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, w1, b1, w2, slope_in_h = ctx.saved_tensors
        # the batch stands last, so that reductions over it run along memory
        h_t, grad_t = h.mT.contiguous(), grads[0].mT.contiguous()
        blocks = _blocks(h, w1.shape[1])
        parts = [_weight_gradients(h_t[c], grad_t[c], w1[c], b1[c], w2[c]) for c in blocks]
        grad_w1, grad_b1, grad_w2 = _joined(parts, dim=0)
        return grads[0] * slope_in_h, grad_w1, grad_b1, grad_w2


def _blocks(h: Float[Tensor, "B C"], n_hidden: int) -> list[slice]:
    """Blocks of subcomponents to compute at a time; one where the compiler or a GPU makes that cheap."""
    B, C = h.shape
    whole = torch.compiler.is_compiling() or h.device.type != "cpu"
    size = C if whole else max(1, BLOCK_ELEMENTS // max(1, B * n_hidden))
    return [slice(start, start + size) for start in range(0, C, size)]


def _joined(parts: Sequence[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(pieces, dim) for pieces in zip(*parts, strict=True))


def _values_and_slopes(
    h: Float[Tensor, "B C"],
    w1: Float[Tensor, "C n_hidden"],
    b1: Float[Tensor, "C n_hidden"],
    w2: Float[Tensor, "C n_hidden"],
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    z = h[..., None] * w1 + b1
    cdf, gelu_slope = normal_cdf_and_gelu_slope(z)
    slope = (gelu_slope * (w1 * w2)).sum(dim=-1)
    # the empty summand makes the compiler compute both sums in one loop, in the forward pass
    return (z * cdf * w2).sum(dim=-1) + 0.0 * slope, slope


def _weight_gradients(
    h_t: Float[Tensor, "C B"],
    grad_t: Float[Tensor, "C B"],
    w1: Float[Tensor, "C n_hidden"],
    b1: Float[Tensor, "C n_hidden"],
    w2: Float[Tensor, "C n_hidden"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, b1 and w2 from the gradient of the output."""
    h_t, grad_t = h_t[:, None], grad_t[:, None]
    z = h_t * w1[..., None] + b1[..., None]
    cdf, slope = normal_cdf_and_gelu_slope(z)
    grad_z = grad_t * slope
    grad_b1 = grad_z.sum(dim=-1) * w2
    grad_w1 = (grad_z * h_t).sum(dim=-1) * w2
    return grad_w1, grad_b1, (grad_t * z * cdf).sum(dim=-1)


def normal_cdf_and_gelu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """Φ(z), and d/dz [z Φ(z)] = Φ(z) + z φ(z)."""
    bell = torch.exp2(z * z * (-0.5 / math.log(2)))
    if z.dtype == torch.float32 and torch.compiler.is_compiling():
        cdf = _normal_cdf_in_float32(z, bell)
    else:
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return cdf, cdf + z * bell / math.sqrt(2 * math.pi)


def _normal_cdf_in_float32(z: Tensor, bell: Tensor) -> Tensor:
    """Φ(z) from exp(−z²/2), to 3e-7: as good as float32 is (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * z.abs())
    series = torch.full_like(t, 0.0)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + 0.5 * coefficient) * t
    tail = series * bell
    return torch.where(z >= 0, 1 - tail, tail)


class _GradientLeak(torch.autograd.Function):
    """clamp(x, 0, 1) whose gradient at and below 0 is 0.01 of the incoming one where that is negative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        below = torch.where(grad < 0, LEAK * grad, torch.zeros_like(grad))
        inside = torch.where(x <= 1, grad, torch.zeros_like(grad))
        return torch.where(x > 0, inside, below)


def scalar_mlps(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Σ_k w2_ck gelu(w1_ck h_bc + b1_ck): `h` is [B, C], the weights [C, n_hidden], the result [B, C]."""
    return _ScalarMLPs.apply(h, w1, b1, w2)[0]


def gradient_leak(x: Tensor) -> Tensor:
    """clamp(x, 0, 1), with the leak in the gradient alone (`lower_leak: gradient`)."""
    return _GradientLeak.apply(x)


WITH_OWN_GRADIENT = (scalar_mlps, gradient_leak)
"""Functions whose backward pass is written out. Below `torch.func.vmap` the compiler looks through them
and differentiates what they compute instead, unless it is told not to."""
