"""The backward pass of a step, one forward pass after another.

In one graph (`Objective.forward`, which is what is compiled) the passes share what they have in common,
and memory grows with their number. Here each has a graph of its own that is gone before the next begins.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from spd.losses import Loss, StepContext

Passes = Literal["auto", "together", "one_by_one"]


def passes_of(setting: Passes, batch: Tensor) -> Literal["together", "one_by_one"]:
    """`auto` is `one_by_one` for token ids, whose passes are large, and `together` for anything else."""
    if setting == "auto":
        return "together" if batch.is_floating_point() else "one_by_one"
    return setting


def backward_one_by_one(
    losses: Mapping[str, Loss], ctx: StepContext, logits: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add the gradient of Σ coefficient × term to the parameters; the unweighted terms, detached.

    Every part of a term goes back by itself, into V, U and `logits`, leaves that `ctx.ci` is made of:
    what the importance functions gave out. These follow at the end, each computed once more and fed
    with the sum of what arrived at its logits.
    """
    terms = {}
    for name, spec in losses.items():
        values = []
        for part in spec.parts(ctx._replace(term=name)):
            (spec.coeff * part).backward()
            values.append(part.detach())
        terms[name] = torch.stack(values).sum()
    for path, leaf in logits.items():
        if leaf.grad is not None:
            site = ctx.model.sites[path]
            site.importance_logits(ctx.site_inputs[path]).backward(leaf.grad)
    return terms
