"""Figures of decomposed residual MLPs (paper, section 3.2), and redrawing the figures of runs.

python -m spd.experiments.resid_mlp.plots RUN_DIR|wandb:entity/project/run ...

Several runs of one experiment are also drawn side by side, by their minimality coefficient, into
`importances_by_minimality.png` beside them, its numbers into a `.csv` of that name.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from spd.component_model import ComponentModel
from spd.config import BaseConfig
from spd.experiments.resid_mlp.comparison import COMPARISON_FILE, comparable, compare
from spd.experiments.resid_mlp.drawing import (
    Responses,
    contributions_figure,
    responses_figure,
    scatter_figure,
)
from spd.experiments.resid_mlp.metrics import neuron_contributions
from spd.experiments.resid_mlp.problem import ResidMLPProblem, need_all_sites, need_resid_mlp
from spd.losses import StepContext
from spd.problem import Problem
from spd.reports.figures import FigureMaker
from spd.reports.numbers import figure_csv
from spd.reports.png import png_bytes
from spd.run_files import atomic_write
from spd.runs.cli import redraw_command
from spd.runs.run import Run

CURVE_POINTS = 81


# --- the specs -------------------------------------------------------------------------------------


class NeuronContributionsFigure(BaseConfig):
    """Which neurons compute each feature: target above, subcomponents below."""

    type: Literal["neuron_contributions"] = "neuron_contributions"
    n_features: int = Field(default=10, ge=1, description="how many are shown, from the first")

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        place = "figures.neuron_contributions"
        need_resid_mlp(problem, place)
        need_all_sites(model, place)

        def draw() -> dict[str, Figure]:
            layers = neuron_contributions(model, place)
            return {"neuron_contributions": contributions_figure(layers, self.n_features)}

        return _OfModel(draw)


class ContributionScatter(BaseConfig):
    """All neuron contributions, subcomponents over target."""

    type: Literal["contribution_scatter"] = "contribution_scatter"

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        place = "figures.contribution_scatter"
        need_resid_mlp(problem, place)
        need_all_sites(model, place)

        def draw() -> dict[str, Figure]:
            return {"contribution_scatter": scatter_figure(neuron_contributions(model, place))}

        return _OfModel(draw)


class ResponseCurves(BaseConfig):
    """Own output over own input, one feature at a time: label, target and decomposition."""

    type: Literal["response_curves"] = "response_curves"
    n_features: int = Field(default=6, ge=1, description="how many are shown, from the first")

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        known = need_resid_mlp(problem, "figures.response_curves")

        def draw() -> dict[str, Figure]:
            found = responses(model, known, self.n_features)
            return {"response_curves": responses_figure(found)}

        return _OfModel(draw)


class _OfModel:
    """A figure that needs no data."""

    def __init__(self, draw: Callable[[], dict[str, Figure]]) -> None:
        self.compute = draw

    def update(self, ctx: StepContext) -> None:
        pass


@torch.no_grad()
def responses(model: ComponentModel, problem: ResidMLPProblem, n_shown: int) -> Responses:
    """Outputs while each of the first features alone runs from -1 to 1."""
    assert problem.probes is not None, "every ResidMLPProblem has probes"
    n_features, device = problem.probes.shape[1], problem.probes.device
    x = torch.linspace(-1.0, 1.0, CURVE_POINTS, device=device)
    alone = torch.eye(n_features, device=device)[: min(n_shown, n_features), None, :]
    batch = (x[:, None] * alone).reshape(-1, n_features)
    target, site_inputs = model.target_forward(batch)
    masked = model(batch, model.causal_importances(site_inputs).lower)
    shape = (alone.shape[0], len(x), n_features)
    outputs = (problem.labels(batch), target, masked)
    return Responses(x, *(out.reshape(shape) for out in outputs))


# --- the command -----------------------------------------------------------------------------------


def side_by_side(runs: Sequence[Run]) -> Callable[[], None]:
    """What draws the runs of each folder side by side; `UserError` where that makes no sense."""
    groups = comparable(runs)

    def draw_them() -> None:
        for folder, group in groups.items():
            figure, path = compare(group), folder / COMPARISON_FILE
            atomic_write(path.with_suffix(".csv"), figure_csv(figure))
            atomic_write(path, png_bytes(figure))
            print(f"runs side by side: {path}")

    return draw_them


def main(argv: Sequence[str] | None = None) -> None:
    """Redraw all figures and reports, compare the runs, and print the table of the finished ones."""
    redraw_command(main.__doc__ or "", argv, compare=side_by_side)


if __name__ == "__main__":
    main()
