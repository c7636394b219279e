"""Decompose a toy model of superposition (paper, section 3.1).

python spd/experiments/tms/tms_decomposition.py spd/experiments/tms/tms_5-2_config.yaml [key=value ...]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from spd.components import resolve_sites
from spd.config import BY_TYPE, NAME_IS_TYPE, UserError
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.experiments.targets import resolve_target
from spd.experiments.tms.model import TMSModelConfig, empty_model
from spd.experiments.tms.plots import TMSVectors
from spd.experiments.tms.train_tms import PROBE, TMS_TARGET, load_tms_target
from spd.problem import (
    Dense,
    Identity,
    Pattern,
    Problem,
)
from spd.reports.figures import FigureSpec
from spd.runs.cli import cli
from spd.runs.execution import ExperimentConfig

TMSFigures = Annotated[Mapping[str, Annotated[FigureSpec | TMSVectors, BY_TYPE]], NAME_IS_TYPE]


class TMSConfig(ExperimentConfig):
    """A decomposition of a `TMSModel`."""

    target: str = Field()  # pyright: ignore[reportIncompatibleVariableOverride]
    data: SparseFeatureConfig = SparseFeatureConfig()
    batch_size: int = Field(ge=1)
    eval_batch_size: int = Field(default=1024, ge=1)
    tied_sites: tuple[tuple[str, str], ...] = ()
    """(source, tied): `tied` shares the subcomponents of `source`, transposed"""
    figures: TMSFigures = {}  # pyright: ignore[reportIncompatibleVariableOverride]


def build(config: TMSConfig, device: torch.device) -> Problem:
    """Target, data and the known solution: one subcomponent per feature, all of an identity layer."""
    directory = resolve_target(
        config.target,
        TMS_TARGET,
        device=device,
        folders=(Path(__file__).parent,),
        check=lambda training: _check_fit(config, training.model),
    )
    target, training = load_tms_target(directory, device)
    _check_fit(config, training.model)
    n_features, n_hidden = training.model.n_features, training.model.n_hidden

    def batches(stream: str, batch_size: int) -> SparseFeatures:
        return SparseFeatures(
            config.data,
            n_features,
            batch_size=batch_size,
            seed=config.seed,
            stream=stream,
            device=device,
        )

    solution: dict[str, Pattern] = {
        "linear1": Identity(n_features),
        "linear2": Identity(n_features),
    }
    for index in range(training.model.n_hidden_layers):
        solution[f"hidden_layers.{index}"] = Dense(n_hidden)
    return Problem(
        target=target,
        train_batches=batches("train", config.batch_size),
        eval_batches=batches("eval", config.eval_batch_size),
        independent_rows=True,
        tied_sites=config.tied_sites,
        probes=PROBE * torch.eye(n_features, device=device),
        solution=solution,
        target_dir=directory,
        device=device,
    )


def _check_fit(config: TMSConfig, model: TMSModelConfig) -> None:
    """What can be wrong between a decomposition and its target, before that is trained."""
    resolve_sites(empty_model(model), config.sites)
    try:
        config.data.check_n_features(model.n_features)
    except ValueError as error:
        raise UserError(f"data: {error}") from None


if __name__ == "__main__":
    cli(TMSConfig, build)
