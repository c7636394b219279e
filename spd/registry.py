"""The experiments by name: data only, and the command that runs one. Imports nothing heavy."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from spd.config import (
    UserError,
    apply_overrides,
    nearest,
    read_yaml,
)
from spd.settings import PACKAGE_DIR, patient_threads


class Published(NamedTuple):
    """A published figure and its spread over the features of one run."""

    value: float
    spread: float | None = None


class Expected(NamedTuple):
    """The result to expect, as `spd-evals` judges it over the seeds of an experiment."""

    solved: float | None = None
    """least fraction of the seeds that are solved; None: not judged"""
    means: dict[str, tuple[float, float]] = {}
    """metric key → lowest and highest mean"""


class Experiment(NamedTuple):
    """A registered decomposition."""

    module: str
    """its script, importable"""
    config: str
    """its YAML file, relative to the package"""
    minutes: int
    """expected on two CPU cores, target included"""
    expected: str
    """the result to expect, in words"""
    published: dict[str, Published]
    """metric key → figure of the paper"""
    expects: Expected = Expected()
    """the same as `expected`, to be judged by"""
    gpu_minutes: int | None = None
    """expected on one GPU; None: not known"""
    default: bool = True
    """whether `spd-evals` runs it without being told"""
    side_by_side: bool = True
    """whether several seeds can run in one process"""


def _tms(
    name: str,
    minutes: int,
    expected: str,
    ml2r: Published,
    *,
    gpu_minutes: int | None = 5,
    default: bool = True,
) -> Experiment:
    return Experiment(
        module="spd.experiments.tms.tms_decomposition",
        config=f"experiments/tms/{name}_config.yaml",
        minutes=minutes,
        expected=expected,
        published={"mmcs/linear1": Published(1.0, 0.0), "ml2r/linear1": ml2r},
        expects=Expected(0.5, {"mmcs/linear1": (0.99, 1.001), "ml2r/linear1": (0.95, 1.05)}),
        gpu_minutes=gpu_minutes,
        default=default,
    )


def _lm(name: str, minutes: int, expected: str, expects: Expected, *, default: bool) -> Experiment:
    return Experiment(
        module="spd.experiments.lm.lm_decomposition",
        config=f"experiments/lm/{name}_config.yaml",
        minutes=minutes,
        expected=expected,
        published={},
        expects=expects,
        default=default,
        side_by_side=False,
    )


def _resid_mlp(
    n_layers: int, minutes: int, expected: str, correlation: float, *, gpu_minutes: int
) -> Experiment:
    key = "correlation/neuron_contributions"
    return Experiment(
        module="spd.experiments.resid_mlp.resid_mlp_decomposition",
        config=f"experiments/resid_mlp/resid_mlp{n_layers}_config.yaml",
        minutes=minutes,
        expected=expected,
        published={key: Published(correlation)},
        expects=Expected(means={key: (0.98, 1.001)}),
        gpu_minutes=gpu_minutes,
    )


_RECOVERED = (
    "over 90 % of the cost of ablation avoided with rounded masks",
    Expected(means={"recovered/rounded": (0.9, 1.1)}),
)

EXPERIMENTS: dict[str, Experiment] = {
    "tms_5-2": _tms("tms_5-2", 4, "solved on most seeds", Published(0.993, 0.002)),
    "tms_5-2_fast": _tms(
        "tms_5-2_fast",
        1,
        "solved on most seeds",
        Published(0.993, 0.002),
        gpu_minutes=None,
        default=False,
    ),
    "tms_5-2-id": _tms("tms_5-2-id", 10, "solved on most seeds", Published(0.992, 0.010)),
    "tms_40-10": _tms("tms_40-10", 52, "solved on most seeds", Published(1.010, 0.007)),
    "tms_40-10_fast": _tms(
        "tms_40-10_fast",
        5,
        "solved on most seeds",
        Published(1.010, 0.007),
        gpu_minutes=None,
        default=False,
    ),
    "tms_40-10-id": _tms("tms_40-10-id", 100, "solved on most seeds", Published(1.031, 0.001)),
    "resid_mlp1": _resid_mlp(1, 15, "solved on most seeds", 1.000, gpu_minutes=3),
    "resid_mlp2": _resid_mlp(2, 150, "sensitive to the seed", 0.999, gpu_minutes=11),
    "resid_mlp3": _resid_mlp(3, 2500, "sensitive to the seed", 0.999, gpu_minutes=60),
    "ss_emb": _lm(
        "ss_emb", 600, "not measured; needs the Hugging Face hub", Expected(), default=True
    ),
    "pydoc_emb": _lm("pydoc_emb", 6, *_RECOVERED, default=False),
    "pydoc_mlp": _lm("pydoc_mlp", 8, *_RECOVERED, default=False),
}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name, or a `UserError` that lists the names there are."""
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise UserError(f"unknown experiment {name!r}{nearest(name, EXPERIMENTS)} (known: {known})")
    return EXPERIMENTS[name]


def default_experiments() -> list[str]:
    """Those that `spd-evals` runs without being told."""
    return [name for name, experiment in EXPERIMENTS.items() if experiment.default]


def expected_minutes(name: str, overrides: Sequence[str] = (), *, gpu: bool = False) -> float:
    """How long the experiment takes, target included; in proportion where `steps` is overridden."""
    experiment = get_experiment(name)
    minutes = experiment.gpu_minutes if gpu else None
    config = read_yaml(PACKAGE_DIR / experiment.config)
    steps = apply_overrides(config, overrides).get("steps")
    share = steps / config["steps"] if isinstance(steps, int | float) else 1.0
    return (experiment.minutes if minutes is None else minutes) * share


def command_line(name: str, arguments: Sequence[str] = ()) -> list[str]:
    """What runs the experiment of that name; `arguments` come after its configuration."""
    experiment = get_experiment(name)
    config = str(PACKAGE_DIR / experiment.config)
    return [sys.executable, "-m", experiment.module, config, *arguments]


def main(argv: list[str] | None = None) -> None:
    """`spd-run NAME [key=value …]`: run a registered experiment by name."""
    parser = argparse.ArgumentParser(prog="spd-run", description="Run a registered experiment.")
    parser.add_argument("experiment", help=f"one of: {', '.join(EXPERIMENTS)}")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="[key=value ...] [--resume RUN_DIR]",
        help="what the experiment's own script takes after its configuration",
    )
    args = parser.parse_args(argv)
    try:
        command = command_line(args.experiment, args.arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    os.execve(sys.executable, command, {**os.environ, **patient_threads()})


if __name__ == "__main__":
    main()
