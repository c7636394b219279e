"""The paper's first figure for toy models of superposition, and redrawing the figures of runs.

python -m spd.experiments.tms.plots RUN_DIR|wandb:entity/project/run ...
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from spd import settings
from spd.command import console_log, user_errors
from spd.component_model import ComponentModel
from spd.config import BaseConfig, UserError
from spd.experiments.tms.vectors import vectors_figure
from spd.figures import FigureMaker, loss_curves, save_figures
from spd.losses import StepContext
from spd.metrics import probe_importances
from spd.optimize import draw
from spd.problem import Problem
from spd.report import write_report
from spd.run import Run, load_run, results_table
from spd.run_files import RESULT_FILE
from spd.tracking import FIGURES


class TMSVectors(BaseConfig):
    """Target columns, their sum over subcomponents, single subcomponents, and network diagrams.

    Where the hidden space is no plane, cosines and norms stand in for the vectors.
    """

    type: Literal["tms_vectors"] = "tms_vectors"

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        if "linear1" not in model.sites or problem.probes is None:
            raise UserError(
                "figures.tms_vectors: needs the site 'linear1' of a toy model and its probes"
                f" (sites: {', '.join(model.sites)})"
            )
        return _TMSVectors(model, problem, problem.probes)


class _TMSVectors:
    def __init__(self, model: ComponentModel, problem: Problem, probes: Tensor) -> None:
        self.model, self.problem, self.probes = model, problem, probes

    def update(self, ctx: StepContext) -> None:
        pass

    @torch.no_grad()
    def compute(self) -> dict[str, Figure]:
        importances = probe_importances(self.model, self.probes)
        return {"tms_vectors": vectors_figure(self.model, self.problem, importances)}


def redraw(run: Run) -> None:
    """Draw every figure of a run anew, from its newest checkpoint, and write its report."""
    figures = {**draw(run.prepared), "loss_curves": loss_curves(run.metrics)}
    save_figures(run.directory / FIGURES, run.step, figures)
    write_report(run.directory)


def main(argv: Sequence[str] | None = None) -> None:
    """Redraw all figures and reports, then print the table of the runs that have finished."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory or wandb:entity/project/run"
    )
    args = parser.parse_args(argv)
    settings.load_env()
    with console_log(), user_errors():
        runs = [load_run(reference) for reference in args.runs]  # all, before anything is written
        for run in runs:
            redraw(run)
            print(f"report: {run.directory / 'report.html'}")
        finished = [run.directory for run in runs if (run.directory / RESULT_FILE).is_file()]
        for run in runs:
            if run.directory not in finished:
                print(f"{run.directory}: not finished, not in the table", file=sys.stderr)
        if finished:
            print(results_table(finished))


if __name__ == "__main__":
    main()
