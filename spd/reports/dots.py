"""The seeds of one experiment as dots: a figure of merit in each panel, a run in each dot."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from spd.config import counted
from spd.reports.panels import (
    BLUE,
    GREY,
    ORANGE,
    panel_grid,
    panels_size,
)
from spd.reports.png import DescribedFigure, FigureText

WIDTH = 0.6
"""of the strip of a target, between whose dots the distance is the same"""


class Dot(NamedTuple):
    """One run."""

    seed: str
    target: int | None
    """on which of several targets"""
    solved: bool | None
    """None: nobody knows"""
    values: Mapping[str, float]
    """by the key of the figure of merit"""


class Panel(NamedTuple):
    """One figure of merit."""

    key: str
    label: str
    published: float | None = None


class Style(NamedTuple):
    """How the runs with one verdict are shown."""

    label: str
    colour: str
    fill: Literal["full", "none"]


STYLES = {
    True: Style("solved", BLUE, "full"),
    False: Style("not solved", ORANGE, "none"),
    None: Style("no verdict", GREY, "full"),
}


def dots(experiment: str, panels: Sequence[Panel], runs: Sequence[Dot]) -> DescribedFigure:
    """A strip of dots for each target, or one where there is one target."""
    n_solved = sum(run.solved is True for run in runs)
    targets = sorted({run.target for run in runs if run.target is not None}) or [None]
    n_targets = f" on {counted(len(targets), 'target')}" if len(targets) > 1 else ""
    text = FigureText(
        f"{experiment}: every seed",
        "Each dot is one run; filled blue is solved, an orange ring is not. Dots stand in the order of"
        " their seeds from left to right. The dashed line is the published figure, where there is one.",
        f"{counted(len(runs), 'run')} of {experiment}{n_targets}, {n_solved} of them solved:"
        f" {', '.join(panel.label for panel in panels)}.",
    )
    figure = DescribedFigure(text, figsize=panels_size(len(panels)))
    axes = panel_grid(figure, len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        _strip(ax, panel, runs, targets)
    by_label: dict[str, Artist] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(by_label.values()),
        list(by_label),
        ncols=len(by_label),
        fontsize=8,
        frameon=False,
        loc="outside upper right",
    )
    return figure


def _strip(ax: Axes, panel: Panel, runs: Sequence[Dot], targets: Sequence[int | None]) -> None:
    places = _places(runs, targets)
    for verdict, style in STYLES.items():
        shown = [
            (place, run.values[panel.key])
            for place, run in zip(places, runs, strict=True)
            if run.solved is verdict and panel.key in run.values
        ]
        if shown:
            x, y = zip(*shown, strict=True)
            line: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5}
            ax.plot(x, y, color=style.colour, fillstyle=style.fill, label=style.label, **line)
    if panel.published is not None:
        ax.axhline(panel.published, color=GREY, linestyle="--", linewidth=1, label="published")
    ax.set_title(panel.label, fontsize=10)
    ax.set_xlim(-0.6, len(targets) - 0.4)
    several = targets != [None]
    ax.set_xticks(range(len(targets)) if several else [], [str(t) for t in targets if several])
    ax.set_xlabel("target" if several else counted(len(runs), "seed"), fontsize=9)


def _places(runs: Sequence[Dot], targets: Sequence[int | None]) -> list[float]:
    """Where the dot of each run stands from left to right: with its target, by its seed."""
    places, n_of = [], {target: sum(run.target == target for run in runs) for target in targets}
    seen = dict.fromkeys(targets, 0)
    for run in runs:
        n = n_of[run.target]
        share = (seen[run.target] + 0.5) / n - 0.5
        places.append(targets.index(run.target) + WIDTH * share)
        seen[run.target] += 1
    return places
