"""The paper's first figure for toy models of superposition, and redrawing the figures of runs.

python -m spd.experiments.tms.plots RUN_DIR|wandb:entity/project/run ...
"""

from collections.abc import Sequence
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import BaseConfig, UserError
from spd.experiments.tms.vectors import vectors_figure
from spd.losses import StepContext
from spd.metrics import probe_importances
from spd.problem import Problem
from spd.reports.figures import FigureMaker
from spd.runs.cli import redraw_command


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


def main(argv: Sequence[str] | None = None) -> None:
    """Redraw all figures and reports, then print the table of the runs that have finished."""
    redraw_command(main.__doc__ or "", argv)


if __name__ == "__main__":
    main()
