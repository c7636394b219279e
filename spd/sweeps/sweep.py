"""`spd-sweep EXPERIMENT N_AGENTS`: several agents work through a sweep of an experiment's settings.

spd-sweep tms_5-2 4 --job_suffix 5m
spd-sweep --status 20261124-101112-abcdef
"""

import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from spd.config import Exit, UserError, counted, parse
from spd.launch.arguments import Arguments, Command, run_command
from spd.launch.job import Job
from spd.launch.resources import (
    LaunchOptions,
    uses_gpus,
    wants_ensemble,
    with_surroundings,
)
from spd.launch.study import (
    JOBS,
    Study,
    cancel,
    create_study,
    find_study,
    job_environment,
    launch,
    new_id,
    no_collector,
    preview,
    print_at_once,
    python,
    statuses,
    study_jobs,
)
from spd.registry import expected_minutes, get_experiment
from spd.settings import PACKAGE_DIR, output_root
from spd.sweeps.definition import Definition, check, only_at_end, read_definition
from spd.sweeps.trials import ONLY_AT_END, trials_of

KIND = "sweeps"
SHIPPED = PACKAGE_DIR / "sweeps" / "sweep_params.yaml"


class SweepOptions(LaunchOptions):
    """The options of `spd-sweep`."""

    job_suffix: str | None = Field(default=None, description="the jobs are named spd-sweep-SUFFIX")
    params: Path = Field(default=SHIPPED, description="YAML file in W&B's sweep schema")
    backend: Literal["auto", "local", "wandb"] = Field(
        default="auto", description="who hands out the points; auto: W&B where an account is found"
    )
    wait: bool = Field(
        default=False, description="on SLURM: wait for the agents, then show the table"
    )
    status: str | None = Field(default=None, description="the best runs of a sweep, by its ID")
    resume: str | None = Field(
        default=None, description="go on with a sweep; with --params, extend it by new points"
    )
    cancel: str | None = Field(
        default=None, description="cancel the SLURM jobs of a sweep, by its ID"
    )

    @field_validator("job_suffix")
    @classmethod
    def _part_of_a_name(cls, suffix: str | None) -> str | None:
        if suffix is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,50}", suffix):
            raise ValueError(f"{suffix!r}: up to 50 letters, digits, '.', '_' and '-' are allowed")
        return suffix


COMMAND = Command(
    name="spd-sweep",
    usage="EXPERIMENT N_AGENTS [key=value ...] [options]\n"
    "       spd-sweep --resume ID [N_AGENTS] [--params FILE] | --status ID | --cancel ID",
    about="Search over an experiment's settings: N_AGENTS jobs, on SLURM where there is one and on\n"
    "this machine elsewhere, take one point after the other, each exactly once. Overrides\n"
    "(key=value) hold for all of them.",
    options=SweepOptions,
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Its exit status is an `Exit`: FAILED where a trial did not end well."""
    run_command(COMMAND, _run, argv)


def _run(arguments: Arguments) -> int:
    given = arguments.options
    options = parse(SweepOptions, with_surroundings(given, COMMAND.name), COMMAND.name)
    if options.joined:
        raise UserError(
            f"nodes {options.nodes}, processes {options.processes}: the runs of a sweep are of one process"
            " each, on one machine; spd-evals joins several"
        )
    words = arguments.positional
    earlier = [name for name in ("status", "resume", "cancel") if name in given]
    if not earlier:
        return _new(words, options)
    action = earlier[0]
    if len(earlier) > 1 or {"backend", "job_suffix", "ensemble"} & given.keys():
        raise UserError(f"--{action} takes the sweep as it is")
    if words and not (action == "resume" and len(words) == 1):
        raise UserError(f"--{action}: {' '.join(words)!r} has no meaning here; see --help")
    study = find_study(KIND, getattr(options, action))
    if action == "cancel":
        print(cancel(study))
        return 0
    if action == "status":
        return _show(study)
    n_agents = _n_agents(words[0]) if words else study.record.get("n_agents", 1)
    if "retries" in given:
        study.record["retries"] = options.retries
    extended = read_definition(options.params) if "params" in given else None
    return _go_on(study, n_agents, extended, options)


def _new(words: Sequence[str], options: SweepOptions) -> int:
    if len(words) < 2:
        raise UserError("spd-sweep: EXPERIMENT and N_AGENTS are needed; see --help")
    experiment, n_agents = words[0], _n_agents(words[1])
    found = get_experiment(experiment)
    experiment = experiment if found.registered else found.config  # by its full path
    overrides = [*words[2:], *(["device=cpu"] if options.cpu else [])]
    definition = read_definition(options.params)
    check(definition, experiment, overrides, str(options.params))
    name, asked = new_id(KIND), {"experiment": experiment, "overrides": overrides}
    backend, project = _backend(options, definition, experiment, overrides)
    asked |= {
        "definition": definition.model_dump(mode="json", exclude_unset=True),
        ONLY_AT_END: only_at_end(definition, experiment, overrides),
        "backend": backend,
        "project": project,
        "name": _job_name(options.job_suffix),
        "n_agents": n_agents,
        "retries": options.n_retries,
    }
    directory = output_root().absolute() / KIND / name
    n = definition.n_points if definition.n_points is not None else n_agents
    together = _side_by_side(options, definition, experiment, backend)
    asked["at_once"] = math.ceil(n / min(n_agents, n)) if together else 1
    jobs = _agents(directory, asked, range(min(n_agents, n)), n, options)
    if options.dry_run:
        for point in definition.points() if definition.method == "grid" else ():
            print("point:", " ".join(f"{key}={value}" for key, value in point.items()))
        preview(directory, jobs, options)
        return 0
    study = create_study(KIND, name, {**asked, "jobs": [job.name for job in jobs]})
    try:
        for job in jobs:
            job.save()
        _module(study).create(study)
        return _launched(study, jobs, n, options)
    except UserError:  # refused: as if nothing had been
        shutil.rmtree(study.directory)
        raise


def _go_on(study: Study, n_agents: int, extended: Definition | None, options: SweepOptions) -> int:
    module = _module(study)
    now = statuses(study, study_jobs(study))
    busy = [name for name, status in now.items() if status.state == "running"]
    busy += [name for name in now if name in study.record["slurm"] and now[name].state == "waiting"]
    if busy:
        raise UserError(f"{study.id}: {', '.join(busy)} still at work; --status shows them")
    if extended is not None:
        corrected = check_extension(study, extended, str(options.params))
        module.check(extended)
        if corrected:
            module.begin_anew(study)
        study.record["definition"] = extended.model_dump(mode="json", exclude_unset=True)
        runs_of = study.record["experiment"], study.record["overrides"]
        study.record[ONLY_AT_END] = only_at_end(extended, *runs_of)
        n_added = module.extend(study)
        study.save()
        print(f"{counted(n_added, 'point')} added")
    left = module.n_waiting(study)
    n = n_agents if left is None else left
    if n == 0:
        print(f"{study.id}: nothing is left to do")
        return _show(study)
    jobs = _agents(study.directory, study.record, range(min(n, n_agents)), n, options)
    for job in jobs:
        job.save()
    study.record["jobs"] = [job.name for job in jobs]
    study.save()
    return _launched(study, jobs, n, options)


def _launched(study: Study, jobs: Sequence[Job], n_points: int, options: SweepOptions) -> int:
    print(f"sweep {study.id}: {study.directory}")
    if study.record["backend"] == "wandb":
        print(f"on W&B: {study.record['sweep']}")
    minutes = sum(job.minutes for job in jobs)
    print(f"{counted(n_points, 'point')} for {counted(len(jobs), 'agent')}")
    try:
        if launch(study, jobs, options, wait=options.wait, expected=minutes):
            return _show(study)
        print(f"how it is going: spd-sweep --status {study.id}")
        return 0
    except KeyboardInterrupt:
        here = not study.record["slurm"]
        print(f"go on with: spd-sweep --{'resume' if here else 'status'} {study.id}")
        return Exit.INTERRUPTED


def _show(study: Study) -> int:
    from spd.sweeps.page import write_page

    with no_collector():
        left = _module(study).n_waiting(study)
        agents = statuses(study, study_jobs(study))
        _, page, good = write_page(study, agents, left, show=print_at_once)
    print(f"page: {page}")
    return 0 if good else 1


def _agents(
    directory: Path, asked: dict, numbers: range, n_points: int, options: SweepOptions
) -> list[Job]:
    """They run the study's own copy of the code."""
    one = expected_minutes(asked["experiment"], asked["overrides"], gpu=uses_gpus(options))
    each = one * math.ceil(n_points / max(1, len(numbers)))
    return [
        Job(
            name=f"agent{number}",
            directory=directory / JOBS / f"agent{number}",
            command=python("spd.sweeps.agent", str(directory), f"agent{number}"),
            env=job_environment(directory / "code", options),
            minutes=each,
            slurm_name=asked["name"],
            retries=asked.get("retries", 0),
        )
        for number in numbers
    ]


def _n_agents(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise UserError(f"N_AGENTS: a whole number of at least 1 is needed, got {word!r}")
    return int(word)


def _job_name(suffix: str | None) -> str:
    return "spd-sweep" if suffix is None else f"spd-sweep-{suffix}"


def _backend(
    options: SweepOptions, definition: Definition, experiment: str, overrides: Sequence[str]
) -> tuple[str, str | None]:
    """Which one, checked, and the project on W&B."""
    from spd.runs.cli import checked_config
    from spd.sweeps.agent import BACKENDS

    project = definition.project or checked_config(experiment, overrides).wandb_project
    wanted = options.backend
    if wanted == "auto":
        wanted = "wandb" if _tracks(project) else "local"
    if wanted == "wandb" and not _tracks(project):
        raise UserError(
            "--backend wandb: needs a project, a key or login, and WANDB_MODE not offline"
        )
    BACKENDS[wanted].check(definition)
    return wanted, project


def _side_by_side(
    options: SweepOptions, definition: Definition, experiment: str, backend: str
) -> bool:
    """Whether every agent runs its points in one process: those of a sweep over seeds alone."""
    seeds_alone = definition.method == "grid" and list(definition.parameters) == ["seed"]
    possible = seeds_alone and definition.early_terminate is None and backend == "local"
    possible = possible and get_experiment(experiment).side_by_side
    if options.ensemble == "always" and not possible:
        raise UserError(
            "--ensemble always: goes with a grid over seed alone, of an experiment that is no language"
            " model, on the local back end and without early_terminate"
        )
    return possible and wants_ensemble(options)


def _tracks(project: str | None) -> bool:
    """Whether a sweep can be made on W&B: as for runs, and not offline."""
    from spd.runs.wandb_run import has_credentials

    mode = os.environ.get("WANDB_MODE")
    offline = mode in ("offline", "dryrun", "disabled")
    return project is not None and not offline and has_credentials()


def check_extension(study: Study, extended: Definition, source: str) -> bool:
    """The same search with other values or more of them; whether its metric has another name.

    That may be as long as no trial has a value.
    """
    check(extended, study.record["experiment"], study.record["overrides"], source)
    before = Definition.model_validate(study.record["definition"])
    corrected = before.metric.name != extended.metric.name
    for place, old, new in (
        ("method", before.method, extended.method),
        ("metric.goal", before.metric.goal, extended.metric.goal),
        ("metric.target", before.metric.target, extended.metric.target),
        ("parameters", list(before.parameters), list(extended.parameters)),
    ):
        if old != new:
            raise UserError(f"{source}: {place}: the sweep has {old}, so it cannot become {new}")
    valued = [trial.name for trial in trials_of(study) if trial.value is not None]
    if corrected and valued:
        raise UserError(
            f"{source}: metric.name: the sweep has {before.metric.name!r}, so it cannot become"
            f" {extended.metric.name!r}: {', '.join(valued)} ended with a value of it"
        )
    return corrected


def _module(study: Study):
    from spd.sweeps.agent import BACKENDS

    return BACKENDS[study.record["backend"]]


if __name__ == "__main__":
    main()
