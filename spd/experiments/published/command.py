"""spd-import DIR: a run of the published implementation (June 2025) as a run of this package."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from spd import settings
from spd.config import apply_overrides, parse
from spd.experiments.published.reading import CONFIG_FILE, Published, read_published
from spd.experiments.published.translation import (
    configuration,
    experiment_module,
    parameters,
    target_training,
)
from spd.experiments.targets import TargetKind, TrainedTarget, save_target
from spd.reports.results import format_result, read_result
from spd.run_files import REPORT_FILE, RESULT_FILE
from spd.runs.adopt import Elsewhere, adopt
from spd.runs.cli import parts_of
from spd.runs.console import console_log, user_errors
from spd.runs.provenance import import_entry


def import_published(
    directory: str | Path, overrides: Sequence[str] = (), *, run_dir: Path | None = None
) -> Path:
    """Write a run directory that holds a published run; the directory.

    `overrides` (`key=value`) change what the published configuration says, in the names of this package:
    where a data set or a target lies here, which metrics are computed. `UserError` if `directory` holds
    something else, or a part of a run, before anything is written.
    """
    found = read_published(Path(directory))
    config_class, build = parts_of(experiment_module(found))
    place = str(found.directory / CONFIG_FILE)
    config = parse(config_class, apply_overrides(configuration(found), overrides), place)
    elsewhere = Elsewhere(
        step=found.step,
        parameters=lambda model: parameters(found, model),
        origin={"from": str(found.directory.absolute()), "config": found.config},
    )
    if found.target is None:
        return adopt(config, build, elsewhere, directory=run_dir)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        _write_target(found, target)
        return adopt(config, build, elsewhere, target=str(target), directory=run_dir)


def _write_target(found: Published, folder: Path) -> None:
    """A toy target in the form in which this package keeps one."""
    assert found.target is not None, "of a toy"
    module = import_entry(experiment_module(found))
    kind = next(value for value in vars(module).values() if isinstance(value, TargetKind))
    place = str(found.directory / f"{found.family}_train_config.yaml")
    config = parse(kind.config_class, target_training(found), place)
    weights = {name: own.contiguous().clone() for name, own in found.target.weights.items()}
    save_target(folder, config, TrainedTarget(weights, {"imported": str(found.directory)}))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Turn a directory of the published implementation (June 2025) into a run directory.

    Its decomposition is evaluated here, and gets a report: a finished run, which cannot be gone on with.
    """
    parser = argparse.ArgumentParser(prog="spd-import", description=main.__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help=f"that holds {CONFIG_FILE}")
    changes = "changes of its configuration, in the names of this package"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=changes)
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="the new run's own directory")
    args = parser.parse_intermixed_args(argv)
    settings.load_env()
    with console_log(), user_errors():
        run = import_published(args.directory, args.overrides, run_dir=args.run_dir)
        print(format_result(read_result(run / RESULT_FILE)))
        print(f"run: {run}\nreport: {run / REPORT_FILE}")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
