"""The training loop that toy targets share: many seeds side by side, of which the best is kept.

Knows no particular model: it sees parameters by name and a loss of one seed.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from spd.config import BaseConfig, RunError, counted
from spd.config.limits import Members, Seed, Steps
from spd.config.memory import NUMBER, TRAINED, require_memory
from spd.engine.compilation import CompiledStep
from spd.noise import derive_seed
from spd.schedule import ScheduleConfig, schedule_factor

logger = logging.getLogger(__name__)

Weights = dict[str, Float[Tensor, "..."]]
LossFn = Callable[[Weights, Tensor], Float[Tensor, ""]]

N_EVAL_BATCHES = 10


class TargetError(RunError):
    """The training ran, but gave no target that is fit to be decomposed: exit status 1."""


class TargetTrainConfig(BaseConfig):
    """Settings of the training that all toy targets have in common."""

    seed: Seed = Field(default=0, description="the first seed; member i has seed + i")
    n_seeds: Members = Field(default=16, description="trained side by side, the best is kept")
    data_seed: Seed = Field(default=0, description="all seeds see the same batches")
    steps: Steps
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0.0, allow_inf_nan=False)
    lr_schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.n_seeds))


def check_size(
    config: TargetTrainConfig, model: nn.Module, width: int, device: torch.device
) -> None:
    """`UserError` where `n_seeds` copies of an empty model, or outputs of a `width`, would not fit."""
    each = sum(parameter.numel() for parameter in model.parameters())
    n = config.n_seeds
    what = f"model: n_seeds: {n} models of {each} parameters need"
    require_memory(TRAINED * n * each, what, device)
    what = f"batch_size: {config.batch_size}: the outputs of {n} models of {width} features need"
    require_memory(NUMBER * n * config.batch_size * width, what, device)


def stack_seeds(
    make: Callable[[torch.Generator], Weights], seeds: list[int], device: torch.device
) -> Weights:
    """`make` called once per seed with that seed's own CPU generator; results stacked on axis 0.

    What a seed draws depends on its number alone, not on its neighbours or on the device.
    """
    members = [make(torch.Generator().manual_seed(derive_seed("target", seed))) for seed in seeds]
    return {
        name: torch.stack([member[name] for member in members]).to(device) for name in members[0]
    }


def train_side_by_side(
    loss_fn: LossFn,
    params: Weights,
    batches: Iterator[Tensor],
    *,
    frozen: Weights,
    config: TargetTrainConfig,
    compiled: bool = False,
) -> Weights:
    """AdamW on every seed at once; returns trained copies of `params`, which keep their values.

    Tensors carry a leading axis of seeds, batches are shared. `loss_fn(weights, batch)` is the loss
    of one seed, given `params` and `frozen` without that axis. The gradient of the sum over seeds
    is each seed's own gradient, and AdamW works element by element: no seed feels another.
    """
    params = {name: value.clone().requires_grad_() for name, value in params.items()}
    losses_fn = CompiledStep(
        torch.func.vmap(loss_fn, in_dims=(0, None)), "auto" if compiled else False, config.steps
    )
    optimizer = torch.optim.AdamW(
        list(params.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    with one_thread():
        for step in tqdm(range(config.steps), desc="training the target", disable=None):
            factor = schedule_factor(config.lr_schedule, step, config.steps)
            optimizer.param_groups[0]["lr"] = config.lr * factor
            losses_fn({**params, **frozen}, next(batches)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in params.items()}


@torch.no_grad()
def eval_losses(
    loss_fn: LossFn, weights: Weights, batches: Iterator[Tensor]
) -> Float[Tensor, " seeds"]:
    """Mean loss of every seed over a few held-out batches."""
    losses_fn = torch.func.vmap(loss_fn, in_dims=(0, None))
    with one_thread():
        return torch.stack([losses_fn(weights, next(batches)) for _ in range(N_EVAL_BATCHES)]).mean(
            dim=0
        )


def choose_seed(
    outputs: Float[Tensor, "seeds n_features"],
    losses: Float[Tensor, " seeds"],
    *,
    required: float,
) -> int:
    """Index of the seed that represents most features; among equals, of the lowest held-out loss.

    `outputs` holds each feature's own output at the probe; it is represented from `required` on.
    """
    counts = (outputs >= required).sum(dim=-1).tolist()
    return min(range(len(counts)), key=lambda i: (-counts[i], _or_inf(losses[i].item())))


def training_record(
    outputs: Float[Tensor, "seeds n_features"],
    losses: Float[Tensor, " seeds"],
    *,
    required: float,
    probe: float,
    seeds: list[int],
    seconds: float,
) -> dict[str, Any]:
    """What was tried, as JSON; `chosen_seed` is the one to keep, non-finite numbers are null."""
    rows = [
        {
            "seed": seed,
            "final_loss": _or_none(losses[i].item()),
            "n_represented": int((outputs[i] >= required).sum()),
            "outputs_at_probe": [_or_none(value) for value in outputs[i].tolist()],
        }
        for i, seed in enumerate(seeds)
    ]
    return {
        "chosen_seed": seeds[choose_seed(outputs, losses, required=required)],
        "n_features": outputs.shape[-1],
        "probe": probe,
        "required_output": required,
        "seconds": round(seconds, 1),
        "device": str(outputs.device),
        "torch": torch.__version__,
        "seeds": rows,
    }


def refuse_lost_features(record: dict[str, Any]) -> None:
    """Raise `TargetError`, saying what was tried, if even the chosen seed lost a feature."""
    counts = {row["seed"]: row["n_represented"] for row in record["seeds"]}
    if counts[record["chosen_seed"]] == record["n_features"]:
        return
    tried = ", ".join(f"{seed}: {count}" for seed, count in counts.items())
    raise TargetError(
        f"none of {counted(len(counts), 'seed')} represents all"
        f" {counted(record['n_features'], 'feature')} (own output of at least"
        f" {record['required_output']} at input {record['probe']}).\n"
        f"  Features represented, by seed: {tried}\n"
        f"  Try other seeds (seed={max(counts) + 1}), more of them (n_seeds={2 * len(counts)}) or"
        " more steps."
    )


def seed_table(record: dict[str, Any]) -> str:
    """The seeds of a record as lines of text."""
    lines = [f"{'seed':>6}  {'features':>9}  {'outputs at ' + str(record['probe']):>17}  loss"]
    for row in record["seeds"]:
        outputs = [math.nan if value is None else value for value in row["outputs_at_probe"]]
        features = f"{row['n_represented']}/{record['n_features']}"
        loss = math.nan if row["final_loss"] is None else row["final_loss"]
        chosen = "  <- chosen" if row["seed"] == record["chosen_seed"] else ""
        span = f"{min(outputs):.3f} to {max(outputs):.3f}"
        lines.append(f"{row['seed']:>6}  {features:>9}  {span:>17}  {loss:.3e}{chosen}")
    return "\n".join(lines)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for small tensors: a second one hardly helps, and waits where cores are busy.

    The result then does not depend on the number of cores either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf
