"""A run as a directory: the command line of an experiment, what it leaves behind, and `load_run`."""

import argparse
import importlib
import importlib.util
import json
import logging
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from filelock import FileLock, Timeout

from spd import checkpoint, settings
from spd.component_model import ComponentModel
from spd.config import UserError, load_config, to_yaml
from spd.figures import loss_curves, save_figures
from spd.optimize import Interrupted, NonFiniteError, Prepared, SPDConfig, prepare, run_steps
from spd.problem import Problem
from spd.provenance import entry_of, provenance
from spd.report import write_report
from spd.results import format_result, format_table, result_of
from spd.tracking import (
    FIGURES,
    RunTracker,
    WandbRun,
    download_run,
    read_metrics,
    start_wandb,
)

logger = logging.getLogger(__name__)

CONFIG_FILE, META_FILE, RESULT_FILE, LOG_FILE = "config.yaml", "meta.json", "result.json", "log.txt"
CHECKPOINTS, TARGET = "checkpoints", "target"


class ExperimentConfig(SPDConfig):
    """What every experiment's configuration has in common; experiments add their data."""

    experiment: str
    target: str
    """a trained directory, `wandb:entity/project/run`, or a training YAML"""
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


class StoppedBySignal(Exception):
    """A run was stopped by a signal and has written its checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def cli(
    config_class: type[ExperimentConfig], build: Build, argv: Sequence[str] | None = None
) -> NoReturn:
    """The entry point of an experiment script: CONFIG.yaml [key=value …] [--resume RUN_DIR].

    Exit status: 0 finished, 1 the run failed, 2 a mistake of the user, 130 or 143 interrupted.
    """
    parser = argparse.ArgumentParser(description=(build.__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, YAML values")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue that run")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and args.resume is None:
        parser.error("a configuration or --resume RUN_DIR is needed")
    settings.load_env()
    with console_log(), user_errors():
        if args.resume is None:
            config_path = Path(args.config)
            config = load_config(config_class, config_path, args.overrides)
            directory = start(_target_beside(config, config_path), build)
        else:
            directory = resume(config_class, build, args.resume, args.config, args.overrides)
        print(format_result(json.loads((directory / RESULT_FILE).read_text())))
        print(f"report: {directory / 'report.html'}")
    raise SystemExit(0)


def start(config: ExperimentConfig, build: Build) -> Path:
    """Run a configuration from the beginning in a new directory, which is returned."""
    device = resolve_device(config.device)
    prepared = prepare(build(config, device), config)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = settings.output_root() / config.experiment / f"{stamp}-{secrets.token_hex(3)}"
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{directory.parent}: the output root cannot be written ({error.strerror});"
            " set SPD_OUT_DIR to a writable folder"
        ) from None
    (directory / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    if prepared.problem.target_dir is not None:
        shutil.copytree(prepared.problem.target_dir, directory / TARGET)
    meta = provenance(device)
    meta["entry"] = {
        "module": entry_of(sys.modules[build.__module__]),
        "config": type(config).__name__,
        "build": build.__name__,
    }
    meta["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
    _write_json(directory / META_FILE, {**meta, "seconds": 0.0})
    return _execute(directory, config, prepared, resume=False)


def resume(
    config_class: type[ExperimentConfig],
    build: Build,
    directory: Path,
    config_path: str | None,
    overrides: Sequence[str],
) -> Path:
    """Go on with the run in `directory` from its newest checkpoint, under its own configuration."""
    _require_run(directory)
    config = load_config(config_class, directory / CONFIG_FILE)
    if config_path is not None:
        if "=" in config_path and not Path(config_path).exists():
            raise UserError(f"{config_path!r}: a run is resumed under its own configuration")
        given = load_config(config_class, Path(config_path), overrides)
        given = _target_beside(given, Path(config_path))
        for key, value in given.model_dump(mode="json").items():
            own = config.model_dump(mode="json")[key]
            if value != own:
                raise UserError(
                    f"--resume {directory}: {key} is {value!r} here, but {own!r} in the run's"
                    f" {CONFIG_FILE}; a run is resumed under its own configuration"
                )
    device = resolve_device(config.device)
    prepared = prepare(build(_with_own_target(config, directory), device), config)
    return _execute(directory, config, prepared, resume=True)


def load_run(directory: str | Path, *, device: str = "cpu") -> Run:
    """Load a run from its directory or from `wandb:entity/project/run-id`, at its newest checkpoint.

    `UserError` if it is no run directory, has no checkpoint yet, or holds a damaged one.
    """
    reference = str(directory)
    path = download_run(reference) if reference.startswith("wandb:") else Path(directory)
    _require_run(path)
    entry = _read_json(path / META_FILE)["entry"]
    module = _import_entry(entry["module"])
    config = load_config(getattr(module, entry["config"]), path / CONFIG_FILE)
    build: Build = getattr(module, entry["build"])
    problem = build(_with_own_target(config, path), resolve_device(device))
    prepared = prepare(problem, config)
    newest = checkpoint.latest(path / CHECKPOINTS)
    if newest is None:
        raise UserError(f"{path}: the run has no checkpoint yet")
    try:
        prepared.objective.model.load_subcomponents(checkpoint.load_parameters(newest))
    except ValueError as error:
        raise UserError(f"{newest}: does not fit {path / CONFIG_FILE}: {error}") from None
    return Run(path, config, prepared, int(newest.name), read_metrics(path))


def results_table(directories: Sequence[Path]) -> str:
    """One line for each finished run, with its figures and whether it is solved."""
    results = {}
    for directory in directories:
        if not (directory / RESULT_FILE).is_file():
            raise UserError(f"{directory}: no {RESULT_FILE}; the run has not finished")
        results[f"{directory.parent.name}/{directory.name}"] = _read_json(directory / RESULT_FILE)
    return format_table(results)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; anything else must be usable, or it is a `UserError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device: {name!r} cannot be used: {reason}") from None
    return device


@contextmanager
def console_log() -> Iterator[None]:
    """Log lines as plain text on stderr, for the time of a command."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("spd")
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn exceptions into one message and the exit status of a command."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedBySignal as stop:
        raise SystemExit(128 + stop.signum) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _execute(
    directory: Path, config: ExperimentConfig, prepared: Prepared, *, resume: bool
) -> Path:
    """The run itself, between a prepared problem and a finished directory."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{directory}: another process is working on this run") from None
    handler = logging.FileHandler(directory / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("spd").addHandler(handler)
    logger.info("run directory: %s", directory)
    wandb_run = _start_wandb(directory, config)
    meta = _read_json(directory / META_FILE)
    meta |= {"status": "running", "tracker": wandb_run.url if wandb_run else None}
    _write_json(directory / META_FILE, meta)
    tracker = RunTracker(directory, save_figures=save_figures, wandb_run=wandb_run)
    before, status = time.perf_counter(), "failed"

    def seconds() -> float:
        return meta["seconds"] + time.perf_counter() - before

    try:
        with caught_signals() as signals:
            run_steps(
                prepared,
                tracker,
                checkpoints=directory / CHECKPOINTS,
                resume=resume,
                stop_requested=lambda: bool(signals),
            )
        tracker.close()
        _finish(directory, config, seconds())
        status = "finished"
        return directory
    except Interrupted as stop:
        status = "interrupted"
        logger.info("%s; continue with --resume %s", stop, directory)
        raise StoppedBySignal(signals[0]) from None
    finally:
        tracker.close()
        _write_json(directory / META_FILE, {**meta, "status": status, "seconds": seconds()})
        if status == "finished":
            write_report(directory)
        if wandb_run is not None:
            if status == "finished":
                wandb_run.upload(directory)
            wandb_run.finish(exit_code=0 if status == "finished" else 1)
        logging.getLogger("spd").removeHandler(handler)
        handler.close()
        lock.release()


def _finish(directory: Path, config: ExperimentConfig, seconds: float) -> None:
    history = read_metrics(directory)
    save_figures(directory / FIGURES, config.steps, {"loss_curves": loss_curves(history)})
    _write_json(directory / RESULT_FILE, result_of(config, history, seconds))


def _start_wandb(directory: Path, config: ExperimentConfig) -> WandbRun | None:
    return start_wandb(
        config.wandb_project,
        name=f"{config.experiment}-seed{config.seed}-{directory.name}",
        directory=directory,
        config=config.model_dump(mode="json"),
        run_id=directory.name,
    )


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list; the same signal again acts as it always did."""
    noted: list[int] = []
    previous = {}

    def note(signum: int, frame: Any) -> None:
        noted.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield noted
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _target_beside(config: ExperimentConfig, config_path: Path) -> ExperimentConfig:
    """A target named relative to the YAML file that names it is taken from there."""
    beside = config_path.parent / config.target
    found = not Path(config.target).exists() and beside.exists()
    return config.model_copy(update={"target": str(beside)}) if found else config


def _with_own_target(config: ExperimentConfig, directory: Path) -> ExperimentConfig:
    own = directory / TARGET
    return config.model_copy(update={"target": str(own)}) if own.is_dir() else config


def _require_run(directory: Path) -> None:
    for name in (CONFIG_FILE, META_FILE):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: no {name} there; a run directory is expected")


def _import_entry(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise UserError(f"{name}: the script that made this run is gone")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON") from None


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
