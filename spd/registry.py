"""The experiments by name: data only, and the command that runs one. Imports nothing heavy."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spd.config import (
    UserError,
    apply_overrides,
    nearest,
    read_yaml,
    report_error,
)
from spd.settings import PACKAGE_DIR, patient_threads

META_FILE = "meta.json"
RUNNER = "spd.runs.cli"
"""runs an experiment that is no script of the package, and goes on with any run"""


class Experiment(NamedTuple):
    """A decomposition that is known by name, or by its YAML file."""

    name: str
    module: str
    """what holds its configuration class and `build`: an importable name, or a file"""
    config: str
    """its YAML file; that of a registered one is relative to the package"""
    minutes: int
    """expected on two CPU cores, target included"""
    expected: str | None = None
    """the result to expect, in words"""
    gpu_minutes: int | None = None
    """expected on one GPU; None: not known"""
    default: bool = True
    """whether `spd-evals` runs it without being told"""
    side_by_side: bool = True
    """whether several seeds can run in one process"""

    @property
    def registered(self) -> bool:
        return self.name in EXPERIMENTS and EXPERIMENTS[self.name].config == self.config

    def command(self, package: Path = PACKAGE_DIR) -> tuple[str, str]:
        """Module and configuration, to come after `python -m`, of the code in `package`."""
        if not self.registered:
            return RUNNER, self.config
        return self.module, str(package / self.config)


def _tms(name: str, minutes: int, *, fast: bool = False, vpd: bool = False) -> Experiment:
    expected = "sensitive to the seed" if fast else "solved on most seeds"
    return Experiment(
        name,
        "spd.experiments.tms.tms_decomposition",
        f"experiments/tms/{name}_config.yaml",
        minutes,
        _NOT_MEASURED if vpd else expected,
        gpu_minutes=None if fast or vpd else 5,
        default=not (fast or vpd),
    )


def _resid_mlp(
    n_layers: int, minutes: int, expected: str, *, gpu_minutes: int | None = None, vpd: bool = False
) -> Experiment:
    name = f"resid_mlp{n_layers}_vpd" if vpd else f"resid_mlp{n_layers}"
    return Experiment(
        name,
        "spd.experiments.resid_mlp.resid_mlp_decomposition",
        f"experiments/resid_mlp/{name}_config.yaml",
        minutes,
        expected,
        gpu_minutes=gpu_minutes,
        default=not vpd,
    )


def _lm(name: str, minutes: int, expected: str, *, default: bool = False) -> Experiment:
    return Experiment(
        name,
        "spd.experiments.lm.lm_decomposition",
        f"experiments/lm/{name}_config.yaml",
        minutes,
        expected,
        default=default,
        side_by_side=False,
    )


_NOT_MEASURED = "not measured yet"
_NOT_HELD = (
    "no known solution; masks that an adversary chooses for each token cost more than ablation"
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        _tms("tms_5-2", 4),
        _tms("tms_5-2_fast", 1, fast=True),
        _tms("tms_5-2-id", 10),
        _tms("tms_40-10", 52),
        _tms("tms_40-10_fast", 5, fast=True),
        _tms("tms_40-10-id", 100),
        _resid_mlp(1, 15, "solved on most seeds", gpu_minutes=3),
        _resid_mlp(2, 150, "sensitive to the seed", gpu_minutes=11),
        _resid_mlp(3, 2500, "sensitive to the seed", gpu_minutes=60),
        _tms("tms_5-2_vpd", 10, vpd=True),
        _tms("tms_5-2-id_vpd", 15, vpd=True),
        _tms("tms_40-10_vpd", 90, vpd=True),
        _tms("tms_40-10-id_vpd", 150, vpd=True),
        _resid_mlp(1, 60, _NOT_MEASURED, vpd=True),
        _resid_mlp(2, 300, _NOT_MEASURED, vpd=True),
        _resid_mlp(3, 500, _NOT_MEASURED, vpd=True),
        _lm("ss_emb", 600, "not measured; needs the Hugging Face hub", default=True),
        _lm("pydoc_emb", 6, _NOT_HELD),
        _lm("pydoc_mlp", 8, _NOT_HELD),
        _lm("pydoc_vpd", 30, _NOT_MEASURED),
        _lm("pile_67m_vpd", 500_000, "not measured; needs GPUs, a target and the Hugging Face hub"),
    )
}


PUBLISHED_KEYS = ("target_module_patterns", "n_ci_mlp_neurons", "tms_model_config")
"""by which a configuration of the published implementation is known"""
UNKNOWN_MINUTES = 60
"""what is assumed of an experiment that is not registered"""


def get_experiment(name: str) -> Experiment:
    """The experiment of that name or in that YAML file, or a `UserError` that lists the names there are."""
    if name.endswith((".yaml", ".yml")):
        return _of_file(Path(name).absolute())
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise UserError(
            f"unknown experiment {name!r}{nearest(name, EXPERIMENTS)} (known: {known}, and YAML files)"
        )
    return EXPERIMENTS[name]


def _of_file(path: Path) -> Experiment:
    """The experiment that a YAML file configures: its `module`, or that of the registered one it names."""
    raw = read_yaml(path)
    refuse_published(raw, path)
    name, module = raw.get("experiment"), raw.get("module")
    if not isinstance(name, str):
        raise UserError(f"{path}: experiment: a name is required, got {name!r}")
    if module is None and name in EXPERIMENTS:
        module = EXPERIMENTS[name].module
    if not isinstance(module, str):
        raise UserError(
            f"{path}: module: {module!r} names no code: the Python file beside it that holds the"
            " configuration class and build, or an importable module, is needed, as"
            f" {name!r} is no registered experiment{nearest(name, EXPERIMENTS)}"
        )
    if module.endswith(".py"):
        module = str((path.parent / module).resolve())
        if not Path(module).is_file():
            raise UserError(f"{path}: module: {module}: no such file")
    return Experiment(name, module, str(path), UNKNOWN_MINUTES, default=False, side_by_side=False)


def refuse_published(raw: Mapping[str, Any], path: Path) -> None:
    """`UserError` if a file is a configuration of the published implementation of June 2025."""
    keys = [key for key in PUBLISHED_KEYS if key in raw]
    if keys and "sites" not in raw:
        raise UserError(
            f"{path}: is a configuration of the published implementation ({keys[0]}); spd-import DIR reads"
            " a directory of its runs, and docs/from_published.md has the names here"
        )


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
    """What runs the experiment of that name; `arguments` come after its configuration.

    To resume a run, which has a configuration of its own, `--resume RUN_DIR` is enough; beside it stand
    `--trust` and `--target DIR` alone.
    """
    experiment = get_experiment(name)
    script, config = experiment.command()
    directory = _resumed(arguments)
    if directory is None:
        return [sys.executable, "-m", script, config, *arguments]
    _check_made_by(experiment, Path(directory))
    made_by = [] if experiment.registered else ["--made_by", config]
    return [sys.executable, "-m", script, *made_by, *arguments]


def _resumed(arguments: Sequence[str]) -> str | None:
    """The run that these arguments go on with; None where there is none, or they say more than that."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--resume", "--target"):
        parser.add_argument(option)
    parser.add_argument("--trust", action="store_true")
    try:
        known, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return None  # the script says what is wrong
    return None if others else known.resume


def _check_made_by(experiment: Experiment, directory: Path) -> None:
    """`UserError` if the run is known to be of another experiment."""
    meta = directory / META_FILE
    if not meta.is_file():
        return  # what is started will say so
    try:
        record = json.loads(meta.read_text(encoding="utf-8"))
        module, own = record["entry"]["module"], record.get("config", {}).get("experiment")
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if module != experiment.module:
        whose = f"of {module}, but {experiment.name!r} is of {experiment.module}"
    elif experiment.registered and own is not None and own != experiment.name:
        whose = f"of {own!r}, not of {experiment.name!r}"
    else:
        return
    raise UserError(
        f"--resume {directory}: a run {whose}; spd-run --resume {directory} goes on with it"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`spd-run NAME [key=value …]`: run an experiment by name or by its YAML file, or go on with a run."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="spd-run",
        usage="spd-run EXPERIMENT [key=value ...] [--run_dir DIR]\n"
        "       spd-run [EXPERIMENT] --resume RUN_DIR [--trust] [--target DIR]",
        description="Run an experiment, or go on with a run.",
    )
    parser.add_argument(
        "experiment", help=f"a YAML file that names its module, or one of: {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="[key=value ...]",
        help="what the experiment's own script takes after its configuration",
    )
    if words and words[0].partition("=")[0] in ("--resume", "--trust", "--target"):
        command = [sys.executable, "-m", RUNNER, *words]  # the run says how it was made
    else:
        args = parser.parse_args(words)
        try:
            command = command_line(args.experiment, args.arguments)
        except UserError as error:
            raise SystemExit(report_error(error)) from None
    os.execve(sys.executable, command, {**os.environ, **patient_threads()})


if __name__ == "__main__":
    main()
