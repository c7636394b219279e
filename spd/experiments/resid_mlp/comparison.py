"""Several runs of one experiment side by side: what the minimality coefficient does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from spd.config import UserError
from spd.losses import Activity, ImportanceMinimality, Loss
from spd.metrics import pattern_errors, probe_importances
from spd.problem import Pattern
from spd.reports.drawing import (
    MAX_WIDTH,
    ColumnOrder,
    colour_bar,
    column_order,
    count,
    heat_map,
)
from spd.reports.png import DescribedFigure, FigureText
from spd.runs.run import Run
from spd.schedule import peak_of

COMPARISON_FILE = "importances_by_minimality.png"


def comparable(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """Runs by the folder they lie in, by rising minimality coefficient; folders with one left out.

    `UserError` if those of one folder have different sites or features.
    """
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.directory.absolute().parent, []).append(run)
    several = {folder: group for folder, group in groups.items() if len(group) > 1}
    for group in several.values():
        first, *others = group
        for run in others:
            if _kind(run) != _kind(first):
                raise UserError(
                    f"{run.directory} and {first.directory} cannot be drawn side by side: features"
                    f" and sites are {_kind(run)} and {_kind(first)}"
                )
    return {
        folder: sorted(group, key=lambda run: (minimality(run.config.losses), run.config.seed))
        for folder, group in several.items()
    }


def minimality(losses: Mapping[str, Loss]) -> float:
    """The coefficient of the importance minimality, 0 where there is none."""
    kinds = (ImportanceMinimality, Activity)
    return sum(peak_of(spec.coeff) for spec in losses.values() if isinstance(spec, kinds))


@torch.no_grad()
def compare(runs: Sequence[Run]) -> Figure:
    """Importance maps of the runs, in the order given."""
    shown = []
    for run in runs:
        assert run.problem.probes is not None, "every ResidMLPProblem has probes"
        importances = probe_importances(run.model, run.problem.probes)
        solution = run.problem.solution
        errors = {
            path: pattern_errors(solution[path], g, run.model, path)
            for path, g in importances.items()
            if path in solution
        }
        coeff, config = minimality(run.config.losses), run.config
        name = f"minimality {coeff:.3g}, seed {config.seed}, step {run.step:,}"
        shown.append(RunImportances(name, importances, errors))
    return comparison_figure(shown, runs[0].problem.solution)


def _kind(run: Run) -> str:
    assert run.problem.probes is not None, "every ResidMLPProblem has probes"
    return f"{run.problem.probes.shape[1]}, {', '.join(run.model.sites)}"


# --- the figure--------------------------------------------------------------------------------------


class RunImportances(NamedTuple):
    """What a comparison shows of one run."""

    name: str
    importances: Mapping[str, Float[Tensor, "probes _C"]]
    errors: Mapping[str, int]


def comparison_figure(
    runs: Sequence[RunImportances], solution: Mapping[str, Pattern]
) -> DescribedFigure:
    """Importance maps of all sites, one row for each run."""
    paths = list(runs[0].importances)
    text = FigureText(
        "Causal importances as the minimality coefficient varies",
        "Each row of panels is one run, each panel one matrix: one input feature per row, one"
        " subcomponent per column; bright: needed for that input. Left of the dashed line stand as"
        " many columns as the known solution has. Too small a coefficient leaves bright spots beside"
        " the diagonal and right of the line, too large a one takes needed subcomponents away."
        " Columns that are not in use are not drawn.",
        "Heat maps. " + " ".join(f"{run.name}: {_total(run)}." for run in runs),
    )
    shown = [
        {path: column_order(g, solution.get(path)) for path, g in run.importances.items()}
        for run in runs
    ]
    widths = [max(6, *(len(orders[path].columns) for orders in shown)) for path in paths]
    figure = DescribedFigure(text, figsize=(MAX_WIDTH, 0.4 + 2.3 * len(runs)))
    rows = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    for row, run, orders in zip(rows, runs, shown, strict=True):
        row.suptitle(f"{run.name}: {_total(run)}", fontsize=10, x=0.01, ha="left")
        axes = row.subplots(1, len(paths), width_ratios=widths, squeeze=False)[0]
        images = [
            _importance_map(ax, run, path, orders[path], width)
            for ax, path, width in zip(axes, paths, widths, strict=True)
        ]
        axes[0].set_yticks(range(0, len(run.importances[paths[0]]), 20))
        axes[0].set_ylabel("input feature", fontsize=8)
        colour_bar(row, images[0], list(axes), "importance")
    return figure


def _importance_map(
    ax: Axes, run: RunImportances, path: str, order: ColumnOrder, width: int
) -> AxesImage:
    """One matrix of one run, filled up to `width` columns."""
    values = run.importances[path][:, order.columns].clamp(0, 1).numpy(force=True)
    padded = np.zeros((len(values), width))
    padded[:, : len(order.columns)] = values
    if 0 < order.n_expected < width:
        ax.axvline(order.n_expected - 0.5, color="white", linewidth=1, linestyle=(0, (3, 2)))
    errors = f"\n{count(run.errors[path], 'error')}" if path in run.errors else ""
    ax.set_title(f"{path}{errors}", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_xticks([])
    ax.set_yticks([])
    return heat_map(ax, padded, "viridis", 0.0, 1.0)


def _total(run: RunImportances) -> str:
    return count(sum(run.errors.values()), "error")
