"""Decompose a residual MLP (paper, section 3.2).

python spd/experiments/resid_mlp/resid_mlp_decomposition.py \
    spd/experiments/resid_mlp/resid_mlp1_config.yaml [key=value ...]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from spd.config import BY_TYPE, NAME_IS_TYPE
from spd.experiments.resid_mlp.metrics import LabelPerformanceMetric, NeuronContributionsMetric
from spd.experiments.resid_mlp.model import make_labels
from spd.experiments.resid_mlp.plots import (
    ContributionScatter,
    NeuronContributionsFigure,
    ResponseCurves,
)
from spd.experiments.resid_mlp.problem import ResidMLPProblem, known_solution
from spd.experiments.resid_mlp.train_resid_mlp import (
    PROBE,
    RESID_MLP_TARGET,
    ResidMLPTrainConfig,
    load_resid_mlp_target,
)
from spd.experiments.sparse_features import (
    InheritedFeatures,
    SparseFeatureConfig,
    SparseFeatures,
)
from spd.experiments.targets import resolve_target
from spd.metrics import GeneralMetric
from spd.reports.figures import FigureSpec
from spd.runs.cli import cli
from spd.runs.execution import ExperimentConfig

ResidMLPMetric = GeneralMetric | NeuronContributionsMetric | LabelPerformanceMetric
ResidMLPMetrics = Annotated[Mapping[str, Annotated[ResidMLPMetric, BY_TYPE]], NAME_IS_TYPE]
ResidMLPFigure = FigureSpec | NeuronContributionsFigure | ContributionScatter | ResponseCurves
ResidMLPFigures = Annotated[Mapping[str, Annotated[ResidMLPFigure, BY_TYPE]], NAME_IS_TYPE]


class ResidMLPConfig(ExperimentConfig):
    """A decomposition of a `ResidMLP`."""

    target: str = Field()  # pyright: ignore[reportIncompatibleVariableOverride]
    target_seed: int | None = Field(default=None, ge=0)
    """which of the targets that the training YAML gives with other seeds; null: 0, as it stands there"""
    null: bool = False
    """decompose the target as it is initialised, before any training, with everything else as it is"""
    data: InheritedFeatures = InheritedFeatures()
    batch_size: int = Field(ge=1)
    eval_batch_size: int = Field(default=1024, ge=1)
    metrics: ResidMLPMetrics = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    figures: ResidMLPFigures = {}  # pyright: ignore[reportIncompatibleVariableOverride]


def build(config: ResidMLPConfig, device: torch.device) -> ResidMLPProblem:
    """Target, data, labels and the known solution: each feature read alone, all neurons written."""

    def inputs(training: ResidMLPTrainConfig) -> SparseFeatureConfig:
        sizes = {"batch_size": config.batch_size, "eval_batch_size": config.eval_batch_size}
        config.data.check_batches(training.model.n_features, device, **sizes)
        return config.data.like(training.data, training.model.n_features)

    directory = resolve_target(
        config.target,
        RESID_MLP_TARGET,
        device=device,
        folders=(Path(__file__).parent,),
        seed=config.target_seed,
        null=config.null,
        check=inputs,
    )
    target, training = load_resid_mlp_target(directory, device)
    data, n_features = inputs(training), training.model.n_features

    def batches(stream: str, batch_size: int) -> SparseFeatures:
        return SparseFeatures(
            data,
            n_features,
            batch_size=batch_size,
            seed=config.seed,
            stream=stream,
            device=device,
        )

    return ResidMLPProblem(
        target=target,
        train_batches=batches("train", config.batch_size),
        eval_batches=batches("eval", config.eval_batch_size),
        choice_batches=batches("choice", config.eval_batch_size),
        independent_rows=True,
        probes=PROBE * torch.eye(n_features, device=device),
        solution=known_solution(target),
        target_dir=directory,
        device=device,
        labels=make_labels(training.labels, training.model, device),
    )


if __name__ == "__main__":
    cli(ResidMLPConfig, build)
