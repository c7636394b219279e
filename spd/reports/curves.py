"""The curves of a run for its page: the data that uPlot draws (leeoniya/uPlot, MIT, in `uplot/`)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from spd.reports.page import inline_json, inline_script

HERE = Path(__file__).parent
UPLOT = HERE / "uplot"
SCALES = {"linear": 1, "log": 3, "symlog": 4}
"""uPlot's numbers of what matplotlib calls them"""
DIGITS = 6
"""of a value: more than anybody reads, and a third of the page's weight less"""


def live_curves(figure: Figure) -> dict[str, Any]:
    """What the template needs to show the lines of `figure` to a reader who can zoom."""
    scripts = [UPLOT / "uPlot.iife.min.js", HERE / "curves.js"]
    script, policy = inline_script("\n".join(path.read_text(encoding="utf-8") for path in scripts))
    style = (UPLOT / "uPlot.min.css").read_text(encoding="utf-8")
    panels = [panel for ax in figure.axes if (panel := _panel(ax)) is not None]
    return {"panels": inline_json(panels), "style": style, "script": script, "policy": policy}


def _panel(ax: Axes) -> dict[str, Any] | None:
    """A title, the steps of all lines, and of each line a value for every step, or None."""
    lines = [(line, np.asarray(line.get_xdata(), dtype=float)) for line in ax.lines]
    lines = [(line, steps) for line, steps in lines if len(steps)]
    if not lines:
        return None
    steps = np.unique(np.concatenate([own for _, own in lines]))
    series = []
    for line, own in lines:
        found = dict(zip(own.tolist(), np.asarray(line.get_ydata(), dtype=float), strict=True))
        values = [_value(found.get(step)) for step in steps.tolist()]
        colour = to_hex(line.get_color())
        series.append({"label": str(line.get_label()), "colour": colour, "values": values})
    if ax.get_yscale() == "log":  # has no place for what is not positive
        for own in series:
            own["values"] = [v if v is not None and v > 0 else None for v in own["values"]]
    title = " ".join(ax.get_title().split())
    scale = SCALES.get(ax.get_yscale(), 1)
    return {"title": title, "scale": scale, "steps": steps.astype(int).tolist(), "series": series}


def _value(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")
