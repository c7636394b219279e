"""Drawings of a small linear network: vectors in the plane, and nodes with weighted edges.

Knows matrices alone: no model, no run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import SubFigure
from torch import Tensor

from spd.reports.drawing import keep_numbers
from spd.reports.panels import BLUE, GREY, ORANGE

DARK = "#333333"
LEAST_SHOWN = 0.02
"""Weights below this fraction of the layer's largest are not drawn."""


class Part(NamedTuple):
    """What one column of the figure shows: the whole network, or one subcomponent's share of it."""

    title: str
    vectors: Float[Tensor, "inputs 2"] | None
    """what each input is mapped to by the matrix in question; None where there is no plane"""
    layers: list[Float[Tensor, "_inputs _outputs"]]
    """the share of every matrix of the network, zero where it has none"""


class Scale(NamedTuple):
    """What all parts of one figure share, so that they can be compared."""

    limit: float
    """half the side of the plane"""
    largest: list[float]
    """for every layer, the weight that is drawn at full strength"""
    colours: list[str]
    """of the vectors, by input"""
    row_names: list[str]
    """of the rows of nodes, from the top"""


class Row(NamedTuple):
    """Parts that stand side by side."""

    heading: str
    parts: list[Part]
    scale: Scale


def row_height(row: Row) -> float:
    """Inches that `draw_row` needs."""
    networks = 0.35 + 0.5 * len(row.scale.row_names)
    return networks + (0.0 if row.parts[0].vectors is None else 1.9) + (0.35 if row.heading else 0)


def draw_row(figure: SubFigure, row: Row, n_columns: int) -> None:
    """Vectors above, networks below; room is left for `n_columns` parts."""
    _, parts, scale = row
    if row.heading:
        figure.suptitle(row.heading, fontsize=10, fontweight="bold", x=0.01, ha="left")
    with_vectors = parts[0].vectors is not None
    heights = [1.9, 0.35 + 0.5 * len(scale.row_names)] if with_vectors else [1.0]
    grid = figure.add_gridspec(len(heights), n_columns, height_ratios=heights)
    for column, part in enumerate(parts):
        network = figure.add_subplot(grid[-1, column])
        draw_network(network, part.layers, scale, named=column == 0)
        top = network
        if part.vectors is not None:
            top = figure.add_subplot(grid[0, column])
            draw_vectors(top, part.vectors, scale, named=column == 0)
        top.set_title(part.title, fontsize=9)
    for column in range(len(parts), n_columns):  # keeps the parts as wide as those of other rows
        figure.add_subplot(grid[0, column]).set_axis_off()


def draw_vectors(
    ax: Axes, vectors: Float[Tensor, "inputs 2"], scale: Scale, *, named: bool
) -> None:
    """Arrows from the origin, the long ones with their input's name at the tip."""
    xy = vectors.detach().numpy(force=True)
    ax.axhline(0, color="#d0d0d0", linewidth=0.7, zorder=0)
    ax.axvline(0, color="#d0d0d0", linewidth=0.7, zorder=0)
    origin = np.zeros(len(xy))
    ax.quiver(
        origin,
        origin,
        xy[:, 0],
        xy[:, 1],
        color=scale.colours,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.022,
        headwidth=3.5,
        headlength=4,
        headaxislength=3.6,
        minlength=0,
        zorder=2,
    )
    lengths = np.linalg.norm(xy, axis=1)
    for j in np.flatnonzero(lengths > 0.25 * scale.limit):
        tip = xy[j] * (1 + 0.13 * scale.limit / lengths[j])
        ax.text(tip[0], tip[1], str(j), fontsize=8, color=DARK, ha="center", va="center")
    ax.set_xlim(-scale.limit, scale.limit)
    ax.set_ylim(-scale.limit, scale.limit)
    ax.set_aspect("equal")
    ticks = [-1, 0, 1] if scale.limit > 1 else [0]
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.tick_params(labelsize=7, length=2, labelleft=named)
    ax.spines[:].set_color("#b0b0b0")
    if named:
        ax.set_xlabel("hidden 0", fontsize=7.5, labelpad=1)
        ax.set_ylabel("hidden 1", fontsize=7.5, labelpad=1)


def draw_network(
    ax: Axes, layers: Sequence[Float[Tensor, "_inputs _outputs"]], scale: Scale, *, named: bool
) -> None:
    """Rows of nodes from the inputs (top) to the outputs; edges by weight, coloured by sign."""
    sizes = [layers[0].shape[0], *(layer.shape[1] for layer in layers)]
    height = len(layers)
    reached = [np.zeros(n, dtype=bool) for n in sizes]
    for i, layer in enumerate(layers):
        weights = layer.detach().numpy(force=True)
        strength = weights / scale.largest[i]
        edges = ax.add_collection(_edges(strength, top=height - i))
        edges.set_label(f"{scale.row_names[i]} to {scale.row_names[i + 1]}")
        keep_numbers(edges, [(j, k, x) for (j, k), x in np.ndenumerate(weights)])
        strong = np.abs(strength) > 0.1
        reached[i] |= strong.any(axis=1)
        reached[i + 1] |= strong.any(axis=0)
    for i, n in enumerate(sizes):
        faces = np.where(reached[i], DARK, "white")
        size = min(26.0, 420.0 / n)
        nodes = ax.scatter(
            node_places(n), np.full(n, height - i), s=size, c=faces, edgecolors=GREY, linewidths=0.7
        )
        keep_numbers(nodes, [])
        if named:
            ax.text(-0.08, height - i, scale.row_names[i], fontsize=7.5, ha="right", va="center")
    ax.set_xlim(-0.05, 1.05)
    ax.set_ylim(-0.3, height + 0.3)
    ax.set_axis_off()


def node_places(n: int) -> np.ndarray:
    """Where `n` nodes of one row stand between 0 and 1."""
    return (np.arange(n) + 0.5) / n


def _edges(strength: np.ndarray, *, top: int) -> LineCollection:
    """Lines for the entries of one matrix, given relative to the largest; thin where they crowd."""
    starts, ends = (node_places(n) for n in strength.shape)
    shown = np.argwhere(np.abs(strength) > LEAST_SHOWN)
    crowding = min(1.0, 30 / max(len(shown), 1)) ** 0.4
    lines, widths, colours = [], [], []
    for j, k in shown:
        size = min(abs(float(strength[j, k])), 1.0)
        lines.append([(starts[j], top), (ends[k], top - 1)])
        widths.append(0.3 + 2.3 * size * crowding)
        colours.append(
            to_rgba(BLUE if strength[j, k] > 0 else ORANGE, 0.1 + 0.9 * size ** (1 / crowding))
        )
    return LineCollection(lines, linewidths=widths, colors=colours, zorder=0)
