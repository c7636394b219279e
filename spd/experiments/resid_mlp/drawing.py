"""How the figures of residual MLPs are drawn: tensors in, a matplotlib figure out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from spd.experiments.resid_mlp.metrics import Contributions, agreement
from spd.reports.drawing import MAX_WIDTH
from spd.reports.panels import GREY, ORANGE, PALETTE, panel_grid, panels_size
from spd.reports.png import DescribedFigure, FigureText

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELLED_SHARE = 0.3
"""A neuron is labelled if it contributes this share of the feature's largest contribution."""
MAX_LABELS = 4
LIGHT = "#b0b0b0"


# --- neuron contributions --------------------------------------------------------------------------


def contributions_figure(layers: Sequence[Contributions], n_shown: int) -> DescribedFigure:
    """Dots per feature, one for each neuron: the target above, the subcomponents below."""
    n_features = len(layers[0].target)
    n_shown = min(n_shown, n_features)
    found = agreement(layers)
    text = FigureText(
        "Neuron contributions",
        "Each column is one input feature, each dot one neuron: how much of the feature's way from"
        " its input to its own output leads through that neuron, before the activation function."
        " Above in the target; below through the one subcomponent of mlp_in that stands for the"
        " feature (its index in brackets) and all of mlp_out. The largest are labelled with the"
        " neuron's number. In a faithful decomposition both rows are the same: one subcomponent"
        f" reaches all the neurons that compute the feature{_in_every(layers)}."
        + (f" The first {n_shown} of {n_features} features." if n_shown < n_features else ""),
        f"Dot plots of the contributions of single neurons to {n_shown} features, target above,"
        f" subcomponents below. Over all {n_features} features their correlation is"
        f" {found.correlation:.3f}, the slope {found.slope:.3f}.",
    )
    figure = DescribedFigure(text, figsize=(max(4.8, min(MAX_WIDTH, 1 + 0.95 * n_shown)), 6.6))
    upper, lower = figure.subplots(2, 1, sharex=True, sharey=True)
    rows = {
        "target": [layer.target[:n_shown].numpy(force=True) for layer in layers],
        "one subcomponent each": [
            layer.subcomponents[:n_shown].numpy(force=True) for layer in layers
        ],
    }
    every = np.concatenate([values.ravel() for row in rows.values() for values in row])
    gap = 0.062 * max(float(np.ptp(every)), 1e-12)
    for ax, (title, row) in zip((upper, lower), rows.items(), strict=True):
        _contribution_panel(ax, row, gap)
        ax.set_title(title, fontsize=10)
    chosen = torch.stack([layer.chosen[:n_shown] for layer in layers], dim=1).tolist()
    ticks = [f"{i}\n({', '.join(map(str, own))})" for i, own in enumerate(chosen)]
    lower.set_xticks(range(n_shown), ticks)
    lower.set_xlim(-0.4, n_shown - 0.5)
    several = "s, by layer" if len(layers) > 1 else ""
    lower.set_xlabel(f"input feature (its subcomponent{several})", fontsize=9)
    if len(layers) > 1:
        figure.legend(
            handles=_layer_handles(len(layers)),
            loc="outside upper right",
            fontsize=8,
            frameon=False,
            ncols=len(layers),
        )
    return figure


def _contribution_panel(ax: Axes, layers: Sequence[np.ndarray], gap: float) -> None:
    """`layers` are `[features, neurons]`; labels stand at least `gap` apart."""
    ax.axhline(0, color=LIGHT, linewidth=0.8, zorder=0)
    for layer, values in enumerate(layers):
        x = np.repeat(np.arange(len(values)), values.shape[1])
        _dots(ax, x, values.ravel(), layer, size=4.0)
    for feature in range(len(layers[0])):
        own = [values[feature] for values in layers]
        _label_neurons(ax, feature, own, gap)
    ax.margins(y=0.08)
    ax.set_ylabel("neuron contribution", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _label_neurons(ax: Axes, feature: int, layers: Sequence[np.ndarray], gap: float) -> None:
    """The numbers of the largest neurons beside their dots, pushed apart where they would overlap."""
    largest = max(float(values.max()) for values in layers)
    candidates = [
        (float(y), layer, neuron)
        for layer, values in enumerate(layers)
        for neuron, y in enumerate(values)
        if y > LABELLED_SHARE * largest > 0
    ]
    place = float("inf")
    for y, layer, neuron in sorted(candidates, reverse=True)[:MAX_LABELS]:
        place = min(y, place - gap)
        ax.annotate(
            str(neuron),
            (feature, y),
            (feature + 0.13, place),
            fontsize=7,
            color=PALETTE[layer % len(PALETTE)],
            va="center",
            arrowprops={"arrowstyle": "-", "color": LIGHT, "linewidth": 0.5, "shrinkB": 2},
        )


def scatter_figure(layers: Sequence[Contributions]) -> DescribedFigure:
    """Every neuron's contribution to every feature: subcomponents over target, and y = x."""
    found = agreement(layers)
    n_points = sum(layer.target.numel() for layer in layers)
    text = FigureText(
        "Neuron contributions, all at once",
        f"Each of the {n_points:,} dots is one neuron's contribution to one feature: in the target"
        " (across) and through the feature's own subcomponent (up). On the grey line both are equal;"
        " the dashed one is the best line through the origin. Dots above the line have taken over"
        " part of what other subcomponents should do, dots at zero height were missed.",
        f"Scatter plot with a correlation of {found.correlation:.4f} and a slope of"
        f" {found.slope:.4f}.",
    )
    figure = DescribedFigure(text, figsize=(5.2, 5.2))
    ax = figure.subplots()
    points = [
        (layer.target.numpy(force=True).ravel(), layer.subcomponents.numpy(force=True).ravel())
        for layer in layers
    ]
    every = np.concatenate([values for pair in points for values in pair])
    margin = 0.05 * max(float(np.ptp(every)), 1e-12)
    ends = np.array([every.min() - margin, every.max() + margin])
    ax.plot(ends, ends, color=LIGHT, linewidth=1.2, zorder=1)
    ax.plot(ends, found.slope * ends, color="black", linewidth=1, linestyle="--", zorder=3)
    for layer, (x, y) in enumerate(points):
        _dots(ax, x, y, layer, size=3.5)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_title(
        f"correlation {found.correlation:.4f}, slope {found.slope:.4f}", fontsize=10, loc="left"
    )
    ax.set_xlabel("neuron contribution in the target", fontsize=9)
    ax.set_ylabel("neuron contribution of one subcomponent", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    lines = [
        Line2D([], [], color=LIGHT, linewidth=1.2, label="y = x"),
        Line2D([], [], color="black", linewidth=1, linestyle="--", label="fit through the origin"),
    ]
    dots = _layer_handles(len(layers))
    if len(layers) == 1:
        dots[0].set_label("a neuron and a feature")
    ax.legend(handles=[*dots, *lines], fontsize=8, frameon=False)
    return figure


def _dots(ax: Axes, x: np.ndarray, y: np.ndarray, layer: int, *, size: float) -> None:
    """Every layer in a colour and a shape of its own."""
    colour, marker = PALETTE[layer % len(PALETTE)], MARKERS[layer % len(MARKERS)]
    ax.plot(x, y, marker, color=colour, markersize=size, alpha=0.6, markeredgewidth=0, zorder=2)


def _layer_handles(n_layers: int) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            color=PALETTE[layer % len(PALETTE)],
            marker=MARKERS[layer % len(MARKERS)],
            linestyle="none",
            markersize=5,
            label=f"layer {layer}",
        )
        for layer in range(n_layers)
    ]


def _in_every(layers: Sequence[Contributions]) -> str:
    return ", one in every layer" if len(layers) > 1 else ""


# --- response curves -------------------------------------------------------------------------------


class Responses(NamedTuple):
    """Outputs while one feature alone is active, for several features in turn."""

    inputs: Float[Tensor, " inputs"]
    labels: Float[Tensor, "features inputs n_features"]
    target: Float[Tensor, "features inputs n_features"]
    decomposition: Float[Tensor, "features inputs n_features"]
    """masked by its causal importances"""


def responses_figure(responses: Responses) -> DescribedFigure:
    """One panel per feature: its own output, and the largest of all others, over its input."""
    n_shown, _, n_features = responses.target.shape
    text = FigureText(
        "One feature at a time",
        "One input feature alone runs from -1 to 1. Thick: the feature's own output in the target;"
        " thin: in the decomposition, masked by its causal importances; dotted: the label, what the"
        " target was trained to compute. The target, with fewer neurons than features, only comes"
        " near the label, and the decomposition should do exactly what the target does. Dashed, in"
        " the same colours: the largest size of any other output, that is, how far the features"
        " spill over onto each other."
        + (f" The first {n_shown} of {n_features} features." if n_shown < n_features else ""),
        f"Curves of output over input for {n_shown} features, of the target, the decomposition and"
        " the label.",
    )
    figure = DescribedFigure(text, figsize=panels_size(n_shown))
    x = responses.inputs.numpy(force=True)
    styles = {
        "label": (responses.labels, GREY, 1.2, ":"),
        "target": (responses.target, "#56B4E9", 3.5, "-"),
        "decomposition": (responses.decomposition, ORANGE, 1.2, "-"),
    }
    axes = panel_grid(figure, n_shown)
    for feature, ax in enumerate(axes):
        for name, (outputs, colour, width, line) in styles.items():
            own = outputs[feature].clone()
            curve = own[:, feature].numpy(force=True)
            ax.plot(x, curve, color=colour, linewidth=width, linestyle=line, label=name)
            if name != "label" and n_features > 1:
                own[:, feature] = 0.0
                others = own.abs().amax(dim=-1).numpy(force=True)
                ax.plot(x, others, color=colour, linewidth=0.6 * width, linestyle="--")
        ax.set_title(f"feature {feature}", fontsize=10)
        ax.set_xlabel(f"input {feature}", fontsize=9)
        ax.set_ylabel(f"output {feature}", fontsize=9)
    dashed = Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="largest other output")
    handles = [*axes[0].get_legend_handles_labels()[0], dashed]
    axes[0].legend(handles=handles, fontsize=8, frameon=False)
    return figure
