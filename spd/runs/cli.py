"""The command lines of runs: an experiment's own, `spd-report`, and the one that draws figures anew."""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from spd import settings
from spd.config import RunError, UserError, counted, shown
from spd.engine import checkpoint, distributed
from spd.registry import get_experiment
from spd.reports.figures import draw, loss_curves, save_figures
from spd.reports.report import REPORT_FILE, look_at_checkpoint, report_on, write_report
from spd.reports.results import format_result, format_table, read_result
from spd.run_files import CHECKPOINTS, FIGURES, META_FILE, RESULT_FILE, has_finished, is_run
from spd.runs.console import console_log, resolve_device, user_errors
from spd.runs.execution import ExperimentConfig, load_experiment
from spd.runs.provenance import import_entry, is_interactive
from spd.runs.run import Build, Run, check_entry, load_run, resume, run_seeds, start
from spd.runs.trust import UntrustedError, check_links, parts_of_run
from spd.runs.verify import check_run
from spd.runs.wandb_run import download_run
from spd.settings import PACKAGE_DIR

logger = logging.getLogger(__name__)

MOST_KEPT = 8
"""runs that lie loaded in memory at a time"""

TRUST = (
    "import the code that a run's own files name, and follow links that lead out of it; without it only"
    " code of the package, or below a folder in SPD_TRUSTED of the shell's environment"
)


def cli(
    config_class: type[ExperimentConfig],
    build: Build,
    argv: Sequence[str] | None = None,
    *,
    named: Collection[str] = (),
) -> NoReturn:
    """The entry point of an experiment script: CONFIG.yaml [key=value …] [--resume RUN_DIR].

    `named` is what a run may name because the user has named it too. It ends with one of the statuses of
    `spd.config.Exit`.
    """
    if argv is None and is_interactive():
        with user_errors():
            raise UserError(
                "cli reads the command line, which in a notebook belongs to the kernel: call"
                " spd.runs.run.start(config, build), or cli(config_class, build, ['CONFIG.yaml', ...])"
            )
    parser = parser_of(build)
    args = parser.parse_intermixed_args(argv)
    if args.run_dir is not None and (args.resume is not None or args.config is None):
        parser.error("--run_dir needs a configuration, and no --resume")
    if args.target is not None and args.resume is None:
        parser.error("--target goes with --resume; of a new run it is set by target=DIR")
    settings.load_env()
    if argv is None and build.__module__ == "__main__":
        _restart_with_patient_threads()
    with distributed.joined(), console_log(), user_errors():
        if args.resume is not None:
            directory = resume(
                *(config_class, build, args.resume, args.config, args.overrides),
                trust=args.trust,
                named=named,
                target=args.target,
            )
        elif args.config is not None:
            config = load_experiment(config_class, Path(args.config), args.overrides)
            folder = Path(args.config).parent
            if config.seeds:
                _show_seeds(*run_seeds(config, build, folder=folder, base=args.run_dir))
                raise SystemExit(0)
            run_dir: Path | None = args.run_dir
            begun = distributed.on_leader(
                lambda: run_dir is not None and (run_dir / META_FILE).is_file()
            )
            if run_dir is not None and begun:
                directory = resume(
                    *(config_class, build, run_dir, args.config, args.overrides), trust=args.trust
                )
            else:
                directory = start(config, build, folder=folder, directory=run_dir)
        else:
            parser.error("a configuration or --resume RUN_DIR is needed")
        if distributed.is_leader():
            print(format_result(read_result(directory / RESULT_FILE)))
            print(f"report: {directory / 'report.html'}")
        raise SystemExit(0)


def parser_of(build: Build) -> argparse.ArgumentParser:
    """What the script of an experiment takes."""
    parser = argparse.ArgumentParser(description=(build.__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, YAML values")
    parser.add_argument("--resume", type=_place, metavar="RUN_DIR", help="continue that run")
    where = (
        "the run's own directory (of several seeds: DIR-seed0 and so on); a run that is there"
        " already is continued"
    )
    parser.add_argument("--run_dir", type=_new_place, metavar="DIR", help=where)
    parser.add_argument("--trust", action="store_true", help=TRUST)
    moved = "where the target of the run that is resumed lies now, if the run has no copy of it"
    parser.add_argument("--target", type=_place, metavar="DIR", help=moved)
    return parser


def _place(name: str) -> Path:
    if not name.isprintable() or not name:
        raise argparse.ArgumentTypeError(f"{shown(name)}: a name that can be printed is needed")
    return Path(name)


def _new_place(name: str) -> Path:
    path = _place(name)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{name!r}: the name of a folder is needed")
    return path


def _restart_with_patient_threads() -> None:
    """Begin this command anew where its environment lacks what torch reads when it is imported.

    What other commands start has it already. Stays where something else than this command was started,
    as a test that runs the script in its own process.
    """
    missing = settings.patient_threads()
    words = sys.argv[1:]
    if missing and sys.orig_argv[len(sys.orig_argv) - len(words) :] == words:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def results_table(directories: Sequence[Path]) -> str:
    """One line for each finished run, with its figures and whether it is solved."""
    results = {}
    for directory in directories:
        if not (directory / RESULT_FILE).is_file():
            raise UserError(f"{directory}: no {RESULT_FILE}; the run has not finished")
        results[f"{directory.parent.name}/{directory.name}"] = read_result(directory / RESULT_FILE)
    return format_table(results)


def _show_seeds(directories: Sequence[Path], failures: Mapping[Path, RunError]) -> None:
    """The table of the finished runs; `RunError` if there are others."""
    finished = [directory for directory in directories if directory not in failures]
    if finished:
        print(results_table(finished))
        print("reports:", *(directory / "report.html" for directory in finished), sep="\n  ")
    if failures:
        lines = [f"{directory.name}: {error}" for directory, error in failures.items()]
        raise RunError(
            f"{len(failures)} of {counted(len(directories), 'run')} failed\n  " + "\n  ".join(lines)
        )


def checked_config(name: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration of an experiment with overrides, or what is wrong with it, as a `UserError`."""
    experiment = get_experiment(name)
    config_class, _ = parts_of(experiment.module)
    return load_experiment(config_class, PACKAGE_DIR / experiment.config, overrides)


def parts_of(name: str) -> tuple[type[ExperimentConfig], Build]:
    """Configuration class and `build` of an experiment, from the module or file that holds them."""
    module = import_entry(name)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ExperimentConfig)
        and value.__module__ == module.__name__
    ]
    build: Build | None = getattr(module, "build", None)
    if build is not None and (named := _config_of(build)) is not None:
        classes = [named]
    if len(classes) != 1 or build is None:
        found = ", ".join(found.__name__ for found in classes) or "none"
        raise UserError(
            f"{name}: an experiment is one subclass of ExperimentConfig (found: {found}) and a function"
            f" build(config, device) ({'none found' if build is None else 'found'}); of several classes"
            " it is the one that build names, as in build(config: MyConfig, device)"
        )
    check_entry(classes[0], build)
    return classes[0], build


def _config_of(build: Build) -> type[ExperimentConfig] | None:
    """The class that the first argument of `build` is annotated with, if it is a configuration."""
    try:
        first = next(iter(inspect.signature(build, eval_str=True).parameters.values()), None)
    except NameError:
        return None
    found = None if first is None else first.annotation
    if isinstance(found, type) and issubclass(found, ExperimentConfig):
        return None if found is ExperimentConfig else found
    return None


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """What `spd-run` starts: EXPERIMENT.yaml …, whose `module` is imported, or --resume RUN_DIR alone.

    `--made_by EXPERIMENT.yaml --resume RUN_DIR` goes on with a run by the code that the user names.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--made_by")
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--target")
    named: Collection[str] = ()
    with user_errors():
        known, others = parser.parse_known_args(words)
        if known.resume is not None and known.made_by is not None:
            settings.load_env()
            parts, named = _made_by(known.made_by)
            words = ["--resume", str(known.resume), *["--trust"] * known.trust]
            words += [] if known.target is None else ["--target", known.target]
        elif others and not others[0].startswith("-"):
            parts = parts_of(get_experiment(others[0]).module)
        elif known.resume is not None:
            settings.load_env()
            parts = parts_of_run(known.resume, trust=known.trust)
        else:
            raise UserError("a YAML configuration or --resume RUN_DIR is needed")
    cli(*parts, words, named=named)


def _made_by(name: str) -> tuple[tuple[type[ExperimentConfig], Build], Collection[str]]:
    """Configuration class and `build` of an experiment, and what else its configuration names."""
    experiment = get_experiment(name)
    parts = parts_of(experiment.module)
    config = load_experiment(parts[0], PACKAGE_DIR / experiment.config)
    return parts, config.named_code().values()


def report(argv: Sequence[str] | None = None) -> None:
    """Write report.html anew, from the newest checkpoint of each run; what is no run is passed over.

    Of a run whose code may not be imported, from its files alone.
    """
    parser = argparse.ArgumentParser(prog="spd-report", description=report.__doc__)
    _add_runs(parser)
    parser.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="held-out batches that a language model is shown, of those that its run keeps",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args(argv)
    settings.load_env()
    with console_log(), user_errors():
        if args.batches is not None and args.batches < 1:
            raise UserError(f"--batches: {args.batches}; at least 1 is needed")
        device = str(resolve_device(args.device))
        references = _those_with_a_state(args.runs)
        options = {"trust": args.trust, "verify": not args.unverified}
        for run in _all_opened(references, lambda name: _opened(name, device, **options)):
            if isinstance(run, Path):
                page = write_report(run, from_files=True)
            else:
                look_at_checkpoint(run.directory, run.prepared, run.step, run.config.figures)
                page = report_on(run.directory, run.prepared, args.batches)
            print(f"report: {page}")


def _all_opened(
    references: Sequence[str], open_run: Callable[[str], Run | Path]
) -> Iterator[Run | Path]:
    """All runs are loaded before anything is done with the first; of many, only the first are kept so long.

    What else was loaded is loaded again when its turn comes: a thousand runs need the memory of a few.
    """
    kept = {}
    for reference in dict.fromkeys(references):
        run = open_run(reference)
        if len(kept) < MOST_KEPT:
            kept[reference] = run
        del run
    for reference in references:
        yield kept.pop(reference) if reference in kept else open_run(reference)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """What every command takes that is about runs."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory or wandb:entity/project/run"
    )
    add_ways_in(parser)


def add_ways_in(parser: argparse.ArgumentParser) -> None:
    """The options by which a run is opened that would be refused else."""
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument(
        "--unverified",
        action="store_true",
        help="use files that are not as their run left them (by their digests), and say so",
    )


def _opened(reference: str, device: str, *, trust: bool, verify: bool) -> Run | Path:
    """A run, loaded, or the directory of one whose code may not be imported."""
    directory = download_run(reference) if reference.startswith("wandb:") else Path(reference)
    try:
        return load_run(directory, device=device, trust=trust, verify=verify)
    except UntrustedError as refused:
        check_links(directory)
        check_run(directory, verify=verify)
        logger.warning(
            "report: %s is made of the files of the run alone, with the figures that exist: %s",
            *(directory / REPORT_FILE, refused),
        )
        return directory


def _those_with_a_state(references: Sequence[str]) -> list[str]:
    """The runs that have a checkpoint; one line says how many are passed over. If none is a run, all."""
    local = [name for name in references if not name.startswith("wandb:")]
    no_run = [name for name in local if not is_run(Path(name))]
    if len(no_run) == len(references):
        return list(references)  # loading the first says what is wrong with it
    runs = [name for name in local if name not in no_run]
    new = [name for name in runs if checkpoint.latest(Path(name) / CHECKPOINTS) is None]
    if len(new) == len(references) - len(no_run):
        new = []  # here too
    for names, what in ((no_run, "hold no run"), (new, "hold a run without a checkpoint")):
        if names:
            logger.info("report: passed over, as they %s: %d (%s)", what, len(names), _few(names))
    return [name for name in references if name not in (*no_run, *new)]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def redraw(run: Run) -> None:
    """Draw every figure of a run anew, from its newest checkpoint, and write its report.

    The curves of a run that has not finished end where that checkpoint is, as all of its page does.
    """
    if has_finished(run.directory):
        figures = {
            **draw(run.prepared, run.config.figures),
            "loss_curves": loss_curves(run.metrics),
        }
        save_figures(run.directory / FIGURES, run.step, figures)
    else:
        look_at_checkpoint(run.directory, run.prepared, run.step, run.config.figures)
    report_on(run.directory, run.prepared)


def redraw_command(
    description: str,
    argv: Sequence[str] | None = None,
    *,
    compare: Callable[[Sequence[Run]], Callable[[], None]] | None = None,
) -> None:
    """Redraw figures and reports of the runs named, then print the table of the finished ones.

    `compare` sees all runs before anything is written, and returns what draws them side by side.
    """
    parser = argparse.ArgumentParser(description=description)
    _add_runs(parser)
    args = parser.parse_args(argv)
    settings.load_env()
    with console_log(), user_errors():
        # all, before anything is written
        options = {"trust": args.trust, "verify": not args.unverified}
        runs = [load_run(reference, **options) for reference in args.runs]
        draw_comparison = compare(runs) if compare else None
        for run in runs:
            redraw(run)
            print(f"report: {run.directory / 'report.html'}")
        if draw_comparison:
            draw_comparison()
        finished = [run.directory for run in runs if (run.directory / RESULT_FILE).is_file()]
        for run in runs:
            if run.directory not in finished:
                print(f"{run.directory}: not finished, not in the table", file=sys.stderr)
        if finished:
            print(results_table(finished))


if __name__ == "__main__":
    main()
