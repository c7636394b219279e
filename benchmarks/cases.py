"""Registered toy experiments on targets that were never trained, which is nothing to the cost of a step."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spd.config import UserError, load_config, read_yaml
from spd.experiments.resid_mlp import model as resid_mlp
from spd.experiments.resid_mlp.train_resid_mlp import RESID_MLP_TARGET
from spd.experiments.targets import TrainedTarget, save_target
from spd.experiments.tms import model as tms
from spd.experiments.tms.train_tms import TMS_TARGET
from spd.problem import Problem
from spd.registry import get_experiment
from spd.runs.console import resolve_device
from spd.settings import PACKAGE_DIR

CONFIG_CLASSES = {"tms": "TMSConfig", "resid_mlp": "ResidMLPConfig"}


class Case(NamedTuple):
    """A registered experiment, or one like it."""

    experiment: str
    overrides: tuple[str, ...] = ()
    """`key=value` of its configuration"""
    target: tuple[str, ...] = ()
    """`key=value` of its target's"""
    n_seeds: int = 1
    """how many runs go side by side"""


def load(case: Case, folder: Path, *overrides: str) -> tuple[Any, Problem]:
    """Its configuration and problem; the untrained target is written to `folder`."""
    registered = get_experiment(case.experiment)
    path = PACKAGE_DIR / registered.config
    if path.parent.name not in CONFIG_CLASSES:
        raise UserError(f"{case.experiment}: only the toy experiments are measured here")
    save_untrained(path.parent / read_yaml(path)["target"], case.target, folder)
    module = importlib.import_module(registered.module)
    config_class = getattr(module, CONFIG_CLASSES[path.parent.name])
    config = load_config(config_class, path, [*case.overrides, *overrides, f"target={folder}"])
    return config, module.build(config, resolve_device(config.device))


def save_untrained(path: Path, overrides: tuple[str, ...], folder: Path) -> None:
    """The target of a training YAML as it is before the first step."""
    kind = TMS_TARGET if path.parent.name == "tms" else RESID_MLP_TARGET
    training: Any = load_config(kind.config_class, path, overrides)
    generator = torch.Generator().manual_seed(0)
    if kind is TMS_TARGET:
        weights = tms.with_tie(tms.initial_weights(training.model, generator=generator))
    else:
        weights = resid_mlp.initial_weights(training.model, generator=generator)
    contiguous = torch.contiguous_format
    copies = {name: w.clone(memory_format=contiguous) for name, w in weights.items()}
    save_target(folder, training, TrainedTarget(copies, {"trained": False}))
