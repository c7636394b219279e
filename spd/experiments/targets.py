"""What the toy experiments share about targets: find, train on first use, save and load.

Knows no particular model: an experiment hands over its configuration class and its training.
"""

import argparse
import glob
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spd import settings
from spd.config import (
    BaseConfig,
    Config,
    Exit,
    RunError,
    UserError,
    load_config,
    parse,
    read_yaml,
    report_error,
    to_yaml,
)
from spd.experiments.target_training import TargetTrainConfig, seed_table
from spd.run_files import forbidden, read_json, write_safetensors
from spd.runs.console import resolve_device

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
RECORD_FILE = "training.json"
WANDB_PREFIX = "wandb:"
ALLOWED = "a trained directory, a wandb:entity/project/name reference, or a training YAML"


class TrainedTarget(NamedTuple):
    """A trained target before it is written to disk."""

    weights: dict[str, Tensor]
    """Name in the model -> tensor; no two share memory."""
    record: dict[str, Any]
    """What was tried, as JSON: every seed with its results, and the chosen one."""
    files: Mapping[str, str] = {}
    """Name -> text of further files, of targets that have a format of their own."""


class TargetKind(NamedTuple):
    """What an experiment hands over so that its targets can be found, checked and trained."""

    name: str
    """The value of `kind` in the target's configuration."""
    config_class: type[BaseConfig]
    """Configuration of the training, with a field `kind`."""
    train: Callable[[Any, torch.device], TrainedTarget]
    """Trains by a `config_class`; raises `TargetError` rather than hand over a bad target."""
    summary: Callable[[dict[str, Any]], str] = seed_table
    """Says in words what a training's record holds."""
    check: Callable[[Any, torch.device], None] = lambda config, device: None
    """Raises what is wrong with a training before anything of it is done or written."""
    untrained: Callable[[Any, torch.device], TrainedTarget] | None = None
    """The target as its training begins, from the first seed of a `config_class`."""


def resolve_target(
    target: str,
    kind: TargetKind,
    *,
    device: torch.device,
    folders: Iterable[Path] = (),
    check: Callable[[Any], object] = lambda config: None,
    seed: int | None = None,
    null: bool = False,
) -> Path:
    """The local directory of the target that a decomposition names.

    `target` is a trained directory (or a run directory, whose target is taken), a `wandb:`
    reference, or a training YAML, which is trained on first use. Relative paths are looked for in
    the working directory, then in `folders`. `check` sees a training's configuration before any
    time is spent on it, and raises what is wrong with the decomposition. With a `seed` it is another
    target of the same training (`with_seed`); `UserError` if it is trained already. A `null` one is as that
    training begins: its weights are as they are drawn at random.
    """
    start = time.perf_counter()
    if target.startswith(WANDB_PREFIX):
        from spd.runs.wandb_run import download_run

        _check_no_seed(seed, target)
        directory, what = target_directory(download_run(target)), f"downloaded {target} to"
    else:
        path = _locate(target, folders)
        if path.is_dir():
            _check_no_seed(seed, path)
            directory, what = target_directory(path), "trained directory"
        else:
            config = with_seed(load_config(kind.config_class, path), seed)
            check(config)
            if null:
                return _null_target(path.stem, config, kind, device)
            directory, trained = cached_target(path.stem, config, kind, device=device)
            what = f"trained from {path}:" if trained else f"trained earlier from {path}:"
    check_target(directory, kind)
    if null:
        own = directory / CONFIG_FILE
        config = parse(kind.config_class, read_yaml(own), str(own))
        check(config)
        return _null_target(directory.name, config, kind, device)
    logger.info("target: %s %s (%.1f s)", what, directory, time.perf_counter() - start)
    return directory


def with_seed(config: BaseConfig, seed: int | None) -> BaseConfig:
    """Another training with the same settings: no seed and no batch of it is one of the others'.

    Seed 0, or None, is the training as it is.
    """
    if not seed:
        return config
    assert isinstance(config, TargetTrainConfig), "the training of a toy target"
    own = {"seed": config.seed + seed * config.n_seeds, "data_seed": config.data_seed + seed}
    return config.model_copy(update=own)


def _null_target(stem: str, config: BaseConfig, kind: TargetKind, device: torch.device) -> Path:
    """The directory of the target that this training begins with."""
    assert kind.untrained is not None, f"a {kind.name} target that cannot be untrained"
    kind = kind._replace(train=kind.untrained)
    directory, _ = cached_target(f"{stem}-null", config, kind, device=device)
    logger.info("target: %s, as it is initialised", directory)
    return directory


def _check_no_seed(seed: int | None, target: Path | str) -> None:
    if seed is not None:
        raise UserError(
            f"target_seed: {seed}; the target {target} is trained already, a training YAML is allowed"
        )


def cached_target(
    stem: str, config: BaseConfig, kind: TargetKind, *, device: torch.device
) -> tuple[Path, bool]:
    """Directory of the target trained by `config`, and whether it had to be trained now.

    The name is `stem` and a hash of the resolved configuration. One process trains, others wait for
    it; the directory appears complete or not at all.
    """
    directory = settings.targets_root().absolute() / f"{stem}-{config_hash(config)}"
    if directory.is_dir():
        return directory, False
    kind.check(config, device)
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, directory)
    except OSError as error:
        raise UserError(
            f"{directory.parent}: targets cannot be cached there: {error.strerror or error};"
            " set SPD_OUT_DIR to a writable folder"
        ) from None
    try:
        if directory.is_dir():
            return directory, False
        for remains in directory.parent.glob(f".{glob.escape(directory.name)}.*.partial"):
            shutil.rmtree(remains, ignore_errors=True)  # of a process that was killed here
        logger.info("target: training %s on first use", directory.name)
        trained = kind.train(config, device)
        if not directory.is_dir():
            save_target(directory, config, trained)
        return directory, True
    finally:  # whoever makes a new lock finds the target, or trains it himself
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def save_target(directory: Path, config: BaseConfig, target: TrainedTarget) -> None:
    """Write a target directory; it appears complete or not at all. It must not exist yet."""
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        (partial / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        record = json.dumps(target.record, indent=2, allow_nan=False)
        (partial / RECORD_FILE).write_text(record + "\n", encoding="utf-8")
        for name, text in target.files.items():
            (partial / name).write_text(text, encoding="utf-8")
        write_safetensors(partial / WEIGHTS_FILE, target.weights, {"format": "pt"})
        partial.rename(directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"{directory}: cannot be written: {error.strerror or error}") from None
        raise


def target_directory(directory: Path) -> Path:
    """`directory` itself, or the target inside it if it is the directory of a run."""
    return directory / "target" if (directory / "target").is_dir() else directory


def check_target(directory: Path, kind: TargetKind) -> None:
    """Raise `UserError` unless `directory` holds a target of this kind."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise UserError(f"target {directory}: {name} is missing; expected {ALLOWED}")
    found = read_yaml(directory / CONFIG_FILE).get("kind")
    if found != kind.name:
        raise UserError(
            f"target {directory}: its kind is {found!r}, but this experiment takes {kind.name!r}"
        )


def read_target(directory: Path, config_class: type[Config]) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and weights of a target directory."""
    path = directory / CONFIG_FILE
    config = parse(config_class, read_yaml(path), str(path))
    try:
        return config, load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise forbidden(directory / WEIGHTS_FILE, error) or UserError(
            f"target {directory / WEIGHTS_FILE}: not a readable safetensors file: {error}"
        ) from None


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    """Put the weights into the model, or raise a `UserError` that says how they do not fit."""
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(
            f"target {directory / WEIGHTS_FILE}: does not fit {CONFIG_FILE} beside it: {problems}"
        ) from None


def config_hash(config: BaseConfig) -> str:
    """Eight hexadecimal digits that depend on every value of the resolved configuration."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _locate(target: str, folders: Iterable[Path]) -> Path:
    path = Path(target).expanduser()
    places = [path] if path.is_absolute() else [path, *(folder / path for folder in folders)]
    for place in places:
        if place.is_dir() or (place.is_file() and place.suffix in (".yaml", ".yml")):
            return place
        if place.is_file():
            raise UserError(f"target {str(place)!r}: a file of an unknown sort; expected {ALLOWED}")
    tried = ", ".join(str(place.absolute()) for place in places)
    raise UserError(
        f"target {target!r}: no such file or directory (tried {tried}); expected {ALLOWED}"
    )


def _acquire(lock: FileLock, directory: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("target: %s is being trained by another process; waiting", directory.name)
        lock.acquire()


def target_cli(kind: TargetKind, arguments: list[str] | None = None) -> int:
    """`train_x.py CONFIG.yaml [key=value ...]`: train into the cache, print directory and seeds.

    Returns the exit status; FAILED if no seed is good enough.
    """
    parser = argparse.ArgumentParser(description=f"Train a {kind.name} target into the cache.")
    parser.add_argument("config", type=Path, help="YAML file with the training's settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted keys, YAML values"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings.load_env()
    try:
        config = load_config(kind.config_class, options.config, options.overrides)
        device = resolve_device(options.device)
        directory, trained = cached_target(options.config.stem, config, kind, device=device)
        check_target(directory, kind)
        record = read_json(directory / RECORD_FILE)
        summary, seconds = _said_of(kind, record, directory / RECORD_FILE)
    except (UserError, RunError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted; nothing was saved", file=sys.stderr)
        return Exit.INTERRUPTED
    print(summary)
    print(f"{'trained' if trained else 'trained earlier'} in {seconds} s: {directory}")
    return 0


def _said_of(kind: TargetKind, record: Any, path: Path) -> tuple[str, float]:
    """A training in words, and its seconds, by the record that lies in the cache."""
    try:
        return kind.summary(record), record["seconds"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the record of a training: {reason}") from None
