"""A figure as a PNG that brings its text along. Imports no torch, as pages of sweeps need none."""

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 150


class FigureText(NamedTuple):
    """What stands beside a figure."""

    title: str
    reading: str
    """how to read it, a sentence or two"""
    alt: str
    """what it shows, for those who cannot see it"""


class DescribedFigure(Figure):
    """A figure that brings its text along."""

    def __init__(self, description: FigureText, *, figsize: tuple[float, float]) -> None:
        super().__init__(figsize=figsize, layout="constrained")
        self.description = description
        self.numbers: dict[Artist, Sequence[tuple[object, object, object]]] = {}
        """x, y and value of what is drawn, where that alone does not tell them"""


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG that carries its `FigureText`; the figure is empty afterwards."""
    metadata = {}
    if isinstance(figure, DescribedFigure):
        title, reading, alt = figure.description
        metadata = {"Title": title, "Description": reading, "Comment": alt}
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, dpi=DPI, format="png", metadata=metadata)
    figure.clear()
    return buffer.getvalue()


def read_png(png: bytes) -> tuple[FigureText | None, tuple[int, int]]:
    """The text inside a PNG of `png_bytes`, if any, and its size on paper in 1/96 inch."""
    image = Image.open(BytesIO(png))
    keys = ("Title", "Description", "Comment")
    known = all(key in image.info for key in keys)
    text = FigureText(*(str(image.info[key]) for key in keys)) if known else None
    return text, (round(image.width * 96 / DPI), round(image.height * 96 / DPI))
