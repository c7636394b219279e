"""Train the toy model of superposition: many seeds side by side, of which the best is kept.

python spd/experiments/tms/train_tms.py spd/experiments/tms/tms_5-2_target.yaml [key=value ...]
"""

import sys
import time
from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor
from torch.func import functional_call, vmap

from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.experiments.target_training import (
    LossFn,
    TargetTrainConfig,
    Weights,
    check_size,
    eval_losses,
    refuse_lost_features,
    stack_seeds,
    train_side_by_side,
    training_record,
)
from spd.experiments.targets import (
    TargetKind,
    TrainedTarget,
    load_weights,
    read_target,
    target_cli,
)
from spd.experiments.tms.model import (
    TMSModel,
    TMSModelConfig,
    empty_model,
    initial_weights,
    with_tie,
)

PROBE = 0.75
REQUIRED_OUTPUT = 0.375
COMPILE_FROM = 1_000_000
"""Compiling takes some ten seconds: worth it from so many outputs per step."""


class TMSTrainConfig(TargetTrainConfig):
    """Training of a `TMSModel` to return the absolute value of its input."""

    kind: Literal["tms"] = "tms"
    model: TMSModelConfig
    data: SparseFeatureConfig = SparseFeatureConfig()

    @model_validator(mode="after")
    def _data_fits_model(self) -> Self:
        self.data.check_n_features(self.model.n_features)
        return self


def train(config: TMSTrainConfig, device: torch.device) -> TrainedTarget:
    """The best of `config.n_seeds` models; `TargetError` if it does not represent every feature."""
    start = time.perf_counter()
    target = _best(config, train_seeds(config, device), config.seeds, start)
    refuse_lost_features(target.record)
    return target


def untrained(config: TMSTrainConfig, device: torch.device) -> TrainedTarget:
    """The model of the first seed before its training."""
    start, seeds = time.perf_counter(), config.seeds[:1]
    weights = with_tie(_initial(config, seeds, device))
    target = _best(config, weights, seeds, start)
    return target._replace(record={**target.record, "untrained": True})


def _best(
    config: TMSTrainConfig, weights: Weights, seeds: list[int], start: float
) -> TrainedTarget:
    """The one of several seeds that is kept, and the record of all."""
    model, device = empty_model(config.model), weights["linear1.weight"].device
    record = training_record(
        outputs_at_probe(model, weights),
        eval_losses(tms_loss(model), weights, _batches(config, "target eval", device)),
        required=REQUIRED_OUTPUT,
        probe=PROBE,
        seeds=seeds,
        seconds=time.perf_counter() - start,
    )
    chosen = seeds.index(record["chosen_seed"])
    kept = {name: w[chosen].cpu() for name, w in weights.items()}
    contiguous = torch.contiguous_format
    return TrainedTarget(
        weights={name: w.clone(memory_format=contiguous) for name, w in kept.items()},
        record=record,
    )


def train_seeds(config: TMSTrainConfig, device: torch.device) -> Weights:
    """Trained weights of every seed, stacked on axis 0; hidden layers stay as they were drawn."""
    initial = _initial(config, config.seeds, device)
    frozen = {name: w for name, w in initial.items() if name.startswith("hidden_layers.")}
    n_outputs = config.n_seeds * config.batch_size * config.model.n_features
    trained = train_side_by_side(
        tms_loss(empty_model(config.model)),
        {name: w for name, w in initial.items() if name not in frozen},
        _batches(config, "target train", device),
        frozen=frozen,
        config=config,
        compiled=n_outputs >= COMPILE_FROM,
    )
    return with_tie({**trained, **frozen})


def _initial(config: TMSTrainConfig, seeds: list[int], device: torch.device) -> Weights:
    return stack_seeds(
        lambda generator: initial_weights(config.model, generator=generator), seeds, device
    )


def tms_loss(model: TMSModel) -> LossFn:
    """MSE of the output to |x|, for one seed; a missing `linear2.weight` is tied (paper, 3.1)."""

    def loss_fn(weights: Weights, batch: Float[Tensor, "batch n_features"]) -> Float[Tensor, ""]:
        out = functional_call(model, with_tie(weights), (batch,))
        return (out - batch.abs()).square().mean()

    return loss_fn


@torch.no_grad()
def outputs_at_probe(model: TMSModel, weights: Weights) -> Float[Tensor, "seeds n_features"]:
    """Every feature's own output when it alone is active, at 0.75; `weights` hold many seeds."""
    probe = PROBE * torch.eye(model.linear1.in_features, device=weights["linear1.weight"].device)
    outputs = vmap(lambda member: functional_call(model, member, (probe,)))(weights)
    return outputs.diagonal(dim1=-2, dim2=-1)


def load_tms_target(directory: Path, device: torch.device) -> tuple[TMSModel, TMSTrainConfig]:
    """The frozen model in a target directory, in evaluation mode, and how it was trained."""
    config, weights = read_target(directory, TMSTrainConfig)
    model = empty_model(config.model)
    load_weights(model, weights, directory)
    return model.requires_grad_(False).eval().to(device), config


def _batches(config: TMSTrainConfig, stream: str, device: torch.device) -> SparseFeatures:
    return SparseFeatures(
        config.data,
        config.model.n_features,
        batch_size=config.batch_size,
        seed=config.data_seed,
        stream=stream,
        device=device,
    )


def _check(config: TMSTrainConfig, device: torch.device) -> None:
    check_size(config, empty_model(config.model), config.model.n_features, device)


TMS_TARGET = TargetKind(
    name="tms", config_class=TMSTrainConfig, train=train, check=_check, untrained=untrained
)


if __name__ == "__main__":
    sys.exit(target_cli(TMS_TARGET))
