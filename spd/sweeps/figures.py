"""The figures of a sweep: parallel coordinates, and the metric against every parameter."""

import base64
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from spd.reports.png import png_bytes, read_png
from spd.sweeps.definition import Metric
from spd.sweeps.trials import Trial, shown

MOST_DRAWN = 1000
"""runs in the figures: more make them no clearer"""
LOG_SPAN = 30
"""positive values that lie further apart than this factor are shown on a logarithmic axis"""
COLOURS = colormaps["viridis"]
PALEST = 0.85
"""of the colour map: what comes after it white paper swallows"""
LABEL_DISTANCE = 0.07
"""between the labels of an axis, in its length"""
GREY = "#6b6b6b"


class Scale:
    """Where the values of a parameter lie on an axis: by size, or side by side."""

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        self.numeric = len(numbers) == len(values) and all(math.isfinite(v) for v in numbers)
        self.log = self.numeric and min(numbers) > 0 and max(numbers) / min(numbers) > LOG_SPAN
        ordered = sorted(numbers) if self.numeric else sorted(map(shown, values))
        self.ticks = list(dict.fromkeys(ordered))
        self.places = {} if self.numeric else {tick: i for i, tick in enumerate(self.ticks)}

    def place(self, value: Any) -> float:
        if not self.numeric:
            return float(self.places[shown(value)])
        return math.log10(value) if self.log else float(value)

    def share(self, value: Any) -> float:
        """Between 0 and 1 from the lowest to the highest."""
        low, high = self.place(self.ticks[0]), self.place(self.ticks[-1])
        return 0.5 if high == low else (self.place(value) - low) / (high - low)


def parallel_coordinates(trials: Sequence[Trial], keys: Sequence[str], metric: Metric) -> Figure:
    """One line per trial (all have a value), through its value on every axis; the best are dark."""
    columns = [*keys, metric.name]
    rows = [[*(trial.point[key] for key in keys), trial.value] for trial in trials]
    scales = [Scale(values) for values in zip(*rows, strict=True)]
    figure = Figure(figsize=(max(5.0, 2.0 * len(columns)), 4.0), layout="constrained")
    ax = figure.subplots()
    shares = [
        [scale.share(value) for scale, value in zip(scales, row, strict=True)] for row in rows
    ]
    colours = [_colour(of_trial[-1], metric) for of_trial in shares]
    xs = range(len(columns))
    lines = [list(zip(xs, of_trial, strict=True)) for of_trial in shares]
    ax.add_collection(LineCollection(lines, colors=colours, linewidths=1.5))
    places = [place for line in lines for place in line]
    every_colour = [colour for colour in colours for _ in xs]
    ax.scatter(*zip(*places, strict=True), c=every_colour, s=16)
    for x, scale in enumerate(scales):
        ax.axvline(x, color=GREY, linewidth=0.8, zorder=0)
        labelled = -1.0
        for tick in scale.ticks:
            share = scale.share(tick)
            if share - labelled > LABEL_DISTANCE:
                place = {"xytext": (5, 3), "textcoords": "offset points"}
                ax.annotate(shown(tick), (x, share), **place, fontsize=8)
                labelled = share
    ax.set_xticks(
        range(len(columns)), [column.replace(".", ".\n") for column in columns], fontsize=8
    )
    ax.set_xlim(-0.2, len(columns) - 0.5)
    ax.set_ylim(-0.05, 1.1)
    ax.yaxis.set_visible(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def against_each(trials: Sequence[Trial], keys: Sequence[str], metric: Metric) -> Figure:
    """The metric of every trial (all have a value) against each parameter."""
    n_columns = min(3, len(keys))
    n_rows = math.ceil(len(keys) / n_columns)
    size = (3.6 * n_columns, 2.9 * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    values = [trial.value for trial in trials if trial.value is not None]
    scale = Scale(values)
    for ax in axes[len(keys) :]:
        ax.set_visible(False)
    for ax, key in zip(axes, keys, strict=False):
        colours = [_colour(scale.share(value), metric) for value in values]
        _scatter(ax, [trial.point[key] for trial in trials], values, colours)
        ax.set_xlabel(key, fontsize=9)
        ax.set_ylabel(metric.name, fontsize=9)
        if scale.log:
            ax.set_yscale("log")
    return figure


def _scatter(
    ax: Axes, points: Sequence[Any], values: Sequence[float], colours: Sequence[Any]
) -> None:
    scale = Scale(points)
    whole = all(isinstance(point, int) for point in points)
    if scale.log:
        ax.set_xscale("log")
    xs = [float(p) if scale.numeric else scale.place(p) for p in points]
    ax.scatter(xs, values, c=colours, s=28)
    if not scale.numeric:
        ax.set_xticks(range(len(scale.ticks)), [str(tick) for tick in scale.ticks])
    elif whole and len(scale.ticks) <= 10:
        ax.set_xticks(scale.ticks, [str(tick) for tick in scale.ticks])
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)


def _colour(share: float, metric: Metric) -> tuple[float, float, float, float]:
    return COLOURS(PALEST * (share if metric.goal == "minimize" else 1.0 - share))


def figures_of(
    trials: Sequence[Trial], keys: Sequence[str], metric: Metric
) -> list[dict[str, Any]]:
    """Those of the page, ready to be inlined; none as long as no run has a value."""
    every = [trial for trial in trials if trial.value is not None]
    valued = every[:MOST_DRAWN]
    if not valued:
        return []
    left_out = len(every) > len(valued)
    which = f" Of {len(every):,} runs the best {len(valued):,} are shown." if left_out else ""
    drawn: list[tuple[str, str, Any]] = [
        (
            "Parallel coordinates",
            f"One line per run, through its value on every axis; the best are the darkest.{which}",
            parallel_coordinates(valued, keys, metric),
        ),
        (
            "The metric against each parameter",
            f"One point per run; the best are the darkest.{which}",
            against_each(valued, keys, metric),
        ),
    ]
    return [_image(title, text, png_bytes(figure)) for title, text, figure in drawn]


def _image(title: str, text: str, png: bytes) -> dict[str, Any]:
    data = base64.b64encode(png).decode("ascii")
    return {"title": title, "text": text, "data": data, "width": read_png(png)[1][0]}
