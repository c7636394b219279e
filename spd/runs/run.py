"""A run as a directory: the command line of an experiment, what it leaves, and `load_run`."""

import secrets
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spd import settings
from spd.component_model import ComponentModel
from spd.config import (
    RunError,
    UserError,
    differences,
    load_config,
    to_yaml,
)
from spd.engine import checkpoint, distributed
from spd.engine.compilation import require_compiler
from spd.engine.fingerprint import objective_fingerprint
from spd.engine.prepare import Prepared, check_side_by_side, prepare
from spd.engine.size import check_step
from spd.engine.starts import with_choice
from spd.noise import own_generators
from spd.problem import Problem
from spd.reports.origin import SIDE_BY_SIDE
from spd.reports.seeds import seeds_page, write_seeds_page
from spd.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    FORMAT,
    META_FILE,
    TARGET,
    new_directory,
    new_name,
    read_meta,
    read_metrics,
    refuse_other_files,
    seed_directory,
    write_json,
)
from spd.runs.console import (
    kept_log,
    lines_of,
    resolve_device,
)
from spd.runs.execution import (
    ExperimentConfig,
    Ready,
    assist,
    execute,
    load_experiment,
)
from spd.runs.kept_starts import chosen_seed
from spd.runs.provenance import entry_of, provenance
from spd.runs.target import MATRICES, Build, Given, digest, reopen
from spd.runs.trust import check_links, check_values, parts_of_run
from spd.runs.verify import Part, check_run, target_digests
from spd.runs.wandb_run import download_run


class Trusted(NamedTuple):
    """What of a run that is gone on with may be followed."""

    everything: bool = False
    named: Collection[str] = ()
    """what the user has named himself"""


NOTHING_MORE = Trusted()


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
    check_entry(type(config), build)
    if config.seeds:
        raise UserError(
            f"seeds: {list(config.seeds)} are several runs and start begins one: call run_seeds(config,"
            " build), or give seed and no seeds"
        )
    directory = distributed.on_leader(lambda: _place_for(config, directory))
    with kept_log() as earlier, distributed.leader_first():
        run = _prepared(config, build, folder, directory, earlier)
        if distributed.is_leader():
            _create(run, build)
    return _alone(run)


def resume(
    config_class: type[ExperimentConfig],
    build: Build,
    directory: Path,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    *,
    trust: bool = False,
    named: Collection[str] = (),
    target: str | Path | nn.Module | None = None,
) -> Path:
    """Go on with the run in `directory` from its newest checkpoint, under its own configuration.

    Code that its configuration names, and links that lead out of it, are followed with `trust`, where the
    same configuration is given, and where the user has `named` them. A `target`, a path or a module with
    the matrices that were decomposed, takes the place of the run's own.
    """
    if config_path is not None and "=" in config_path and not Path(config_path).exists():
        raise UserError(f"{config_path!r}: a run is resumed under its own configuration")
    read_meta(directory)
    given = None
    if config_path is not None:
        given = load_experiment(config_class, Path(config_path), overrides)
    trusted = Trusted(trust, named)
    with kept_log() as earlier:
        return _alone(_reopened(config_class, build, directory, given, earlier, trusted, target))


def run_seeds(
    config: ExperimentConfig, build: Build, *, folder: Path | None = None, base: Path | None = None
) -> tuple[list[Path], dict[Path, RunError]]:
    """Run all of `config.seeds` side by side; the run directories, and the failures among them.

    Each lies in `seed_directory(base, seed)` and is a run like any other; what is there already goes
    on. Runs that are not at the same step, as after a crash, go on one group after the other, and runs with
    several `starts` one by one. A page beside them shows all (`seeds_page`), also where they were stopped.
    """
    check_entry(type(config), build)
    base = base or new_place(config)
    own = {
        seed_directory(base, seed): config.model_copy(update={"seed": seed, "seeds": ()})
        for seed in config.seeds
    }
    begun = [directory for directory in own if (directory / META_FILE).is_file()]
    for directory in (new for new in own if new not in begun):
        refuse_other_files(directory)
    runs = []
    with kept_log() as earlier:
        for directory, given in own.items():
            with lines_of(directory):
                runs.append(
                    _reopened(type(config), build, directory, given, earlier)
                    if directory in begun
                    else _prepared(given, build, folder, directory, earlier)
                )
    groups = [[run] for run in runs]
    if config.starts == 1:
        check_side_by_side([run.prepared for run in runs])
        groups = [list(group) for _, group in groupby(sorted(runs, key=_step), key=_step)]
    for run in runs:
        if run.directory not in begun:
            _create(run, build, {"page": seeds_page(base).name, "runs": [d.name for d in own]})
    failures: dict[Path, RunError] = {}
    write_seeds_page(base, list(own), {})  # which the report of each run links
    try:
        for group in groups:
            failures |= execute(group, go_on_with=f"--run_dir {base} and the same configuration")
    finally:
        write_seeds_page(base, list(own), {run: str(error) for run, error in failures.items()})
    return list(own), failures


def load_run(
    directory: str | Path,
    *,
    device: str | None = None,
    target: str | Path | nn.Module | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    trust: bool = False,
    verify: bool = True,
) -> Run:
    """A run from its directory or `wandb:entity/project/run-id`, at its newest checkpoint.

    Its subcomponents are laid over its own target, or over `target`, a path or a module with the matrices
    that were decomposed; a module gets the sites in place. A target of Hugging Face is loaded in `dtype`
    (float32 or bfloat16; its run says which if it is None) and put onto devices by `device_map`, as
    transformers takes it. The `device` is the CPU if nothing is said, or that of a given module.

    A run may come from anybody: code that it names is imported if it belongs to this package, has been
    imported already, or lies below a folder in SPD_TRUSTED of the shell's environment; other code, and what
    links lead to, with `trust` alone. Its files must be those that it left, by their digests; with
    `verify=False` what was changed is used as it is, and one line in the log says so.

    `UserError` if it is no run directory, has no checkpoint yet, or holds a damaged one, if an argument
    means nothing for this run, or the matrices are others.
    """
    reference = str(directory)
    path = download_run(reference) if reference.startswith("wandb:") else Path(directory)
    config_class, build = parts_of_run(path, trust=trust)
    if verify:
        check_run(path, Part.FILES, own_target=target is None)
    config = load_config(config_class, path / CONFIG_FILE)
    check_values(config, str(path / CONFIG_FILE), trust=trust)
    newest = checkpoint.latest(path / CHECKPOINTS)
    if newest is None:
        choosing = config.starts > 1 and chosen_seed(path) is None
        which = ", as none of its starts has been chosen" if choosing else ""
        raise UserError(f"{path}: the run has no checkpoint yet{which}")
    given = Given(target, dtype, device, device_map)
    with own_generators("build", config.seed):
        prepared = reopen(config, build, path, given, verify=verify)
    what = f"the run's {CONFIG_FILE}" if target is None else "the given target"
    _load_parameters(prepared, newest, what)
    part = Part.CHECKPOINT if verify else Part.ALL
    check_run(path, part, verify=verify, own_target=target is None)
    return Run(path, config, prepared, int(newest.name), read_metrics(path))


def check_entry(config_class: type[ExperimentConfig], build: Build) -> None:
    """`UserError` unless both are found again, by name and in one module, when the run is loaded."""
    module = sys.modules[build.__module__]
    if module.__name__ == "__main__" and getattr(module, "__file__", None) is None:
        raise UserError(
            f"{build.__name__} is defined in a notebook or at a prompt, where a run cannot find it again:"
            " put it and its configuration class into a .py file and import them, or call"
            " spd.decompose(problem, config), which keeps no run"
        )
    if getattr(module, build.__name__, None) is None:
        raise UserError(
            f"{build.__module__}: {build.__qualname__} is no function of the module itself, so that a"
            " run cannot find it again"
        )
    if getattr(module, config_class.__name__, None) is None:
        raise UserError(
            f"{config_class.__name__} is defined in {config_class.__module__} and {build.__name__} in"
            f" {build.__module__}: import the class there too, so that a run finds both in one module"
        )


def new_place(config: ExperimentConfig) -> Path:
    """Where a new run of this configuration lies if nobody says where."""
    folder = settings.output_root() / config.experiment
    return folder / new_name(folder)


def _place_for(config: ExperimentConfig, directory: Path | None) -> Path:
    """Where a new run is to be, after checking what can be checked before anything is built."""
    _check_divisible(config)
    directory = directory or new_place(config)
    refuse_other_files(directory)
    return directory


def _check_divisible(config: ExperimentConfig) -> None:
    n, batch_size = distributed.own_share().of, getattr(config, "batch_size", 0)
    if batch_size % n:
        raise UserError(
            f"batch_size: {batch_size} examples cannot be divided among {n} processes; a multiple of"
            f" {n} is allowed"
        )


def _alone(run: Ready) -> Path:
    if not distributed.is_leader():
        assist(run)
        return run.directory
    failures = execute([run], go_on_with=f"--resume {run.directory}")
    for error in failures.values():
        raise error
    return run.directory


def _prepared(
    config: ExperimentConfig,
    build: Build,
    folder: Path | None,
    directory: Path,
    earlier: MemoryHandler,
) -> Ready:
    """A run that is not in its directory yet."""
    if config.execution.compile is True:
        require_compiler()
    device = resolve_device(config.device)
    with own_generators("build", config.seed):
        problem = build(_with_target_beside(config, folder), device)
        prepared = prepare(problem, config)
        check_step(prepared, getattr(config, "batch_size", 1))
        if config.starts > 1:
            prepared = with_choice(prepared)
    return Ready(directory, config, prepared, earlier)


def _create(run: Ready, build: Build, side_by_side: dict[str, Any] | None = None) -> None:
    """Write what a run can begin with, and the names of those that it is trained side by side with."""
    with new_directory(run.directory) as partial:
        more = {} if side_by_side is None else {SIDE_BY_SIDE: side_by_side}
        write_beginning(partial, run, build, more)


def write_beginning(folder: Path, run: Ready, build: Build, more: Mapping[str, Any]) -> None:
    """Configuration, target and meta.json, with what there is `more` to be recorded, into a new folder."""
    config, problem = run.config, run.prepared.problem
    (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    problem.save_target(folder / TARGET)
    device = resolve_device(config.device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    meta = provenance(named)
    meta["entry"] = {
        "module": entry_of(sys.modules[build.__module__]),
        "config": type(config).__name__,
        "build": build.__name__,
    }
    meta["objective"] = dict(objective_fingerprint())
    meta[MATRICES] = digest(run.prepared.objective.model)
    meta["format"], meta["run_id"] = FORMAT, secrets.token_hex(8)
    meta["config"], meta["digests"] = config.model_dump(mode="json"), target_digests(folder)
    meta["num_threads"] = torch.get_num_threads()
    meta["n_processes"] = distributed.own_share().of
    meta["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(folder / META_FILE, {**meta, **more, "seconds": 0.0})


def _reopened(
    config_class: type[ExperimentConfig],
    build: Build,
    directory: Path,
    given: ExperimentConfig | None,
    earlier: MemoryHandler,
    trusted: Trusted = NOTHING_MORE,
    target: str | Path | nn.Module | None = None,
) -> Ready:
    """A run that lies in its directory; `given` must be its own configuration."""
    meta = read_meta(directory)
    check_links(directory, trust=trusted.everything)
    config = load_config(config_class, directory / CONFIG_FILE)
    changed = [
        f"{key} is {here!r} here, but {own!r} in the run's {CONFIG_FILE}"
        for key, here, own in ([] if given is None else differences(given, config))
    ]
    if changed:
        raise UserError(
            f"--resume {directory}: a run is resumed under its own configuration:\n  "
            + "\n  ".join(changed)
        )
    check_run(directory, Part.FILES, own_target=target is None, goes_on=True)
    if given is None:  # else it says what the user himself says
        place = str(directory / CONFIG_FILE)
        check_values(config, place, trust=trusted.everything, named=trusted.named)
    distributed.on_leader(lambda: _check_divisible(config))
    torch.set_num_threads(meta.get("num_threads", torch.get_num_threads()))
    with own_generators("build", config.seed):
        prepared = reopen(config, build, directory, Given(target, device=config.device))
        if config.starts > 1 and chosen_seed(directory) is None:
            prepared = with_choice(prepared)
    newest = checkpoint.latest(directory / CHECKPOINTS)
    if newest is not None:  # all that can be wrong with it, before anything is written
        _load_parameters(prepared, newest)
        if checkpoint.load_state(newest).get("compiled"):
            require_compiler()
    check_run(directory, Part.CHECKPOINT, own_target=target is None, goes_on=True)
    return Ready(directory, config, prepared, earlier)


def _step(run: Ready) -> int:
    """Where the run goes on."""
    newest = checkpoint.latest(run.directory / CHECKPOINTS)
    return 0 if newest is None else int(newest.name)


def _with_target_beside(config: ExperimentConfig, folder: Path | None) -> ExperimentConfig:
    if config.target is None or folder is None or Path(config.target).exists():
        return config
    beside = folder / config.target
    return config.model_copy(update={"target": str(beside)}) if beside.exists() else config


def _load_parameters(
    prepared: Prepared, newest: Path, what: str = f"the run's {CONFIG_FILE}"
) -> None:
    parameters = checkpoint.load_parameters(newest)
    try:
        prepared.objective.model.load_subcomponents(parameters)
    except ValueError as error:
        raise UserError(f"{newest}: does not fit {what}: {error}") from None
