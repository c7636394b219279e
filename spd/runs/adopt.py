"""A decomposition that was trained elsewhere, as the directory of a finished run."""

import json
import logging
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine import checkpoint
from spd.engine.prepare import Prepared, evaluate, prepare
from spd.noise import own_generators
from spd.reports.evaluations import result_of
from spd.reports.figures import draw, save_figures
from spd.reports.report import report_on
from spd.run_files import (
    CHECKPOINTS,
    FIGURES,
    LOG_FILE,
    META_FILE,
    METRICS_FILE,
    RESULT_FILE,
    new_directory,
    read_meta,
    refuse_other_files,
    write_json,
)
from spd.runs.console import file_log, kept_log, resolve_device
from spd.runs.execution import ExperimentConfig, Ready
from spd.runs.run import check_entry, new_place, write_beginning
from spd.runs.target import Build
from spd.runs.verify import final_digests

logger = logging.getLogger(__name__)

IMPORTED = "imported"
"""the key of meta.json under which a run that was trained elsewhere says where it comes from"""


class Elsewhere(NamedTuple):
    """What was found elsewhere."""

    step: int
    """after which the parameters were saved"""
    parameters: Callable[[ComponentModel], Mapping[str, Tensor]]
    """for a model with the sites of the configuration, by its names; `UserError` if they do not fit"""
    origin: dict[str, Any]
    """for meta.json: where it comes from"""


def adopt(
    config: ExperimentConfig,
    build: Build,
    found: Elsewhere,
    *,
    target: str | None = None,
    directory: Path | None = None,
) -> Path:
    """Write a run directory that holds what was found elsewhere, evaluated here; the directory.

    target: where the target lies for now, if not where the configuration says. The directory is there whole
    or not at all; figures and report, which can be made again, come afterwards.
    """
    check_entry(type(config), build)
    directory = directory or new_place(config)
    refuse_other_files(directory)
    made_from = config if target is None else config.model_copy(update={"target": target})
    with kept_log() as earlier, own_generators("adopt", config.seed):
        problem = build(made_from, resolve_device(config.device))
        run = Ready(directory, config, prepare(problem, config), earlier)
        model = run.prepared.objective.model
        try:
            model.load_subcomponents(found.parameters(model))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the parameters do not fit the configuration: {error}") from None
        with new_directory(directory) as partial:
            write_beginning(partial, run, build, {IMPORTED: found.origin})
            _write_rest(partial, config, run.prepared, found.step)
        with file_log(directory / LOG_FILE, earlier):
            logger.info("run directory: %s", directory)
            save_figures(directory / FIGURES, found.step, draw(run.prepared, config.figures))
            report_on(directory, run.prepared)
    return directory


def _write_rest(folder: Path, config: ExperimentConfig, prepared: Prepared, step: int) -> None:
    """Checkpoint, evaluation and result of a run that has come to its end."""
    meta = read_meta(folder)
    nothing_yet = {"bytes": 0, "sha256": sha256().hexdigest()}
    checkpoint.save(
        folder / CHECKPOINTS,
        step,
        parameters=dict(prepared.objective.model.subcomponent_parameters()),
        state={
            "optimizer": None,
            "data": None,
            "carried": prepared.objective.initial_state(),
            "rng": torch.get_rng_state(),
            "num_threads": torch.get_num_threads(),
        },
        keep=1,
        stamp={"run": meta["run_id"], METRICS_FILE: nothing_yet},
    )
    history = [{"step": step, **evaluate(prepared)}]
    lines = "".join(json.dumps(line) + "\n" for line in history)
    (folder / METRICS_FILE).write_text(lines, encoding="utf-8")
    write_json(folder / RESULT_FILE, result_of(config, history, 0.0).as_json())
    meta["digests"] |= final_digests(folder)
    write_json(folder / META_FILE, {**meta, "status": "finished"})
