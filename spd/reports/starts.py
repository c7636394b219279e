"""The starts of a run side by side: what each came to at every choice, why it was dropped, and its curve.

Reads files alone, and says what is recorded.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from spd.reports.curves import live_curves
from spd.reports.drawing import DescribedFigure, FigureText
from spd.reports.figures import png_bytes
from spd.reports.numbers import figure_csv
from spd.reports.page import render_page
from spd.reports.panels import ORANGE, panel_grid, panels_size
from spd.reports.png import read_png
from spd.reports.reading import configuration_in
from spd.reports.results import Start, Starts, choice_of, format_value, read_starts
from spd.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    STARTS,
    STARTS_PAGE,
    atomic_write,
    read_lines,
)

STARTS_TABLE = Path(STARTS_PAGE).with_suffix(".csv").name
"""the numbers of its figure, beside it"""
HELD_OUT = "eval/loss/total"


class Row(NamedTuple):
    """One start, as its line of the table shows it."""

    start: int
    seed: int
    losses: list[str]
    """on the data of the choice, at every step where starts were compared"""
    became: str
    chosen: bool


def write_starts_page(run: Path) -> Path | None:
    """Write `starts.html` into a run directory; None where nothing is recorded of any start."""
    record = read_starts(run)
    if record is None:
        return None
    figure = starts_figure(record, histories(run, record))
    config = configuration_in(run / CONFIG_FILE)
    live = live_curves(figure)
    atomic_write(run / STARTS_TABLE, figure_csv(figure))
    png = png_bytes(figure)  # which leaves the figure empty
    text, (width, height) = read_png(png)
    contents: dict[str, Any] = {
        "experiment": config.get("experiment", run.parent.name),
        "run_name": run.name,
        "report": REPORT_FILE if (run / REPORT_FILE).is_file() else None,
        "choice": choice_of(record.starts),
        "together": record.together,
        "compared": [f"step {step:,}" for step in compared_at(record)],
        "rows": rows_of(record),
        "live": live,
        "numbers": STARTS_TABLE,
        "text": text,
        "png": base64.b64encode(png).decode("ascii"),
        "width": width,
        "height": height,
    }
    return render_page(run / STARTS_PAGE, "starts.html.j2", contents)


def compared_at(record: Starts) -> list[int]:
    """The steps before which starts were compared."""
    return sorted({step for start in record.starts for step in start.losses})


def rows_of(record: Starts) -> list[Row]:
    """One for each start, the one that came furthest first."""
    steps = compared_at(record)

    def order(start: Start) -> tuple[bool, int, float]:
        last = max(start.losses, default=0)
        return not start.chosen, -last, start.losses.get(last, 0.0)

    return [
        Row(
            start.index,
            start.seed,
            [format_value(start.losses.get(step), None, ".4g") for step in steps],
            _became(start),
            start.chosen,
        )
        for start in sorted(record.starts, key=order)
    ]


def _became(start: Start) -> str:
    if start.chosen:
        return "chosen: this is the run"
    if start.dropped is None:
        return "still in"
    return f"dropped before step {start.dropped:,}: {start.reason}"


def histories(run: Path, record: Starts) -> dict[int, list[dict[str, float]]]:
    """The lines that each start has logged; the chosen one goes on in those of the run."""
    found = {}
    for start in record.starts:
        goes_on = start.chosen and (run / CHECKPOINTS).is_dir()
        path = (run if goes_on else run / STARTS / str(start.index)) / METRICS_FILE
        found[start.index] = read_lines(path) if path.is_file() else []
    return found


def starts_figure(record: Starts, lines: Mapping[int, list[dict[str, float]]]) -> Figure:
    """Two panels over the steps: each start's held-out loss, and its loss on the data of the choice."""
    text = FigureText(
        "The losses of all starts",
        "The total of all terms on held-out data, by which nothing is chosen, and on the data of the"
        " choice. A line ends where its start was dropped; that of the chosen one is orange.",
        f"Curves of the losses of {len(record.starts)} starts over the steps.",
    )
    figure = DescribedFigure(text, figsize=panels_size(2))
    held_out, choice = panel_grid(figure, 2)
    spread = colormaps["viridis"].resampled(max(len(record.starts), 2))
    for start in record.starts:
        style = {"color": to_hex(spread(start.index)), "linewidth": 1.0, "zorder": 2.0}
        if start.chosen:
            style = {"color": ORANGE, "linewidth": 2.0, "zorder": 3.0}
        own = [(line["step"], line[HELD_OUT]) for line in lines[start.index] if HELD_OUT in line]
        chosen_by = sorted(start.losses.items())
        for ax, points in ((held_out, own), (choice, chosen_by)):
            xs, ys = [step for step, _ in points], [value for _, value in points]
            ax.plot(xs, ys, marker=".", markersize=4, label=f"start {start.index}", **style)
    for ax, title in ((held_out, "held-out loss"), (choice, "loss on the data of the choice")):
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("loss", fontsize=9)
        values = [y for line in ax.lines for y in line.get_ydata()]  # pyright: ignore
        if any(value > 0 for value in values):
            ax.set_yscale("log", nonpositive="mask")
    held_out.legend(fontsize=7, frameon=False, ncols=2)
    return figure
