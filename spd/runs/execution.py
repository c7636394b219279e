"""Runs in their directories, from a prepared problem to a finished report: one, or several side by side."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from spd.config import RunError, UserError, load_config, read_yaml
from spd.config.limits import Seed
from spd.engine.distributed import StoppedTogether
from spd.engine.members import NonFiniteError
from spd.engine.prepare import Prepared
from spd.noise import own_generators
from spd.optimize import Interrupted, Member, Silent, run_side_by_side
from spd.registry import refuse_published
from spd.reports.evaluations import result_of
from spd.reports.figures import Figures, draw, loss_curves, save_figures
from spd.reports.report import report_on
from spd.reports.results import read_result, read_starts, summary_of
from spd.reports.starts import write_starts_page
from spd.run_files import (
    CHECKPOINTS,
    EVALUATION_FILE,
    FIGURES,
    LOG_FILE,
    META_FILE,
    METRICS_FILE,
    RESULT_FILE,
    FolderName,
    read_meta,
    read_metrics,
    sole_use,
    write_json,
)
from spd.runs.console import caught_signals, file_log, lines_of
from spd.runs.kept_starts import choose_start
from spd.runs.stopping import in_one_message, spare_room, write_end
from spd.runs.tracking import RunTracker
from spd.runs.verify import final_digests, without_final
from spd.runs.wandb_run import Labels, WandbRun, new_run_id, start_wandb
from spd.spd_config import SPDConfig

logger = logging.getLogger(__name__)

MAX_SEEDS = 1000
"""side by side in one process"""


class ExperimentConfig(SPDConfig):
    """What every experiment's configuration has in common; experiments add their data."""

    figures: Figures = {}
    figures_every: int | None = Field(default=None, ge=1)
    """besides at the end: drawn at the first evaluation after every so many steps"""

    experiment: FolderName
    """names the folder of its runs"""
    module: str | None = None
    """of an experiment outside the package: the Python file beside the YAML, or the importable module, that
    holds its configuration class and `build`"""
    null_run: str | None = None
    """a finished run of the same configuration with `null: true`, whose figures the report shows beside
    this run's; None: the run `X-null-seed0` beside `X-seed0`, where there is one"""
    target: str | None = None
    """a trained directory, `wandb:entity/project/run`, a training YAML; None: `build` makes it"""
    seeds: Annotated[tuple[Seed, ...], Field(max_length=MAX_SEEDS)] = ()
    """runs side by side in one process, one for each of these instead of `seed`; each is an ordinary run"""
    wandb_project: str | None = None
    wandb_group: str | None = Field(default=None, min_length=1, max_length=128)
    """None: the study that the run belongs to, else the experiment"""
    wandb_job_type: str | None = Field(default=None, min_length=1, max_length=64)
    """None: `evals` or `sweeps` in a study, else `decomposition`"""
    wandb_tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] | None = None
    """None: the experiment and the seed"""
    wandb_notes: str | None = None
    """None: the command, the commit and the run directory"""
    device: str = "auto"

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        twice = [seed for index, seed in enumerate(seeds) if seed in seeds[:index]]
        if twice:
            raise ValueError(f"{twice[0]} is named twice")
        return seeds

    def named_code(self) -> Mapping[str, str]:
        """Key → name, of the classes and functions that `build` imports because a value names them."""
        return {}


def load_experiment(
    config_class: type[ExperimentConfig], path: Path, overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """`load_config`, with the file that `module` names by its full path: a run's copy is read elsewhere."""
    refuse_published(read_yaml(path), path)
    config = load_config(config_class, path, overrides)
    if not config.seeds and any(key.partition("=")[0].strip() == "seeds" for key in overrides):
        raise UserError("seeds: [] names no run; at least one seed, or leave it out")
    if config.module is None or not config.module.endswith(".py"):
        return config
    return config.model_copy(update={"module": str((path.parent / config.module).resolve())})


class Ready(NamedTuple):
    """A run that lies in its directory and can begin or go on."""

    directory: Path
    config: ExperimentConfig
    prepared: Prepared
    earlier: MemoryHandler
    """what was logged before there was a file for it"""


def execute(runs: Sequence[Ready], *, go_on_with: str) -> dict[Path, RunError]:
    """Run to the end what has come to the same step; the failures by run directory.

    Runs go on from their newest checkpoints, where there are any. Asked to stop, each writes a
    checkpoint, one line says what to `go_on_with`, and the process exits with 130 or 143.
    """
    generators = own_generators("execute", runs[0].config.seed)
    with generators, caught_signals() as signals, ExitStack() as stack:
        stack.enter_context(in_one_message(runs[0].directory, go_on_with))  # as it begins
        members = [
            stack.enter_context(_recorded(run, _label(run, runs), go_on_with)) for run in runs
        ]

        def stop_requested() -> int:
            return signals[0] if signals else 0

        try:
            if runs[0].config.starts > 1:
                assert len(runs) == 1, "a run with several starts is alone"
                _choose(runs[0], members[0], stop_requested)
            if any(member.failure is None for member in members):
                run_side_by_side(members, resume=True, stop_requested=stop_requested)
        except Interrupted as stop:
            reason, signal = stop.args
            logger.info("%s; continue with %s", reason, go_on_with)
            raise StoppedTogether(128 + signal) from None
    pairs = zip(runs, members, strict=True)
    return {run.directory: member.failure for run, member in pairs if member.failure}


def _choose(run: Ready, member: Member, stop_requested: Callable[[], int]) -> None:
    try:
        choose_start(run.directory, member, stop_requested=stop_requested)
    except NonFiniteError as error:
        member.failure = error


def assist(run: Ready) -> None:
    """The same for one run in a process that is not its leader, and writes nothing."""
    member = Member(run.prepared, Silent(), run.directory / CHECKPOINTS)
    with caught_signals() as signals:
        try:
            run_side_by_side(
                [member], resume=True, stop_requested=lambda: signals[0] if signals else 0
            )
        except Interrupted as stop:
            raise StoppedTogether(128 + stop.args[1]) from None
    if member.failure is not None:
        raise member.failure


@contextmanager
def _recorded(run: Ready, label: str | None, go_on_with: str) -> Iterator[Member]:
    """A run as the loop takes it; what is there of it when it ends is written afterwards."""
    directory, config, prepared, earlier = run
    with (
        sole_use(directory),
        file_log(directory / LOG_FILE, earlier) as note,
        spare_room(directory) as give_room,
    ):
        with lines_of(directory):
            meta, wandb_run = _begin(directory, config)
        observer = RunTracker(
            directory,
            eval_every=config.eval_every,
            figures_every=config.figures_every,
            draw=lambda step: save_figures(
                directory / FIGURES, step, draw(member.prepared, config.figures)
            ),
            wandb_run=wandb_run,
            label=label,
        )
        begun, status = time.perf_counter() - meta["seconds"], "failed"
        member = Member(
            *(prepared, observer, directory / CHECKPOINTS),
            stamp=lambda: {"run": meta["run_id"], METRICS_FILE: observer.position()},
        )
        try:
            with in_one_message(directory, go_on_with):
                yield member
                if member.failure is None:
                    with lines_of(directory):
                        chosen = run._replace(prepared=member.prepared)  # of several starts
                        _finish(chosen, meta, time.perf_counter() - begun)
                    status = "finished"
                else:
                    meta["reason"] = str(member.failure)
        except (SystemExit, KeyboardInterrupt):
            status = "interrupted"
            raise
        except RunError as error:
            meta["reason"] = str(error)
            raise
        except Exception as error:
            meta["reason"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            if status != "finished":
                meta["digests"] = without_final(meta)
                meta |= {"status": status, "seconds": time.perf_counter() - begun}
                give_room()
                if "reason" in meta:
                    note(f"{status}: {meta['reason']}")
                write_end(directory, meta)
            if wandb_run is not None:
                with lines_of(directory):
                    _end_on_wandb(wandb_run, directory, finished=status == "finished")


def _begin(directory: Path, config: ExperimentConfig) -> tuple[dict[str, Any], WandbRun | None]:
    """Write that a run is running; what is recorded of it, and its run on W&B if there is one."""
    logger.info("run directory: %s", directory)
    meta = read_meta(directory)
    meta.setdefault("wandb_id", new_run_id(directory))
    meta.setdefault("run_id", secrets.token_hex(8))
    meta["digests"] = without_final(meta)
    wandb_run = start_wandb(
        config.wandb_project,
        name=f"{config.experiment}-seed{config.seed}-{directory.name}",
        directory=directory,
        config=config.model_dump(mode="json"),
        run_id=meta["wandb_id"],
        labels=_labels(config, directory, meta),
    )
    meta |= {"status": "running", "tracker": wandb_run.place if wandb_run else None}
    meta.pop("reason", None)  # of a failure before
    (directory / EVALUATION_FILE).unlink(missing_ok=True)
    write_json(directory / META_FILE, meta)
    return meta, wandb_run


def _finish(run: Ready, meta: dict[str, Any], seconds: float) -> None:
    """Write the result of a run and its report; `meta` is that of a finished run then."""
    directory, config = run.directory, run.config
    history = read_metrics(directory)
    save_figures(directory / FIGURES, config.steps, {"loss_curves": loss_curves(history)})
    result = result_of(config, history, seconds, read_starts(directory))
    write_json(directory / RESULT_FILE, result.as_json())
    meta["digests"] |= final_digests(directory)
    meta |= {"status": "finished", "seconds": seconds}
    write_json(directory / META_FILE, meta)
    write_starts_page(directory)
    report_on(directory, run.prepared)


def _end_on_wandb(wandb_run: WandbRun, directory: Path, *, finished: bool) -> None:
    if finished:
        result = read_result(directory / RESULT_FILE)
        wandb_run.summarise(summary_of(result, read_metrics(directory)))
        wandb_run.upload(directory)
    wandb_run.finish(exit_code=0 if finished else 1)


def _labels(config: ExperimentConfig, directory: Path, meta: Mapping[str, Any]) -> Labels:
    """By what W&B groups and finds the run."""
    commit = f"commit {meta.get('commit')}{' with changes' if meta.get('dirty') else ''}"
    notes = f"{meta.get('command')}\n{directory.absolute()} on {meta.get('host')}, {commit}"
    tags = (config.experiment[:64], f"seed{config.seed}")
    return Labels(
        group=config.wandb_group or os.environ.get("WANDB_RUN_GROUP") or config.experiment,
        job_type=config.wandb_job_type or os.environ.get("WANDB_JOB_TYPE") or "decomposition",
        tags=tags if config.wandb_tags is None else config.wandb_tags,
        notes=notes if config.wandb_notes is None else config.wandb_notes,
    )


def _label(run: Ready, runs: Sequence[Ready]) -> str | None:
    """How the progress of several is shown: that of the first stands for all."""
    if len(runs) == 1:
        return ""
    return f"seed {run.config.seed}, first of {len(runs)}" if run is runs[0] else None
