"""Figures of any decomposition: specs with the protocol of metrics.py, and the files they end in.

Knows no experiment; drawing.py holds how each figure looks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import (
    BY_TYPE,
    NAME_IS_TYPE,
    BaseConfig,
    UserError,
)
from spd.engine.prepare import Prepared, eval_contexts
from spd.losses import StepContext
from spd.metrics import (
    ALIVE_THRESHOLD,
    MEAN_ALIVE,
    Accumulator,
    collect,
    pattern_errors,
    probe_importances,
)
from spd.problem import Problem
from spd.reports.drawing import (
    activity_figure,
    column_order,
    histogram_figure,
    matrices_figure,
    probe_figure,
)
from spd.reports.numbers import figure_csv
from spd.reports.panels import BLUE, ORANGE, PALETTE, panel_grid, panels_size
from spd.reports.png import DescribedFigure, FigureText, png_bytes
from spd.run_files import atomic_write

HISTOGRAM_BINS = 50

FigureMaker = Accumulator[Figure]
"""Keys are the figures' names."""


@runtime_checkable
class Drawable(Protocol):
    """What a configuration names as a figure; experiments have some of their own."""

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker: ...


# --- files ---------------------------------------------------------------------------------------


def save_figures(directory: Path, step: int, figures: Mapping[str, Figure]) -> dict[str, Path]:
    """Write each figure as `<directory>/<name>/<step>.png`, its numbers beside it as `.csv`; release it.

    Each file is there whole or not at all.
    """
    paths = {}
    for name, figure in figures.items():
        path = directory / name / f"{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path.with_suffix(".csv"), figure_csv(figure))
        atomic_write(path, png_bytes(figure))
        paths[name] = path
    return paths


# --- the specs -----------------------------------------------------------------------------------


class ProbeImportances(BaseConfig):
    """Importances on the problem's probes as heat maps, ordered by the optimal assignment."""

    type: Literal["probe_importances"] = "probe_importances"

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        probes = problem.probes
        if probes is None:
            raise UserError("figures.probe_importances: this problem has no probes; remove it")

        def draw() -> dict[str, Figure]:
            importances = probe_importances(model, probes)
            errors = {
                path: pattern_errors(problem.solution[path], g, model, path)
                for path, g in importances.items()
                if path in problem.solution
            }
            return {"probe_importances": probe_figure(importances, problem.solution, errors)}

        return _OfModel(draw)


class _OfModel:
    """A figure that needs no data."""

    def __init__(self, draw: Callable[[], dict[str, Figure]]) -> None:
        self.compute = draw

    def update(self, ctx: StepContext) -> None:
        pass


class SubcomponentMatrices(BaseConfig):
    """V and U of every site, ordered as in `ProbeImportances` (without probes: by activity)."""

    type: Literal["subcomponent_matrices"] = "subcomponent_matrices"

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        return _Matrices(model, problem)


class _Matrices:
    def __init__(self, model: ComponentModel, problem: Problem) -> None:
        self.model, self.problem = model, problem
        self.activity = _Activity(model)

    def update(self, ctx: StepContext) -> None:
        if self.problem.probes is None:
            self.activity.update(ctx)

    def compute(self) -> dict[str, Figure]:
        if self.problem.probes is None:
            rows = {path: g[None, :] for path, g in self.activity.largest.items()}
        else:
            rows = probe_importances(self.model, self.problem.probes)
        orders = {
            path: column_order(g, self.problem.solution.get(path)) for path, g in rows.items()
        }
        return {"subcomponent_matrices": matrices_figure(self.model.sites, orders)}


class MeanActivity(BaseConfig):
    """Mean importance of every subcomponent on held-out data, sorted, on a logarithmic axis."""

    type: Literal["mean_activity"] = "mean_activity"
    alive: Literal["largest", "mean"] = "largest"
    """what is shown as alive: above 0.1 on an input, or with a mean above 1e-6"""

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        return _Activity(model, by_mean=self.alive == "mean")


class _Activity:
    """Sum and maximum of every subcomponent's importance, clipped to [0, 1], over held-out data."""

    def __init__(self, model: ComponentModel, *, by_mean: bool = False) -> None:
        self.by_mean = by_mean
        zeros = {
            path: torch.zeros(site.C, dtype=torch.float64, device=site.subcomponents.V.device)
            for path, site in model.sites.items()
        }
        self.totals = zeros
        self.largest = {path: zero.clone() for path, zero in zeros.items()}
        self.n_inputs = 0

    def update(self, ctx: StepContext) -> None:
        rows = {path: _clipped_rows(ctx.counted(g)) for path, g in ctx.ci.lower.items()}
        for path, g in rows.items():
            self.totals[path] += g.sum(dim=0)
            self.largest[path] = torch.maximum(self.largest[path], g.amax(dim=0))
        self.n_inputs += len(next(iter(rows.values())))

    def compute(self) -> dict[str, Figure]:
        means = {path: total / max(self.n_inputs, 1) for path, total in self.totals.items()}
        if self.by_mean:
            alive = {path: mean > MEAN_ALIVE for path, mean in means.items()}
            return {
                "mean_activity": activity_figure(means, alive, max(self.n_inputs, 1), MEAN_ALIVE)
            }
        alive = {path: largest > ALIVE_THRESHOLD for path, largest in self.largest.items()}
        return {"mean_activity": activity_figure(means, alive, max(self.n_inputs, 1))}


class ImportanceHistograms(BaseConfig):
    """How the importances on held-out data are distributed, per site."""

    type: Literal["importance_histograms"] = "importance_histograms"

    def build(self, model: ComponentModel, problem: Problem) -> FigureMaker:
        return _Histograms(model)


class _Histograms:
    def __init__(self, model: ComponentModel) -> None:
        self.counts = {path: torch.zeros(HISTOGRAM_BINS) for path in model.sites}
        self.n_values = dict.fromkeys(model.sites, 0)

    def update(self, ctx: StepContext) -> None:
        for path, g in ctx.ci.lower.items():
            values = ctx.counted(g).detach().float().clamp(0, 1)
            self.counts[path] += torch.histc(values, HISTOGRAM_BINS, 0.0, 1.0).cpu()
            self.n_values[path] += values.numel()

    def compute(self) -> dict[str, Figure]:
        return {"importance_histograms": histogram_figure(self.counts, self.n_values)}


def _clipped_rows(g: Tensor) -> Tensor:
    return g.detach().double().clamp(0, 1).reshape(-1, g.shape[-1])


# --- the course of a run -------------------------------------------------------------------------


def loss_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Every loss term, the L0 and the errors over the steps, from the lines of metrics.jsonl."""
    text = FigureText(
        "The course of the run",
        "Loss terms (before their coefficients; the total after them) on the training batches and"
        " on held-out data, on logarithmic axes; the mean number of subcomponents in use per input"
        " (L0); and the errors against the known importance pattern.",
        "",
    )
    keys = {key: None for line in history for key in line}
    terms = [key for key in keys if key.startswith("loss/")]
    terms += [
        key.removeprefix("eval/")
        for key in keys
        if key.startswith("eval/loss/") and key.removeprefix("eval/") not in terms
    ]
    groups = {
        name: found
        for name in ("eval/l0/", "eval/errors/")
        if (found := [key for key in keys if key.startswith(name)])
    }
    n_panels = len(terms) + len(groups)
    alt = (
        f"Curves over the steps of {', '.join([*terms, *groups])}."
        if n_panels
        else "No curves yet."
    )
    figure = DescribedFigure(text._replace(alt=alt), figsize=panels_size(max(n_panels, 1)))
    axes = panel_grid(figure, max(n_panels, 1))
    if not n_panels:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "nothing was logged yet", ha="center")
    for ax, term in zip(axes, terms, strict=False):
        _loss_panel(ax, history, term)
    for ax, (prefix, found) in zip(axes[len(terms) :], groups.items(), strict=False):
        _group_panel(ax, history, prefix, found)
    for ax in axes:
        ax.set_xlabel("step", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _loss_panel(ax: Axes, history: Sequence[Mapping[str, float]], term: str) -> None:
    name = term.removeprefix("loss/").replace("_", " ")
    train, held_out = _series(history, term), _series(history, f"eval/{term}")
    ax.plot(*train, color=BLUE, linewidth=1, label="training")
    ax.plot(*held_out, color=ORANGE, linewidth=1.4, marker=".", markersize=4, label="held out")
    if any(value > 0 for value in (*train[1], *held_out[1])):
        ax.set_yscale("log", nonpositive="mask")
    ax.set_title(name, fontsize=10)
    ax.set_ylabel("loss", fontsize=9)
    ax.legend(fontsize=8, frameon=False)


def _group_panel(
    ax: Axes, history: Sequence[Mapping[str, float]], prefix: str, keys: list[str]
) -> None:
    """One line per site; the sum alone where there are more sites than colours."""
    is_errors = prefix == "eval/errors/"
    lines = {key.removeprefix(prefix): _series(history, key) for key in keys}
    if len(lines) > len(PALETTE):
        complete = [line for line in history if all(key in line for key in keys)]
        sums = [sum(line[key] for key in keys) for line in complete]
        lines = {f"sum over {len(keys)} sites": ([line["step"] for line in complete], sums)}
    for colour, (name, (steps, values)) in zip(PALETTE, lines.items(), strict=False):
        ax.plot(steps, values, color=colour, linewidth=1.4, marker=".", markersize=4, label=name)
    if is_errors:
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(bottom=-0.15)
    else:
        ax.set_yscale("log")
    ax.set_title("errors against the pattern" if is_errors else "L0, held out", fontsize=10)
    ax.set_ylabel("errors" if is_errors else "subcomponents per input", fontsize=9)
    ax.legend(fontsize=8, frameon=False)


def _series(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values; what is not finite is left out of the line."""
    points = [(line["step"], line[key]) for line in history if key in line]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


FigureSpec = ProbeImportances | ImportanceHistograms | SubcomponentMatrices | MeanActivity
Figures = Annotated[Mapping[str, Annotated[FigureSpec, BY_TYPE]], NAME_IS_TYPE]


@torch.no_grad()
def draw(prepared: Prepared, figures: Mapping[str, Drawable]) -> dict[str, Figure]:
    """All of the figures, by name."""
    model = prepared.objective.model
    makers = [spec.build(model, prepared.problem) for spec in figures.values()]
    return collect(makers, eval_contexts(prepared)) if makers else {}
