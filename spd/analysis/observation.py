"""What a model does on one batch, position after position, whatever the batch is made of."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.problem import Batch, Problem, of_ids

Kind = Literal["tokens", "inputs", "rows"]
"""of contexts: pieces of sequences of token ids, the input of a row, or its number alone"""
MOST_WIDE = 1024
"""inputs with more numbers are not kept"""
ENTRIES = 2**25
"""importances that are computed at a time: 128 MB"""


class Observation(NamedTuple):
    """Of one batch."""

    kind: Kind
    contents: Tensor
    """token ids `[batch, position]`, inputs `[batch, 1, width]`, or 0 `[batch, 1]`"""
    upper: dict[str, Float[Tensor, "batch position _C"]]
    """upper-leaky importances of each site that is applied at every position"""
    acts: dict[str, Float[Tensor, "batch position _C"]]
    """‖U_c‖ h_c: what a subcomponent writes has this length, and this sign along U_c"""
    output: Tensor
    kept: Bool[Tensor, "batch position"] | None
    """what counts; None: everything"""


@torch.no_grad()
def observe(model: ComponentModel, problem: Problem | None, batch: Batch) -> Observation:
    """Run the target once; `problem` says which positions count."""
    output, site_inputs = model.target_forward(batch)
    upper = model.causal_importances(site_inputs).upper
    kind, contents = _contents(batch, list(upper.values()))
    shape = contents.shape[:2]
    shown = {path: g for path, g in upper.items() if at_every_position(g, shape)}
    acts = {
        path: model.sites[path].acts(site_inputs[path])
        * model.sites[path].subcomponents.U.norm(dim=1)
        for path in shown
    }
    weigh = None if problem is None else problem.position_weights
    kept = None if weigh is None else weigh(batch).reshape(shape) > 0
    return Observation(
        kind,
        contents,
        {path: at_positions(g, shape) for path, g in shown.items()},
        {path: at_positions(a, shape) for path, a in acts.items()},
        output,
        kept,
    )


def parts_of(batch: Batch, C: int) -> Iterator[Batch]:
    """The batch in parts of so few examples that their importances fit into memory."""
    width = 1
    if isinstance(batch, Tensor) and of_ids(batch):
        width = batch[0].numel()
    n = max(1, ENTRIES // (C * width))
    for begin in range(0, len(batch), n):
        yield batch[begin : begin + n]


def _contents(batch: Batch, importances: list[Tensor]) -> tuple[Kind, Tensor]:
    n = max(g.numel() // g.shape[-1] for g in importances)
    if isinstance(batch, Tensor) and of_ids(batch):
        tokens = batch if batch.dim() == 2 else batch.reshape(-1, 1)
        if any(at_every_position(g, tokens.shape) for g in importances):
            return "tokens", tokens
    elif isinstance(batch, Tensor) and batch.numel() % n == 0 and batch.dim() > 1:
        width = batch.numel() // n
        if width <= MOST_WIDE and n in (len(batch), batch.shape[:-1].numel()):
            return "inputs", batch.reshape(n, 1, width)
    return "rows", torch.zeros(n, 1, dtype=torch.long, device=batch.device)


def at_every_position(x: Tensor, shape: torch.Size) -> bool:
    """Whether there is a row for each position, or one sequence that holds for all."""
    return x.numel() == shape.numel() * x.shape[-1] or x.shape[:-1] == (1, shape[1])


def at_positions(
    x: Float[Tensor, "*rows C"], shape: torch.Size
) -> Float[Tensor, "batch position C"]:
    """From one row per position in this order, or from one sequence that holds for all."""
    C = x.shape[-1]
    if x.numel() == shape.numel() * C:
        return x.reshape(*shape, C)
    return x.expand(*shape, C)
