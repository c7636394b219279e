"""Whether overrides fit a registered experiment, found out before anything is started."""

import importlib
from collections.abc import Sequence

from spd.config import load_config
from spd.registry import get_experiment
from spd.run import ExperimentConfig
from spd.settings import PACKAGE_DIR


def checked_config(name: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration of a registered experiment with overrides, or what is wrong, as a `UserError`."""
    experiment = get_experiment(name)
    module = importlib.import_module(experiment.module)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ExperimentConfig)
        and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{experiment.module} defines one configuration class"
    return load_config(classes[0], PACKAGE_DIR / experiment.config, overrides)
