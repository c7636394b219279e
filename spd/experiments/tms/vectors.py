"""The single subcomponents of a toy model of superposition beside the target's columns."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import SubFigure
from torch import Tensor

from spd.component_model import ComponentModel
from spd.components import input_output_weight
from spd.experiments.tms.diagrams import (
    Part,
    Row,
    Scale,
    draw_row,
    row_height,
)
from spd.metrics import (
    INERT_FRACTION,
    ColumnMatch,
    column_match,
    columns_in_use,
)
from spd.problem import Problem
from spd.reports.drawing import MAX_WIDTH, colour_bar, column_order, heat_map
from spd.reports.panels import BLUE, ORANGE, PALETTE
from spd.reports.png import DescribedFigure, FigureText

PER_ROW = 7
MAX_SINGLE = 12
HANDFUL = 3
"""Subcomponents shown of a model whose hidden space is no plane."""
TITLE = "The target's columns and the subcomponents"
READ_NETWORKS = (
    "the wider and darker a connection, the larger its weight; blue is positive, orange negative."
)


def vectors_figure(
    model: ComponentModel, problem: Problem, importances: Mapping[str, Float[Tensor, "probes _C"]]
) -> DescribedFigure:
    """The paper's first figure; where the hidden space is no plane, its counterpart."""
    in_plane = model.sites["linear1"].target_weight.shape[1] == 2
    tied = {path for _, path in problem.tied_sites}
    rows = [
        row
        for path, g in importances.items()
        if path not in tied
        for row in _rows(model, problem, path, g, MAX_SINGLE if in_plane else HANDFUL)
    ]
    return _plane_figure(rows) if in_plane else _space_figure(rows, model)


def layer_weights(model: ComponentModel) -> dict[str, Float[Tensor, "_inputs _outputs"]]:
    """The matrices of the toy model, decomposed or not, from the inputs to the outputs."""
    hidden = model.target.get_submodule("hidden_layers").children()
    paths = ["linear1", *(f"hidden_layers.{i}" for i, _ in enumerate(hidden)), "linear2"]
    return {
        path: model.sites[path].target_weight
        if path in model.sites
        else input_output_weight(model.target.get_submodule(path))
        for path in paths
    }


def network_parts(
    model: ComponentModel, problem: Problem, path: str, columns: Sequence[int]
) -> list[Part]:
    """The target, the sum of all subcomponents, and those of `path` in `columns` one by one.

    A site tied to `path` shares its subcomponents, so that one of them has a part in both.
    """
    target = layer_weights(model)
    sums = {
        name: model.sites[name].subcomponents.V @ model.sites[name].subcomponents.U
        if name in model.sites
        else weight
        for name, weight in target.items()
    }
    parts = [("target", target), ("sum of all", sums)]
    sharing = {path, *(tied for source, tied in problem.tied_sites if source == path)}
    for c in columns:
        own = {name: torch.zeros_like(weight) for name, weight in target.items()}
        for name in sharing:
            subcomponents = model.sites[name].subcomponents
            own[name] = torch.outer(subcomponents.V[:, c], subcomponents.U[c])
        parts.append((f"subcomponent {c}", own))
    return [
        Part(title, layers[path] if layers[path].shape[1] == 2 else None, list(layers.values()))
        for title, layers in parts
    ]


def best_cosines(
    weight: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    match: ColumnMatch,
) -> Float[Tensor, "d_in d_in"]:
    """Entry (i, j): the cosine of W[:, i] and U_c V_jc, c being j's best match; NaN without one."""
    columns = V.gather(1, match.best.clamp(min=0)[:, None]) * U[match.best.clamp(min=0)]
    cosines = F.normalize(weight, dim=1) @ F.normalize(columns, dim=1).mT
    return cosines.masked_fill((match.best < 0)[None, :], torch.nan)


def _rows(
    model: ComponentModel,
    problem: Problem,
    path: str,
    g: Float[Tensor, "probes C"],
    n_single: int,
) -> list[Row]:
    """Target, sum and the single subcomponents in use of one site, in lines of `PER_ROW`."""
    weight = model.sites[path].target_weight
    used = columns_in_use(g).tolist()
    order = column_order(g, problem.solution.get(path)).columns
    columns = [c for c in order if used[c]]
    parts = network_parts(model, problem, path, columns[:n_single])
    tied = dict(problem.tied_sites).get(path)
    heading = f"{path}, with its transpose {tied}" if tied else path
    heading += f": {len(columns)} of {len(used)} subcomponents in use"
    if len(columns) > n_single:
        heading += f", {n_single} of them shown"
    scale = Scale(
        limit=1.4 * max(float(weight.norm(dim=1).max()), 1e-12),
        largest=[max(float(w.abs().max()), 1e-12) for w in layer_weights(model).values()],
        colours=_colours(weight.shape[0], of_features=path == "linear1"),
        row_names=["inputs", *["hidden"] * (len(parts[0].layers) - 1), "outputs"],
    )
    lines = [parts[i : i + PER_ROW] for i in range(0, len(parts), PER_ROW)]
    return [Row(heading if i == 0 else "", line, scale) for i, line in enumerate(lines)]


def _colours(n: int, *, of_features: bool) -> list[str]:
    """Others for hidden dimensions than for features."""
    palette: list[str] = [*PALETTE] if of_features else [*reversed(PALETTE)]
    if n <= len(palette):
        return palette[:n]
    return [to_hex(colormaps["viridis"](0.9 * j / (n - 1))) for j in range(n)]


def _plane_figure(rows: Sequence[Row]) -> DescribedFigure:
    """The rows one above the other: vectors, and the networks underneath."""
    text = FigureText(
        TITLE,
        "Every arrow is what one input (its number at the tip) is mapped to in the two hidden"
        " dimensions: by the target's matrix, by the sum of all subcomponents, and by each single"
        " subcomponent in use. In a solved run the sum equals the target, and each subcomponent of"
        f" linear1 is one of its arrows. Underneath, the same as networks: {READ_NETWORKS}",
        "Vectors in the plane with network diagrams. "
        + " ".join(f"{row.heading}." for row in rows if row.heading),
    )
    n_columns = max(len(row.parts) for row in rows)
    heights = [row_height(row) for row in rows]
    figure = DescribedFigure(text, figsize=(max(5.0, 1.6 * n_columns + 0.5), sum(heights)))
    places = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, row in zip(places, rows, strict=True):
        draw_row(place, row, n_columns)
    return figure


def _space_figure(rows: Sequence[Row], model: ComponentModel) -> DescribedFigure:
    """Cosines and norms in place of the vectors, and a handful of networks."""
    site = model.sites["linear1"]
    weight, V, U = site.target_weight, site.subcomponents.V, site.subcomponents.U
    match = column_match(weight, V, U, min_ratio=INERT_FRACTION)
    text = FigureText(
        TITLE,
        "Left: the cosine between any two columns of linear1; many are not at right angles, which"
        " is superposition. Middle: the cosine between each column and the single subcomponent that"
        " matches each input best; in a solved run the same picture, with a diagonal of ones."
        " Right: that diagonal, and the length of each match relative to the column's; both should"
        f" be 1. Underneath, a handful of subcomponents as networks: {READ_NETWORKS}",
        f"Cosine matrices (mean best cosine {float(match.mmcs.mean()):.3f}, mean ratio of norms"
        f" {float(match.ml2r.mean()):.3f}) and network diagrams.",
    )
    heights = [3.5, *(row_height(row) for row in rows)]
    figure = DescribedFigure(text, figsize=(MAX_WIDTH + 0.5, sum(heights)))
    places = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    directions = F.normalize(weight, dim=1)
    _cosine_panels(places[0], directions @ directions.mT, best_cosines(weight, V, U, match), match)
    n_columns = max(len(row.parts) for row in rows)
    for place, row in zip(places[1:], rows, strict=True):
        draw_row(place, row, n_columns)
    return figure


def _cosine_panels(
    figure: SubFigure,
    of_target: Float[Tensor, "n n"],
    of_best: Float[Tensor, "n n"],
    match: ColumnMatch,
) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    image = heat_map(left, of_target.numpy(force=True), "RdBu_r", -1.0, 1.0)
    left.set_title("target with target", fontsize=10)
    left.set_xlabel("input feature (target's column)", fontsize=9)
    left.set_ylabel("input feature (target's column)", fontsize=9)
    heat_map(middle, of_best.numpy(force=True), "RdBu_r", -1.0, 1.0)
    middle.set_title("target with best subcomponent", fontsize=10)
    middle.set_xlabel("input feature (its best subcomponent)", fontsize=9)
    for ax in (left, middle):
        ax.set_aspect("equal")
        ax.tick_params(labelsize=8)
    colour_bar(figure, image, [left, middle], "cosine")
    _match_panel(right, match)


def _match_panel(ax: Axes, match: ColumnMatch) -> None:
    ax.axhline(1, color="#b0b0b0", linewidth=1)
    for values, colour, marker, label in (
        (match.mmcs, BLUE, "o", "cosine"),
        (match.ml2r, ORANGE, "s", "norm over the target's"),
    ):
        ax.plot(
            values.numpy(force=True), marker, color=colour, markersize=4, alpha=0.9, label=label
        )
    low = min(float(torch.minimum(match.mmcs, match.ml2r).min()), 0.95)
    high = max(float(torch.maximum(match.mmcs, match.ml2r).max()), 1.05)
    ax.set_box_aspect(0.8)
    ax.set_ylim(low - 0.2 * (high - low), high + 0.05 * (high - low))  # room for the legend
    ax.set_title("best subcomponent of each feature", fontsize=10)
    ax.set_xlabel("input feature", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="lower center")
