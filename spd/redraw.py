"""The command that draws the figures of runs anew; each family of experiments has one of its own."""

import argparse
import sys
from collections.abc import Callable, Sequence

from spd import settings
from spd.command import console_log, user_errors
from spd.figures import loss_curves, save_figures
from spd.optimize import draw
from spd.report import write_report
from spd.run import Run, load_run, results_table
from spd.run_files import RESULT_FILE
from spd.tracking import FIGURES


def redraw(run: Run) -> None:
    """Draw every figure of a run anew, from its newest checkpoint, and write its report."""
    figures = {**draw(run.prepared), "loss_curves": loss_curves(run.metrics)}
    save_figures(run.directory / FIGURES, run.step, figures)
    write_report(run.directory)


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
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory or wandb:entity/project/run"
    )
    args = parser.parse_args(argv)
    settings.load_env()
    with console_log(), user_errors():
        runs = [load_run(reference) for reference in args.runs]  # all, before anything is written
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
