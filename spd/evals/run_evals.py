"""`spd-evals`: one job per experiment and seed, and one table of what came out.

spd-evals --experiments tms_5-2-id,resid_mlp2,resid_mlp3 --seeds 5
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from spd.config import Exit, UserError, parse, shown
from spd.evals.controls import controls_of
from spd.launch.arguments import (
    Arguments,
    Command,
    run_command,
    split_list,
)
from spd.launch.job import ENDED, Job
from spd.launch.resources import (
    LaunchOptions,
    has_slurm,
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
    joined_python,
    launch,
    new_id,
    no_collector,
    preview,
    print_at_once,
    statuses,
    study_jobs,
)
from spd.registry import default_experiments, expected_minutes, get_experiment
from spd.run_files import seed_directory
from spd.settings import output_root

KIND = "evals"
DEFAULT = tuple(default_experiments())
MOST_SEEDS = 100_000
"""of one study"""


def _seed_list(value: Any) -> Any:
    """`5` is the first five seeds, `0,3` or `[3]` are just these."""
    if isinstance(value, str) and not ("," in value or "[" in value):
        try:
            n = int(value)
        except ValueError:
            return [value]
        if not 1 <= n <= MOST_SEEDS:
            raise ValueError(f"from 1 to {MOST_SEEDS:,} are allowed, got {n}")
        return list(range(n))
    return split_list(value)


class EvalsOptions(LaunchOptions):
    """The options of `spd-evals`."""

    experiments: Annotated[tuple[str, ...], BeforeValidator(split_list)] = Field(
        default=DEFAULT, min_length=1, description="names or YAML files, with commas between"
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seed_list)] = Field(
        default=(0,), min_length=1, description="how many (5), or which (0,3,4)"
    )
    target_seeds: Annotated[tuple[int, ...], BeforeValidator(_seed_list)] = Field(
        default=(), description="of toy targets: how many, or which; every seed runs on each"
    )
    nulls: bool = Field(
        default=False,
        description="each experiment also on a target as it is initialised and, of toys, with an identity"
        " matrix inserted and with pairs of features always on together",
    )
    wait: bool = Field(default=False, description="on SLURM: wait for the jobs, then collect")
    collect: str | None = Field(
        default=None, description="the table of an earlier study, by its ID"
    )
    resume: str | None = Field(default=None, description="go on with a study, by its ID")
    cancel: str | None = Field(
        default=None, description="cancel the SLURM jobs of a study, by its ID"
    )

    @field_validator("experiments")
    @classmethod
    def _registered(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _each_once(tuple(get_experiment(name).name for name in names))
        return names

    @field_validator("seeds", "target_seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in seeds):
            raise ValueError("a seed is at least 0")
        return _each_once(seeds)


COMMAND = Command(
    name="spd-evals",
    usage="[key=value ...] [options]",
    about="Run experiments, on SLURM where there is one and on this machine elsewhere,\n"
    "and compare the results with the published ones. Overrides (key=value) apply to every\n"
    "experiment. Exit status 1 if a job failed or an experiment misses its expected result.",
    options=EvalsOptions,
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Its exit status is an `Exit`: FAILED where a figure is not as expected."""
    run_command(COMMAND, _run, argv)


def _run(arguments: Arguments) -> int:
    given = arguments.options
    options = parse(EvalsOptions, with_surroundings(given, COMMAND.name), COMMAND.name)
    earlier = [name for name in ("collect", "resume", "cancel") if name in given]
    if not earlier:
        return _new(arguments.positional, options)
    new = (
        "experiments",
        "seeds",
        "target_seeds",
        "nulls",
        "ensemble",
        "retries",
        "nodes",
        "processes",
    )
    if len(earlier) > 1 or arguments.positional or given.keys() & set(new):
        raise UserError(f"--{earlier[0]} takes the study as it is: no {', '.join(new)}, overrides")
    study = find_study(KIND, getattr(options, earlier[0]))
    joined = {key: study.record.get(key, 1) for key in ("nodes", "processes")}
    options = options.model_copy(update=joined)
    if earlier == ["cancel"]:
        print(cancel(study))
        return 0
    return _collect(study) if earlier == ["collect"] else _go_on(study, options)


def _new(overrides: Sequence[str], options: EvalsOptions) -> int:
    _check_machines(options)
    check_overrides(overrides, options)
    name = new_id(KIND)
    directory = output_root().absolute() / KIND / name
    jobs = eval_jobs(directory, overrides, options)
    if options.dry_run:
        preview(directory, jobs, options)
        return 0
    study = create_study(
        KIND,
        name,
        {
            "experiments": [get_experiment(name).name for name in options.experiments],
            "seeds": options.seeds,
            "target_seeds": options.target_seeds,
            "nulls": options.nulls,
            "nodes": options.nodes,
            "processes": options.processes,
            "overrides": list(overrides),
            "jobs": [job.name for job in jobs],
        },
    )
    for job in jobs:
        job.save()
    try:
        return _launched(study, jobs, options)
    except UserError:  # refused by SLURM: as if nothing had been
        shutil.rmtree(study.directory)
        raise


def _check_machines(options: EvalsOptions) -> None:
    if options.nodes > 1 and (options.local or not has_slurm()):
        raise UserError(f"--nodes {options.nodes}: several machines are found by SLURM alone")


def _go_on(study: Study, options: EvalsOptions) -> int:
    _check_machines(options)
    now = statuses(study, jobs := study_jobs(study))
    numbered = study.record["slurm"]
    left = [
        job
        for job in jobs
        if now[job.name].state not in ENDED
        and not (job.name in numbered and now[job.name].state in ("waiting", "running"))
    ]
    if not left:
        print(f"{study.id}: nothing is left to do")
        return _collect(study)
    return _launched(study, left, options)


def _launched(study: Study, jobs: Sequence[Job], options: EvalsOptions) -> int:
    print(f"study {study.id}: {study.directory}")
    try:
        total = sum(job.minutes for job in jobs)
        if launch(study, jobs, options, wait=options.wait, expected=total):
            return _collect(study)
        print(f"the table: spd-evals --collect {study.id}")
        return 0
    except KeyboardInterrupt:
        here = not study.record["slurm"]
        print(f"go on with: spd-evals --{'resume' if here else 'collect'} {study.id}")
        return Exit.INTERRUPTED


def _collect(study: Study) -> int:
    from spd.evals.summary import write_summary

    with no_collector():
        jobs = study_jobs(study)
        states = statuses(study, jobs)
        summary = write_summary(study.directory, jobs, states, study.record, show=print_at_once)
    print(f"summary: {summary.page}")
    if summary.unfinished:
        print(f"not finished: go on with spd-evals --resume {study.id}, or collect later")
    return 0 if summary.as_expected else 1


OPTION_OF = {
    "seed": "--seeds",
    "seeds": "--seeds",
    "target_seed": "--target-seeds",
    "device": "--cpu",
    "experiment": "--experiments",
}
"""what is said with an option, by the override that would say it"""


def check_overrides(overrides: Sequence[str], options: EvalsOptions) -> None:
    """`UserError` unless every experiment can be run with these overrides, by so many processes."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in OPTION_OF:
            raise UserError(f"override {shown(override)}: say it with {OPTION_OF[key]}")
    from spd.runs.cli import checked_config

    n_processes = options.nodes * options.processes
    for name in options.experiments:
        config = checked_config(name, [*overrides, f"seed={max(options.seeds)}"])
        if options.target_seeds and "target_seed" not in type(config).model_fields:
            raise UserError(f"--target-seeds: {name} trains no target of its own")
        for changes in controls_of(name, config).values() if options.nulls else ():
            checked_config(name, [*overrides, *changes])
        batch_size = getattr(config, "batch_size", n_processes)
        if batch_size % n_processes:
            raise UserError(
                f"{name}: batch_size {batch_size} cannot be divided among {n_processes} processes"
                f" (nodes × processes); override it with a multiple of {n_processes}"
            )


def eval_jobs(directory: Path, overrides: Sequence[str], options: EvalsOptions) -> list[Job]:
    """One per experiment, target and seed, or for all seeds; they run the study's own copy of the code.

    Controls come first, so that the report of a run finds its null run.
    """
    jobs = []
    for name in options.experiments:
        controls = _controls(name, overrides, options)
        together = side_by_side(name, options)
        groups = [options.seeds] if together else [(seed,) for seed in options.seeds]
        for suffix, changes in (*controls.items(), ("", ())):
            for target_seed in options.target_seeds or (None,):
                jobs += [
                    _job(
                        *(directory, name, seeds, target_seed, [*overrides, *changes], options),
                        suffix=suffix,
                    )
                    for seeds in groups
                ]
    return jobs


def _controls(
    name: str, overrides: Sequence[str], options: EvalsOptions
) -> dict[str, Sequence[str]]:
    if not options.nulls:
        return {}
    from spd.runs.cli import checked_config

    return controls_of(name, checked_config(name, overrides))


def side_by_side(name: str, options: EvalsOptions) -> bool:
    """Whether one job runs all seeds of an experiment."""
    if len(options.seeds) == 1:
        return False
    possible = get_experiment(name).side_by_side
    if options.ensemble == "always" and not possible:
        raise UserError(
            f"--ensemble always: the seeds of {name} cannot run side by side; only those of the"
            " registered toy models can"
        )
    return possible and wants_ensemble(options)


def _job(
    directory: Path,
    name: str,
    seeds: Sequence[int],
    target_seed: int | None,
    overrides: Sequence[str],
    options: EvalsOptions,
    *,
    suffix: str = "",
) -> Job:
    experiment, code = get_experiment(name), directory / "code"
    several = len(seeds) > 1
    named = experiment.name
    target = "" if target_seed is None else f"-target{target_seed}"
    of = f"{named}{suffix}{target}"
    job_name = f"{of}-seeds" if several else f"{of}-seed{seeds[0]}"
    minutes = len(seeds) * expected_minutes(name, overrides, gpu=uses_gpus(options))
    base = output_root().absolute() / named / f"{directory.name}{target}{suffix}"
    run_dir = base if several else seed_directory(base, seeds[0])
    command = joined_python(
        options,
        *experiment.command(code / "spd"),
        *overrides,
        *(["device=cpu"] if options.cpu else []),
        *([] if target_seed is None else [f"target_seed={target_seed}"]),
        f"seeds={list(seeds)}" if several else f"seed={seeds[0]}",
        "--run_dir",
        str(run_dir),
    )
    return Job(
        name=job_name,
        directory=directory / JOBS / job_name,
        command=command,
        env=job_environment(code, options),
        minutes=minutes,
        run_dir=run_dir,
        seeds=tuple(seeds) if several else (),
        slurm_name=f"spd-eval-{named}-{max(1, round(minutes))}min",
        retries=options.n_retries,
    )


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"{twice[0]!r} is named twice")
    return values


if __name__ == "__main__":
    main()
