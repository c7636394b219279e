"""The numbers that a figure shows, as a table: read from what is drawn, or from what a drawing keeps."""

import csv
from collections.abc import Iterator, Sequence
from io import StringIO

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.quiver import Quiver

from spd.reports.png import DescribedFigure

HEADS = ("panel", "series", "x", "y", "value")
"""`value` is what a colour or a line's width stands for; of a heat map x is the column, y the row"""
COLOUR_BAR = "<colorbar>"
"""how matplotlib labels the axes of one"""

Row = tuple[object, object, object]


def figure_csv(figure: Figure) -> str:
    """One line for every point, arrow, bar and cell of all panels."""
    kept = figure.numbers if isinstance(figure, DescribedFigure) else {}
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADS)
    panels = [ax for ax in figure.axes if ax.get_label() != COLOUR_BAR]
    for place, ax in enumerate(panels, start=1):
        panel = " ".join(ax.get_title().split()) or str(place)
        for artist in ax.get_children():
            label = str(artist.get_label())
            series = "" if label.startswith("_") else label
            for row in kept[artist] if artist in kept else _rows(ax, artist):
                writer.writerow((panel, series, *map(_number, row)))
    return text.getvalue()


def _rows(ax: Axes, artist: Artist) -> Iterator[Row] | Sequence[Row]:
    """x, y and value of what an artist shows; nothing of lines that only guide the eye."""
    if artist in ax.lines:
        line = ax.lines[list(ax.lines).index(artist)]  # pyright: ignore[reportArgumentType]
        if line.get_transform() != ax.transData:
            return []
        xs, ys = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        return ((x, y, "") for x, y in zip(xs, ys, strict=True))
    if artist in ax.images:
        image = ax.images[list(ax.images).index(artist)]  # pyright: ignore[reportArgumentType]
        values = np.asarray(image.get_array())
        return ((x, y, values[y, x]) for y, x in np.ndindex(*values.shape[:2]))
    if isinstance(artist, Quiver):
        return ((x, y, "") for x, y in zip(np.asarray(artist.U), np.asarray(artist.V), strict=True))
    if isinstance(artist, StepPatch):
        values, edges, _ = map(np.asarray, artist.get_data())
        return ((x, y, "") for x, y in zip(edges[:-1], values, strict=True))
    if isinstance(artist, PathCollection):
        return ((x, y, "") for x, y in np.asarray(artist.get_offsets()))
    return []


def _number(value: object) -> object:
    """As short as it says the same: nine digits are those of float32."""
    return f"{float(value):.9g}" if isinstance(value, float | np.floating) else value
