"""The figures of a run directory, ready to be inlined into its page."""

import base64
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from spd.config import UserError
from spd.reports.numbers import figure_csv
from spd.reports.png import FigureText, png_bytes, read_png
from spd.run_files import FIGURES, atomic_write

CURVES = "loss_curves"


class Image(NamedTuple):
    """A figure, ready to be inlined."""

    name: str
    text: FigureText
    data: str
    """the PNG in base64"""
    width: int
    """on paper, in CSS pixels"""
    height: int
    numbers: str | None = None
    """where its CSV lies, from the run directory"""


def images(directory: Path, configured: list[str], *, at: int | None = None) -> list[Image]:
    """The drawing of each figure `at` a step, or the newest, in the configured order; not the curves."""
    newest: dict[str, Path] = {}
    drawn = directory.rglob("*.png" if at is None else f"{at:08d}.png")
    for path in sorted(drawn, key=lambda path: path.name):
        newest[path.parent.relative_to(directory).as_posix()] = path
    newest.pop(CURVES, None)
    names = sorted(newest, key=lambda n: (configured.index(n) if n in configured else 10**6, n))
    return [
        image(name, newest[name].read_bytes())._replace(numbers=numbers_of(newest[name], directory))
        for name in names
    ]


def drawn(name: str, figure: Figure, table: Path, run_dir: Path) -> Image:
    """A figure of a page, which is emptied; its numbers are written to `table` in the run."""
    table.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(table, figure_csv(figure))
    return image(name, png_bytes(figure))._replace(numbers=table.relative_to(run_dir).as_posix())


def numbers_of(png: Path, figures: Path) -> str | None:
    """The table beside a drawing, where there is one: older runs have none."""
    table = png.with_suffix(".csv")
    return table.relative_to(figures.parent).as_posix() if table.is_file() else None


def image(name: str, png: bytes) -> Image:
    title = name.replace("_", " ").replace("/", ": ")
    try:
        text, (width, height) = read_png(png)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{FIGURES}/{name}: not a readable picture: {error}") from None
    data = base64.b64encode(png).decode("ascii")
    return Image(name, text or FigureText(title, "", title), data, width, height)
