"""Decompose a toy model of superposition (paper, section 3.1).

python spd/experiments/tms/tms_decomposition.py spd/experiments/tms/tms_5-2_config.yaml [key=value ...]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from spd.components import resolve_sites
from spd.config import BY_TYPE, NAME_IS_TYPE, UserError
from spd.experiments.sparse_features import (
    InheritedFeatures,
    SparseFeatureConfig,
    SparseFeatures,
)
from spd.experiments.targets import resolve_target
from spd.experiments.tms.model import TMSModel, empty_model
from spd.experiments.tms.plots import TMSVectors
from spd.experiments.tms.train_tms import PROBE, TMS_TARGET, TMSTrainConfig, load_tms_target
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


TIED = ("linear1", "linear2")
"""the matrices of a target with `tied_weights`"""


class TMSConfig(ExperimentConfig):
    """A decomposition of a `TMSModel`."""

    target: str = Field()  # pyright: ignore[reportIncompatibleVariableOverride]
    target_seed: int | None = Field(default=None, ge=0)
    """which of the targets that the training YAML gives with other seeds; null: 0, as it stands there"""
    null: bool = False
    """decompose the target as it is initialised, before any training, with everything else as it is"""
    data: InheritedFeatures = InheritedFeatures()
    batch_size: int = Field(ge=1)
    eval_batch_size: int = Field(default=1024, ge=1)
    tied_sites: tuple[tuple[str, str], ...] | None = None
    """(source, tied): `tied` shares the subcomponents of `source`, transposed; null: as the target's own
    weights are tied, where both are sites; []: none, each matrix is decomposed by itself"""
    anchor: tuple[Literal["linear1", "linear2"], ...] = ()
    """modules in front of which an identity matrix is inserted, to be decomposed as the site
    `anchors.linear1`: a control, as exactly as many subcomponents as it has inputs must come out"""
    figures: TMSFigures = {}  # pyright: ignore[reportIncompatibleVariableOverride]


def build(config: TMSConfig, device: torch.device) -> Problem:
    """Target, data and the known solution: one subcomponent per feature, all of an identity layer."""
    directory = resolve_target(
        config.target,
        TMS_TARGET,
        device=device,
        folders=(Path(__file__).parent,),
        seed=config.target_seed,
        null=config.null,
        check=lambda training: _check_fit(config, training, device),
    )
    target, training = load_tms_target(directory, device)
    data, tied_sites = _check_fit(config, training, device)
    insert_anchors_(target, config.anchor)
    n_features, n_hidden = training.model.n_features, training.model.n_hidden

    def batches(stream: str, batch_size: int) -> SparseFeatures:
        return SparseFeatures(
            data,
            n_features,
            batch_size=batch_size,
            seed=config.seed,
            stream=stream,
            device=device,
        )

    solution: dict[str, Pattern] = {
        "linear1": Identity(n_features),
        "linear2": Identity(n_features, writes=True),
    }
    for index in range(training.model.n_hidden_layers):
        solution[f"hidden_layers.{index}"] = Dense(n_hidden)
    for name, identity in target.anchors.items():
        solution[f"anchors.{name}"] = Dense(identity.get_parameter("weight").shape[1])
    return Problem(
        target=target,
        train_batches=batches("train", config.batch_size),
        eval_batches=batches("eval", config.eval_batch_size),
        choice_batches=batches("choice", config.eval_batch_size),
        independent_rows=True,
        tied_sites=tied_sites,
        probes=PROBE * torch.eye(n_features, device=device),
        solution=solution,
        target_dir=directory,
        device=device,
    )


def insert_anchors_(target: TMSModel, names: Sequence[str]) -> TMSModel:
    """Put identity matrices in front of these modules: the target computes what it computed."""
    for name in names:
        target.insert_identity_(name)
    return target


def _check_fit(
    config: TMSConfig, training: TMSTrainConfig, device: torch.device
) -> tuple[SparseFeatureConfig, tuple[tuple[str, str], ...]]:
    """Inputs and tied sites as they are given or inherited from the target, before that is trained.

    `UserError` where the decomposition and its target do not go together.
    """
    anchored = insert_anchors_(empty_model(training.model), config.anchor)
    sites = resolve_sites(anchored, config.sites)
    for name in config.anchor:
        if f"anchors.{name}" not in sites:
            raise UserError(
                f'anchor: {name}: the identity matrix in front of it is no site; sites."anchors.{name}"=C'
                " makes it one"
            )
    data = config.data.like(training.data, training.model.n_features)
    sizes = {"batch_size": config.batch_size, "eval_batch_size": config.eval_batch_size}
    config.data.check_batches(training.model.n_features, device, **sizes)
    if config.tied_sites is None:
        tied = training.model.tied_weights and all(path in sites for path in TIED)
        if tied and sites[TIED[0]] != sites[TIED[1]]:
            sizes = ", ".join(f"{path} {sites[path]}" for path in TIED)
            raise UserError(
                f"sites: {sizes}, but one matrix of the target is both, and so are its subcomponents:"
                " the same number is needed, or tied_sites=[]"
            )
        return data, (TIED,) if tied else ()
    pairs = [list(pair) for pair in config.tied_sites]
    if not training.model.tied_weights and any(set(pair) == set(TIED) for pair in pairs):
        raise UserError(
            f"tied_sites: {pairs} here, but the target was trained with tied_weights false;"
            " left out, it is as the target is"
        )
    return data, config.tied_sites


if __name__ == "__main__":
    cli(TMSConfig, build)
