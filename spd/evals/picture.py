"""The seeds of an experiment as dots, for the page of a study."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spd.reports.dots import Dot, Panel, dots
from spd.reports.numbers import figure_csv
from spd.reports.png import FigureText, png_bytes, read_png
from spd.reports.results import Result
from spd.reports.seeds import Figure
from spd.run_files import atomic_write


class Run(NamedTuple):
    """A finished one."""

    name: str
    target: int | None
    result: Result


class Picture(NamedTuple):
    """The seeds of an experiment as dots, ready to be inlined."""

    text: FigureText
    data: str
    """the PNG in base64"""
    width: int
    """in CSS pixels"""
    numbers: str
    """where its CSV lies, from the study"""


def picture_of(
    directory: Path, experiment: str, figures: Sequence[Figure], runs: Sequence[Run]
) -> Picture | None:
    """None of fewer than two finished runs. Its PNG and CSV lie beside the page."""
    panels = [Panel(figure.key, figure.label, figure.published) for figure in figures]
    if len(runs) < 2 or not panels:
        return None
    found = [
        Dot(run.name, run.target, run.result.solved, {r.key: r.value for r in run.result.rows})
        for run in runs
    ]
    drawn = dots(experiment, panels, found)
    numbers = directory / f"{experiment}-seeds.csv"
    atomic_write(numbers, figure_csv(drawn))
    png = png_bytes(drawn)
    atomic_write(numbers.with_suffix(".png"), png)
    text, (width, _) = read_png(png)
    assert text is not None, "it was drawn with one"
    return Picture(text, b64encode(png).decode(), width, numbers.name)
