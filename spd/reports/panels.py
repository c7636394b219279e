"""Colours, and panels of equal size: what all figures have in common. Imports no torch."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6b6b6b"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, without the yellow that white paper swallows."""


def panel_grid(figure: Figure, n: int) -> list[Axes]:
    """`n` axes of equal size, at most three in a row."""
    columns = min(n, 3)
    axes = figure.subplots(-(-n // columns), columns, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.remove()
    for ax in axes[:n]:
        ax.tick_params(which="both", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    return list(axes[:n])


def panels_size(n: int) -> tuple[float, float]:
    """Size in inches of a figure that holds `panel_grid(figure, n)`."""
    return (max(4.8, 3.5 * min(n, 3)), 2.7 * -(-n // 3))
