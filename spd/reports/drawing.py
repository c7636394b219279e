"""How the figures of a decomposition are drawn: tensors in, a matplotlib figure out.

Knows no spec, no run and no file. Nothing goes through pyplot: a figure lives as long as its caller
holds it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import SubplotSpec
from matplotlib.image import AxesImage
from torch import Tensor

from spd.component_model import Site
from spd.metrics import ALIVE_THRESHOLD, assignment, columns_in_use
from spd.problem import Dense, Identity, Pattern
from spd.reports.panels import BLUE, GREY, ORANGE, panel_grid, panels_size
from spd.reports.png import DescribedFigure, FigureText

SHOW_ALL_COLUMNS = 40
"""A site with more subcomponents shows those in use and a few others."""
EXTRA_COLUMNS = 5
MAX_WIDTH = 10.5
"""inches"""


class ColumnOrder(NamedTuple):
    """The subcomponents of a site that a figure shows."""

    columns: list[int]
    """original indices, from left to right"""
    n_expected: int
    """how many of them the known solution needs; 0 where none is known"""
    n_cut: int
    """how many more there are, none of them in use"""


def column_order(g: Float[Tensor, "rows C"], pattern: Pattern | None) -> ColumnOrder:
    """First the partners of the rows (dense pattern: the most used), then by falling importance."""
    used = columns_in_use(g).cpu()
    if isinstance(pattern, Dense):
        order = (g.mean(dim=0).cpu() + used).argsort(descending=True)
    else:
        order = assignment(g)
    match pattern:
        case Identity(n):
            n_expected = n
        case Dense(k):
            n_expected = k
        case None:
            n_expected = 0
    last_used = int(used[order].nonzero().max()) + 1 if used.any() else 0
    C = g.shape[1]
    n_shown = C if C <= SHOW_ALL_COLUMNS else min(C, max(last_used, n_expected) + EXTRA_COLUMNS)
    return ColumnOrder(order[:n_shown].tolist(), n_expected, C - n_shown)


def count(n: int, noun: str) -> str:
    """`1 error`, `2 errors`, `no errors`."""
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"


def probe_figure(
    importances: Mapping[str, Float[Tensor, "probes _C"]],
    solution: Mapping[str, Pattern],
    errors: Mapping[str, int],
) -> DescribedFigure:
    """Heat maps of g on one-hot probes, all sites side by side, columns in their optimal order."""
    orders = {path: column_order(g, solution.get(path)) for path, g in importances.items()}
    counts = ", ".join(f"{path}: {count(n, 'error')}" for path, n in errors.items())
    text = FigureText(
        "Causal importances, one input feature at a time",
        "Each row feeds the model one input feature alone; each column is one subcomponent."
        " Bright: needed for that input; dark: may be removed. In a solved run the columns left of"
        " the dashed line form a clean diagonal (or, for a matrix that every input uses, they are"
        " the only bright ones), and everything right of it is dark. The columns are permuted to"
        " show this; the numbers below them are the original indices.",
        f"Heat maps of the causal importances of {', '.join(importances)}. {counts or 'No known'}"
        f"{'' if counts else ' solution'}.",
    )
    n_rows = next(iter(importances.values())).shape[0]
    widths = [max(len(order.columns), 6) for order in orders.values()]
    cell = min(0.24, MAX_WIDTH / sum(widths))
    height = min(7.5, max(3.0, 1.6 + 0.22 * n_rows))
    width = max(4.8, cell * sum(widths) + 0.7 * len(widths) + 1.0)
    figure = DescribedFigure(text, figsize=(width, height))
    axes = figure.subplots(1, len(importances), width_ratios=widths, squeeze=False)[0]
    images = []
    for ax, (path, g) in zip(axes, importances.items(), strict=True):
        shown = g[:, orders[path].columns].clamp(0, 1).numpy(force=True)
        images.append(heat_map(ax, shown, "viridis", 0.0, 1.0, columns=orders[path].columns))
        title = f"{path}\n{count(errors[path], 'error')}" if path in errors else path
        ax.set_title(title, fontsize=10)
        _row_ticks(ax, n_rows, height - 1.6)
        _column_ticks(ax, orders[path], cell, "white")
    axes[0].set_ylabel("input feature", fontsize=9)
    colour_bar(figure, images[0], list(axes), "causal importance")
    return figure


def matrices_figure(
    sites: Mapping[str, Site], orders: Mapping[str, ColumnOrder]
) -> DescribedFigure:
    """V above Uᵀ for every site, subcomponents as columns in the order given."""
    text = FigureText(
        "The learned matrices V and U",
        "Each column is one subcomponent: above what it reads (V), below what it writes (U)."
        " Blue is negative, red positive, white zero; every panel has its own scale. In a solved"
        " run the columns left of the dashed line are the mechanisms of the matrix, and the rest"
        " has faded.",
        f"Colour maps of the matrices V and U of {', '.join(sites)}.",
    )
    per_row = min(len(sites), 3)
    n_rows = -(-len(sites) // per_row)
    paths = list(sites)
    widths = [
        max(max(len(orders[path].columns), 6) for path in paths[i::per_row]) for i in range(per_row)
    ]
    cell = min(0.24, MAX_WIDTH / sum(widths))
    size = (max(4.8, cell * sum(widths) + 1.4 * per_row), 5.2 * n_rows)
    figure = DescribedFigure(text, figsize=size)
    grid = figure.add_gridspec(n_rows, per_row, width_ratios=widths)
    for i, path in enumerate(paths):
        order = orders[path]
        _matrix_pair(figure, grid[i // per_row, i % per_row], sites[path], path, order, cell)
    return figure


def histogram_figure(
    counts: Mapping[str, Float[Tensor, " bins"]], n_values: Mapping[str, int]
) -> DescribedFigure:
    """Histograms of all importances on held-out data, per site; counts on a log axis."""
    text = FigureText(
        "Distribution of the causal importances",
        "Every subcomponent on every held-out input is one count; mind the logarithmic axis. The"
        " sharper the two peaks at 0 (not needed) and 1 (needed), the clearer the decomposition.",
        "Histograms of the causal importances of "
        + ", ".join(f"{path} ({n_values[path]:,} values)" for path in counts)
        + ".",
    )
    figure, axes = _panels(text, len(counts))
    for ax, (path, values) in zip(axes, counts.items(), strict=False):
        edges = np.linspace(0.0, 1.0, len(values) + 1)
        ax.stairs(values.numpy(force=True), edges, fill=True, color=BLUE, baseline=0.5)
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.5)
        ax.set_title(path, fontsize=10)
        ax.set_xlabel("causal importance", fontsize=9)
        ax.set_ylabel("count (subcomponent × input)", fontsize=9)
    return figure


def activity_figure(
    means: Mapping[str, Float[Tensor, " _C"]],
    alive: Mapping[str, Tensor],
    n_inputs: int,
    least_mean: float | None = None,
) -> DescribedFigure:
    """Mean importance of every subcomponent on held-out data, sorted, log axis, per site.

    `least_mean` is that of what is alive, if it is so by its mean.
    """
    threshold = ALIVE_THRESHOLD / n_inputs if least_mean is None else least_mean
    floor = threshold / (3 if least_mean is None else 100)
    meant = (
        f"above {ALIVE_THRESHOLD} on at least one input. Below the dashed line a mean is too small for that"
        if least_mean is None
        else f"a mean above {least_mean}, the dashed line"
    )
    text = FigureText(
        "Mean activity of the subcomponents",
        f"The mean causal importance of each subcomponent over {n_inputs:,} held-out inputs, most"
        f" active first. Filled: alive, {meant}; values off the scale lie on the lower edge. A"
        " decomposition that has settled shows a cliff between the two kinds.",
        "Mean causal importances. "
        + ", ".join(f"{path}: {int(a.sum())} of {len(a)} alive" for path, a in alive.items())
        + ".",
    )
    figure, axes = _panels(text, len(means))
    for ax, (path, mean) in zip(axes, means.items(), strict=False):
        order = mean.argsort(descending=True).cpu()
        heights = mean.cpu()[order].clamp(min=floor).numpy()
        on = alive[path].cpu()[order].numpy().astype(bool)
        ranks = np.arange(1, len(heights) + 1)
        ax.plot(ranks[on], heights[on], "o", color=BLUE, markersize=4, label="alive")
        ax.plot(
            ranks[~on], heights[~on], "o", color=GREY, markersize=4, fillstyle="none", label="dead"
        )
        ax.axhline(threshold, color=ORANGE, linestyle="--", linewidth=1, label="least if alive")
        ax.set_yscale("log")
        ax.set_ylim(floor * 0.8, 1.5)
        ax.set_title(f"{path}: {int(on.sum())} of {len(on)} alive", fontsize=10)
        ax.set_xlabel("subcomponent, by rank", fontsize=9)
        ax.set_ylabel("mean causal importance", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def _panels(text: FigureText, n: int) -> tuple[DescribedFigure, list[Axes]]:
    figure = DescribedFigure(text, figsize=panels_size(n))
    return figure, panel_grid(figure, n)


def _matrix_pair(
    figure: Figure, place: SubplotSpec, site: Site, path: str, order: ColumnOrder, cell: float
) -> None:
    parts = site.subcomponents
    matrices = {"V": parts.V[:, order.columns], "U": parts.U[order.columns].mT}
    d_in, d_out = site.target_weight.shape
    ratio = min(max(d_in / d_out, 0.5), 2.0)
    inner = place.subgridspec(2, 1, height_ratios=[ratio, 1.0])
    upper = figure.add_subplot(inner[0])
    axes = (upper, figure.add_subplot(inner[1], sharex=upper))
    labels = {"V": "input", "U": "output"}
    heights = {"V": 3.8 * ratio / (1 + ratio), "U": 3.8 / (1 + ratio)}
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.detach().float().numpy(force=True)
        limit = max(float(np.abs(values).max()), 1e-12)
        image = heat_map(ax, values, "RdBu_r", -limit, limit, columns=order.columns)
        colour_bar(figure, image, [ax])
        _row_ticks(ax, len(values), heights[name])
        ax.set_ylabel(f"{labels[name]} dimension", fontsize=9)
        ax.set_title(f"{path}: {name}", fontsize=10)
        ax.tick_params(labelbottom=name == "U")
    _column_ticks(axes[1], order, cell, GREY)
    if 0 < order.n_expected < len(order.columns):
        axes[0].axvline(order.n_expected - 0.5, color=GREY, linewidth=1, linestyle=(0, (3, 2)))


def heat_map(
    ax: Axes,
    values: np.ndarray,
    cmap: str,
    low: float,
    high: float,
    *,
    columns: Sequence[int] | None = None,
) -> AxesImage:
    """A matrix as colours, a cell per entry, whatever the shape of the axes; `columns` are named so."""
    image = ax.imshow(values, vmin=low, vmax=high, cmap=cmap, aspect="auto", interpolation="none")
    if columns is not None:
        cells = [(c, y, row[x]) for y, row in enumerate(values) for x, c in enumerate(columns)]
        keep_numbers(image, cells)
    return image


def keep_numbers(artist: Artist, rows: Sequence[tuple[object, object, object]]) -> None:
    """Remember x, y and value of what an artist shows, for the table beside its figure."""
    figure = artist.get_figure(root=True)
    if isinstance(figure, DescribedFigure):
        figure.numbers[artist] = rows


def colour_bar(
    figure: Figure | SubFigure, image: AxesImage, axes: list[Axes], label: str = ""
) -> None:
    """A slim scale on the right of all `axes`."""
    bar = figure.colorbar(image, ax=axes, fraction=0.08, aspect=35, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _row_ticks(ax: Axes, n_rows: int, inches: float) -> None:
    ax.set_yticks(range(0, n_rows, _tick_distance(inches / n_rows, 0.15)))
    ax.tick_params(axis="y", labelsize=8)


def _column_ticks(ax: Axes, order: ColumnOrder, cell: float, line_colour: str) -> None:
    """Original indices under the columns, and a line after those that the solution needs."""
    digits = len(str(max(order.columns)))
    places = range(0, len(order.columns), _tick_distance(cell, 0.045 + 0.062 * digits))
    ax.set_xticks(places, [str(order.columns[i]) for i in places], fontsize=7)
    if 0 < order.n_expected < len(order.columns):
        ax.axvline(order.n_expected - 0.5, color=line_colour, linewidth=1, linestyle=(0, (3, 2)))
    cut = f"\n({order.n_cut} more, none in use)" if order.n_cut else ""
    ax.set_xlabel(f"subcomponent (its index){cut}", fontsize=9)


def _tick_distance(cell: float, inches: float) -> int:
    """How many cells apart labels must be to have `inches` each."""
    return next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 10**6) if n * cell >= inches)
