"""D: how far a prediction is from the target's output. KL in little memory, since the logits of a
language model are the largest tensors of a step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spd.problem import ReconKind

KLKernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""logits of q and log-probabilities of p → KL(p ‖ q) of every row, and its gradient in those logits"""

CHUNK_ELEMENTS = 2**18
"""of the rows that are worked on at a time: what follows then happens in the cache of a CPU core"""


def mean_over_rows(
    values: Float[Tensor, "*rows"], weights: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, ""]:
    """Mean over batch and positions; `weights`, one for each row of the batch, have mean 1."""
    if weights is None:
        return values.mean()
    return (values * weights.reshape(-1, *[1] * (values.dim() - 1))).mean()


def recon_error(
    prediction: Float[Tensor, "*rows d"],
    target: Float[Tensor, "*rows d"],
    kind: ReconKind,
    weights: Float[Tensor, " rows"] | None = None,
    *,
    normalized: bool = False,
    kernel: KLKernel | None = None,
) -> Float[Tensor, ""]:
    """D: mean squared error over every element, or KL(target ‖ prediction) of logits, mean over rows."""
    if kind == "kl":
        rows = kl_per_row(prediction, target, normalized=normalized, kernel=kernel)
        return mean_over_rows(rows, weights)
    if weights is None:
        return (prediction - target).square().mean()
    return mean_over_rows((prediction - target).square().mean(dim=-1), weights)


def kl_divergence(
    logits: Float[Tensor, "*rows d"],
    target_logits: Float[Tensor, "*rows d"],
    weights: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    """KL(target ‖ prediction) over the last axis, mean over the rest."""
    return mean_over_rows(kl_per_row(logits, target_logits), weights)


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
        return (log_p.exp() * (log_p - F.log_softmax(logits, dim=-1))).sum(dim=-1)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return _KLPerRow.apply(logits, log_p, with_gradient, kernel)[0]


def kl_and_gradient(
    logits: Float[Tensor, "*rows d"], log_p: Float[Tensor, "*rows d"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows d"]]:
    """Σ p (log p − log q) of every row, and its gradient in the logits of q, which is q − p."""
    log_q, p = F.log_softmax(logits, dim=-1), log_p.exp()
    return (p * (log_p - log_q)).sum(dim=-1), log_q.exp() - p


class _KLPerRow(torch.autograd.Function):
    """`kl_and_gradient`, the latter kept for the backward pass."""

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
            pieces.append((p * (target_rows - log_q)).sum(dim=-1))
            if with_gradient:
                place.copy_(log_q.exp_().sub_(p))
        values = torch.cat(pieces).reshape(logits.shape[:-1])
        return values, gradient if with_gradient else gradient[..., :0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros as large as the logits would be made
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
