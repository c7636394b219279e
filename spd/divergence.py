"""KL divergence of logits in little memory: the vocabulary of a language model makes them the largest
tensors of a step.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK_ELEMENTS = 2**18
"""of the rows that are worked on at a time: what follows then happens in the cache of a CPU core"""


def kl_per_row(
    logits: Float[Tensor, "*rows d"], target_logits: Float[Tensor, "*rows d"]
) -> Float[Tensor, "*rows"]:
    """KL(target ‖ prediction) over the last axis.

    Gradients reach `logits` without any tensor of their size being stored but that gradient; where
    `target_logits` need one too, or the compiler does the same by itself, by the plain formula.
    """
    if target_logits.requires_grad or torch.compiler.is_compiling():
        log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(target_logits, dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return _KLPerRow.apply(logits, target_logits)


class _KLPerRow(torch.autograd.Function):
    """Σ p (log p − log q), whose gradient in the logits of q is q − p; both found again when needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target_logits: Tensor) -> Tensor:
        pieces = []
        for rows, target_rows in _chunks(logits, target_logits):
            log_q, log_p = F.log_softmax(rows, dim=-1), F.log_softmax(target_rows, dim=-1)
            pieces.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        return torch.cat(pieces).reshape(logits.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, target_logits = ctx.saved_tensors
        (grad,) = grads
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows, target_rows, row_grads, place in _chunks(
            logits, target_logits, grad[..., None], result
        ):
            difference = F.softmax(rows, dim=-1) - F.softmax(target_rows, dim=-1)
            place.copy_(difference * row_grads)
        return result, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all of them, as matrices of at most `CHUNK_ELEMENTS` (but one row at least)."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    n_rows = max(1, CHUNK_ELEMENTS // flat[0].shape[-1])
    for start in range(0, len(flat[0]), n_rows):
        yield tuple(matrix[start : start + n_rows] for matrix in flat)
