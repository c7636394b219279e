"""Runs whose pictures are left out, for tests of other things: drawing takes longer than six steps.

Everything else about a picture stays: its text, its size, its file and its numbers. A test or module
marked `undrawn` has this in its own process; the runs of `tests.run_fixtures` have it unless they are
asked for pictures (`drawn=True`).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import BinaryIO
from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def _print_nothing(
    canvas: FigureCanvasAgg,
    file: BinaryIO,
    *,
    dpi: float,
    format: str,
    metadata: Mapping[str, str],
) -> None:
    """Instead of `FigureCanvasAgg.print_figure`: white paper."""
    text = PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    width, height = (round(inches * dpi) for inches in canvas.figure.get_size_inches())
    Image.new("1", (width, height), 1).save(file, format, pnginfo=text)


def undrawn() -> AbstractContextManager[object]:
    """White paper instead of every picture."""
    return mock.patch.object(FigureCanvasAgg, "print_figure", _print_nothing)
