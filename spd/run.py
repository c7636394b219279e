"""A run as a directory: the command line of an experiment, what it leaves, and `load_run`."""

import argparse
import logging
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from spd import checkpoint, distributed, settings
from spd.command import (
    caught_signals,
    console_log,
    file_log,
    kept_log,
    resolve_device,
    user_errors,
)
from spd.compilation import require_compiler
from spd.component_model import ComponentModel
from spd.config import UserError, differences, load_config, to_yaml
from spd.figures import loss_curves, save_figures
from spd.optimize import Interrupted, Prepared, SPDConfig, prepare, run_steps
from spd.problem import Problem
from spd.provenance import entry_of, import_entry, provenance
from spd.reporting import report_on
from spd.results import format_result, format_table, result_of
from spd.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOG_FILE,
    META_FILE,
    RESULT_FILE,
    TARGET,
    FolderName,
    new_directory,
    read_json,
    read_meta,
    refuse_other_files,
    sole_use,
    write_json,
)
from spd.tracking import FIGURES, NullTracker, RunTracker, download_run, read_metrics, start_wandb

logger = logging.getLogger(__name__)


class ExperimentConfig(SPDConfig):
    """What every experiment's configuration has in common; experiments add their data."""

    experiment: FolderName
    """names the folder of its runs"""
    target: str | None = None
    """a trained directory, `wandb:entity/project/run`, a training YAML; None: `build` makes it"""
    wandb_project: str | None = None
    device: str = "auto"


class Run(NamedTuple):
    """A run, loaded: everything needed to look into it."""

    directory: Path
    config: Any
    prepared: Prepared
    step: int
    """of the checkpoint that was loaded"""
    metrics: list[dict[str, float]]
    """the lines of metrics.jsonl"""

    @property
    def model(self) -> ComponentModel:
        return self.prepared.objective.model

    @property
    def problem(self) -> Problem:
        return self.prepared.problem


Build = Callable[[Any, torch.device], Problem]


def cli(
    config_class: type[ExperimentConfig], build: Build, argv: Sequence[str] | None = None
) -> NoReturn:
    """The entry point of an experiment script: CONFIG.yaml [key=value …] [--resume RUN_DIR].

    Exit status: 0 finished, 1 the run failed, 2 a mistake of the user, 3 its data or model cannot be
    reached, 130 or 143 interrupted.
    """
    parser = argparse.ArgumentParser(description=(build.__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, YAML values")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue that run")
    where = "the run's own directory; a run that is there already is continued"
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help=where)
    args = parser.parse_intermixed_args(argv)
    if args.run_dir is not None and (args.resume is not None or args.config is None):
        parser.error("--run_dir needs a configuration, and no --resume")
    run_dir: Path | None = args.resume or args.run_dir
    settings.load_env()
    with distributed.joined(), console_log(), user_errors():
        begun = distributed.on_leader(
            lambda: run_dir is not None and (run_dir / META_FILE).is_file()
        )
        if run_dir is not None and (begun or args.resume is not None):
            directory = resume(config_class, build, run_dir, args.config, args.overrides)
        elif args.config is not None:
            config = load_config(config_class, Path(args.config), args.overrides)
            directory = start(
                config, build, folder=Path(args.config).parent, directory=args.run_dir
            )
        else:
            parser.error("a configuration or --resume RUN_DIR is needed")
        if distributed.is_leader():
            print(format_result(read_json(directory / RESULT_FILE)))
            print(f"report: {directory / 'report.html'}")
        raise SystemExit(0)


def start(
    config: ExperimentConfig,
    build: Build,
    *,
    folder: Path | None = None,
    directory: Path | None = None,
) -> Path:
    """Run a configuration from the beginning in a new directory, which is returned.

    A target that is not found as it is named is looked for in `folder`, where the YAML file lies.
    """
    directory = distributed.on_leader(lambda: _place_for(config, directory))
    if config.compile is True:
        require_compiler()
    device = resolve_device(config.device)
    with kept_log() as earlier, distributed.leader_first():
        prepared = prepare(build(_with_target_beside(config, folder), device), config)
        if distributed.is_leader():
            _make_directory(directory, config, build, prepared, device)
    return _execute(directory, config, prepared, earlier, resume=False)


def _place_for(config: ExperimentConfig, directory: Path | None) -> Path:
    """Where a new run is to be, after checking what can be checked before anything is built."""
    _check_divisible(config)
    if directory is None:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        directory = settings.output_root() / config.experiment / name
    refuse_other_files(directory)
    return directory


def _check_divisible(config: ExperimentConfig) -> None:
    n, batch_size = distributed.own_share().of, getattr(config, "batch_size", 0)
    if batch_size % n:
        raise UserError(
            f"batch_size: {batch_size} examples cannot be divided among {n} processes; a multiple of"
            f" {n} is allowed"
        )


def _make_directory(
    directory: Path,
    config: ExperimentConfig,
    build: Build,
    prepared: Prepared,
    device: torch.device,
) -> None:
    with new_directory(directory) as partial:
        (partial / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        prepared.problem.save_target(partial / TARGET)
        meta = provenance(device)
        meta["entry"] = {
            "module": entry_of(sys.modules[build.__module__]),
            "config": type(config).__name__,
            "build": build.__name__,
        }
        meta["num_threads"] = torch.get_num_threads()
        meta["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
        meta["n_processes"] = distributed.own_share().of
        write_json(partial / META_FILE, {**meta, "seconds": 0.0})


def resume(
    config_class: type[ExperimentConfig],
    build: Build,
    directory: Path,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Go on with the run in `directory` from its newest checkpoint, under its own configuration."""
    meta = read_meta(directory)
    config = load_config(config_class, directory / CONFIG_FILE)
    if config_path is not None:
        if "=" in config_path and not Path(config_path).exists():
            raise UserError(f"{config_path!r}: a run is resumed under its own configuration")
        given = load_config(config_class, Path(config_path), overrides)
        changed = [
            f"{key} is {here!r} here, but {own!r} in the run's {CONFIG_FILE}"
            for key, here, own in differences(given, config)
        ]
        if changed:
            raise UserError(
                f"--resume {directory}: a run is resumed under its own configuration:\n  "
                + "\n  ".join(changed)
            )
    distributed.on_leader(lambda: _check_divisible(config))
    device = resolve_device(config.device)
    torch.set_num_threads(meta.get("num_threads", torch.get_num_threads()))
    with kept_log() as earlier:
        prepared = prepare(build(_with_own_target(config, directory), device), config)
    newest = checkpoint.latest(directory / CHECKPOINTS)
    if newest is not None:  # all that can be wrong with it, before anything is written
        _load_parameters(prepared, newest)
        if checkpoint.load_state(newest).get("compiled"):
            require_compiler()
    return _execute(directory, config, prepared, earlier, resume=True)


def load_run(directory: str | Path, *, device: str = "cpu") -> Run:
    """A run from its directory or `wandb:entity/project/run-id`, at its newest checkpoint.

    `UserError` if it is no run directory, has no checkpoint yet, or holds a damaged one.
    """
    reference = str(directory)
    path = download_run(reference) if reference.startswith("wandb:") else Path(directory)
    entry = read_meta(path)["entry"]
    module = import_entry(entry["module"])
    config = load_config(getattr(module, entry["config"]), path / CONFIG_FILE)
    build: Build = getattr(module, entry["build"])
    problem = build(_with_own_target(config, path), resolve_device(device))
    prepared = prepare(problem, config)
    newest = checkpoint.latest(path / CHECKPOINTS)
    if newest is None:
        raise UserError(f"{path}: the run has no checkpoint yet")
    _load_parameters(prepared, newest)
    return Run(path, config, prepared, int(newest.name), read_metrics(path))


def results_table(directories: Sequence[Path]) -> str:
    """One line for each finished run, with its figures and whether it is solved."""
    results = {}
    for directory in directories:
        if not (directory / RESULT_FILE).is_file():
            raise UserError(f"{directory}: no {RESULT_FILE}; the run has not finished")
        results[f"{directory.parent.name}/{directory.name}"] = read_json(directory / RESULT_FILE)
    return format_table(results)


def _execute(
    directory: Path,
    config: ExperimentConfig,
    prepared: Prepared,
    earlier: MemoryHandler,
    *,
    resume: bool,
) -> Path:
    """The run itself, between a prepared problem and a finished directory."""
    if not distributed.is_leader():
        return _assist(directory, prepared, resume=resume)
    with (
        sole_use(directory),
        file_log(directory / LOG_FILE, earlier),
        caught_signals() as signals,
    ):
        logger.info("run directory: %s", directory)
        wandb_run = start_wandb(
            config.wandb_project,
            name=f"{config.experiment}-seed{config.seed}-{directory.name}",
            directory=directory,
            config=config.model_dump(mode="json"),
            run_id=directory.name,
        )
        meta = read_meta(directory)
        meta |= {"status": "running", "tracker": wandb_run.place if wandb_run else None}
        write_json(directory / META_FILE, meta)
        tracker = RunTracker(directory, save_figures=save_figures, wandb_run=wandb_run)
        begun, status = time.perf_counter() - meta["seconds"], "failed"
        try:
            run_steps(
                prepared,
                tracker,
                checkpoints=directory / CHECKPOINTS,
                resume=resume,
                stop_requested=lambda: signals[0] if signals else 0,
            )
            tracker.close()
            _finish(directory, config, time.perf_counter() - begun)
            status = "finished"
            return directory
        except Interrupted as stop:
            status = "interrupted"
            logger.info("%s; continue with --resume %s", stop.args[0], directory)
            raise SystemExit(128 + stop.args[1]) from None
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            tracker.close()
            meta |= {"status": status, "seconds": time.perf_counter() - begun}
            write_json(directory / META_FILE, meta)
            if status == "finished":
                report_on(directory, prepared)
            if wandb_run is not None:
                if status == "finished":
                    wandb_run.upload(directory)
                wandb_run.finish(exit_code=0 if status == "finished" else 1)


def _assist(directory: Path, prepared: Prepared, *, resume: bool) -> Path:
    """The same for a process that is not the leader, and writes nothing."""
    with caught_signals() as signals:
        try:
            run_steps(
                prepared,
                NullTracker(),
                checkpoints=directory / CHECKPOINTS,
                resume=resume,
                stop_requested=lambda: signals[0] if signals else 0,
            )
        except Interrupted as stop:
            raise SystemExit(128 + stop.args[1]) from None
    return directory


def _finish(directory: Path, config: ExperimentConfig, seconds: float) -> None:
    history = read_metrics(directory)
    save_figures(directory / FIGURES, config.steps, {"loss_curves": loss_curves(history)})
    write_json(directory / RESULT_FILE, result_of(config, history, seconds))


def _with_target_beside(config: ExperimentConfig, folder: Path | None) -> ExperimentConfig:
    if config.target is None or folder is None or Path(config.target).exists():
        return config
    beside = folder / config.target
    return config.model_copy(update={"target": str(beside)}) if beside.exists() else config


def _with_own_target(config: ExperimentConfig, directory: Path) -> ExperimentConfig:
    own = directory / TARGET
    return config.model_copy(update={"target": str(own)}) if own.is_dir() else config


def _load_parameters(prepared: Prepared, newest: Path) -> None:
    parameters = checkpoint.load_parameters(newest)
    try:
        prepared.objective.model.load_subcomponents(parameters)
    except ValueError as error:
        raise UserError(f"{newest}: does not fit the run's {CONFIG_FILE}: {error}") from None
