"""The backward pass of a step, one forward pass after another.

In one graph (`Objective.forward`, which is what is compiled) the passes share what they have in common,
and memory grows with their number. Here each has a graph of its own that is gone before the next begins.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from spd.importance import CausalImportances
from spd.losses import Loss, StepContext

Passes = Literal["auto", "together", "one_by_one"]


def passes_of(setting: Passes, batch: Tensor) -> Literal["together", "one_by_one"]:
    """`auto` is `one_by_one` for token ids, whose passes are large, and `together` for anything else."""
    if setting == "auto":
        return "together" if batch.is_floating_point() else "one_by_one"
    return setting


def backward_one_by_one(losses: Mapping[str, Loss], ctx: StepContext) -> dict[str, Tensor]:
    """Add the gradient of Σ coefficient × term to the parameters; the unweighted terms, detached.

    Every part of a term goes back by itself, into V, U and importances that are cut off from what they
    were made by; the importance functions follow once, with the sum of what arrived there.
    """
    cut = CausalImportances(*(_cut_off(values) for values in ctx.ci))
    terms = {}
    for name, spec in losses.items():
        values = []
        for part in spec.parts(ctx._replace(ci=cut, term=name)):
            (spec.coeff * part).backward()
            values.append(part.detach())
        terms[name] = torch.stack(values).sum()
    made = [g for values in ctx.ci for g in values.values()]
    arrived = [leaf.grad for values in cut for leaf in values.values()]
    pairs = [(g, grad) for g, grad in zip(made, arrived, strict=True) if grad is not None]
    if pairs:
        torch.autograd.backward([g for g, _ in pairs], [grad for _, grad in pairs])
    return terms


def _cut_off(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: g.detach().requires_grad_() for path, g in values.items()}
