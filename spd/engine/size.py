"""Whether a step of training fits into memory, by the least that it holds at a time."""

import math

import torch

from spd.config.memory import NUMBER, TRAINED, require_memory
from spd.engine.prepare import Prepared
from spd.engine.step import passes_of


@torch.no_grad()
def check_step(prepared: Prepared, batch_size: int) -> None:
    """`UserError` where the parameters, or what a step draws for a batch, would not fit.

    A batch of training is taken to have the rows of a held-out one, as many times as it has more examples.
    """
    objective, first, config = prepared.objective, prepared.eval_batches[0], prepared.config
    n_parameters = sum(p.numel() for p in objective.model.subcomponent_parameters().values())
    what = f"sites: {n_parameters} parameters of subcomponents and importance functions need"
    require_memory(TRAINED * n_parameters, what, first.device)
    n_kept = 0
    for key, shape in objective.source_shapes(first).items():
        more = batch_size / len(first) if key in objective.kept_by_example else 1.0
        n_kept += int(
            5 * math.prod(shape) * more
        )  # two moments, a probe and its gradient beside it
    what = f"batch_size: {batch_size}: the sources of adversaries need"
    require_memory(NUMBER * n_kept, what, first.device)
    noise = objective.noise(first, stream="eval", seed=config.seed, step=0)
    sizes = [math.prod(shape) for shape in noise.shapes.values()]
    if not sizes:
        return
    together = passes_of(config.execution.passes, objective.model) == "together"
    numbers = sum(sizes) if together else max(sizes)
    draws = "all passes" if together else "one pass"
    what = f"batch_size: {batch_size}: the random masks of {draws} of a step need"
    require_memory(NUMBER * numbers * batch_size // len(first), what, first.device)
