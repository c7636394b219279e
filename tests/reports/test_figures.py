"""The figures of any decomposition show the data they claim to show; the files are whole."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from spd.config import UserError
from spd.engine.prepare import Prepared, eval_contexts
from spd.metrics import collect
from spd.problem import Dense, Identity
from spd.reports.drawing import (
    EXTRA_COLUMNS,
    column_order,
)
from spd.reports.figures import (
    ImportanceHistograms,
    MeanActivity,
    ProbeImportances,
    SubcomponentMatrices,
    loss_curves,
    save_figures,
)
from spd.reports.png import DescribedFigure, FigureText, read_png
from tests.solved_toy import PROBE, columns_of, set_importance, solved_toy

Spec = ProbeImportances | ImportanceHistograms | SubcomponentMatrices | MeanActivity


def drawn(spec: Spec, prepared: Prepared) -> Figure:
    with torch.no_grad():
        maker = spec.build(prepared.objective.model, prepared.problem)
        (figure,) = collect([maker], eval_contexts(prepared)).values()
    return figure


def panel(figure: Figure, title: str) -> Axes:
    (ax,) = [ax for ax in figure.axes if ax.get_title().splitlines()[:1] == [title]]
    return ax


def image_of(ax: Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def tick_labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def test_probe_importances_of_a_solved_model_are_a_diagonal_over_the_original_indices():
    figure = drawn(ProbeImportances(), solved_toy())
    ax = panel(figure, "linear1")
    np.testing.assert_allclose(image_of(ax), np.eye(5, 20), atol=1e-6)
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert tick_labels(ax)[:5] == [str(c) for c in columns_of(5, 20)]
    assert ax.get_title() == "linear1\nno errors"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("input feature", "subcomponent (its index)")


def test_probe_importances_count_the_errors_of_each_site():
    prepared = solved_toy(hidden_layer=True)
    model = prepared.objective.model
    set_importance(model, "linear1", torch.zeros(20), torch.full((20,), -0.05))
    figure = drawn(ProbeImportances(), prepared)
    assert panel(figure, "linear1").get_title() == "linear1\n5 errors"
    assert image_of(panel(figure, "linear1")).max() == 0.0  # the leak below 0 is not shown
    hidden = panel(figure, "hidden_layers.0")
    assert hidden.get_title() == "hidden_layers.0\nno errors"
    np.testing.assert_array_equal(image_of(hidden)[:, :2], 1.0)
    assert set(tick_labels(hidden)[:2]) == {"3", "4"}


def test_probe_importances_need_probes():
    prepared = solved_toy()
    with pytest.raises(UserError, match="no probes"):
        ProbeImportances().build(
            prepared.objective.model, replace(prepared.problem, probes=None, solution={})
        )


def test_many_columns_are_cut_to_those_in_use_and_a_few():
    g = torch.zeros(3, 200)
    g[0, 150], g[1, 7], g[2, 99], g[2, 42] = 1.0, 0.9, 0.95, 0.2
    order = column_order(g, Identity(3))
    assert order.columns[:4] == [150, 7, 99, 42]
    assert (order.n_expected, len(order.columns)) == (3, 4 + EXTRA_COLUMNS)
    assert order.n_cut == 200 - len(order.columns)


def test_no_column_in_use_is_ever_cut():
    g = torch.full((4, 120), 0.5)
    assert column_order(g, Identity(4)).n_cut == 0
    assert sorted(column_order(g, None).columns) == list(range(120))
    few = column_order(torch.zeros(4, 120), Dense(2))
    assert (few.n_expected, len(few.columns), few.n_cut) == (2, 7, 113)


def test_dense_columns_come_by_use_and_barely_active_ones_after_them():
    g = torch.zeros(10, 6)
    g[:, 5], g[:, 2], g[0, 4], g[:, 1] = 1.0, 0.8, 0.3, 0.09
    assert column_order(g, Dense(2)).columns[:4] == [5, 2, 4, 1]


def test_subcomponent_matrices_show_v_and_u_in_the_same_order_around_zero():
    prepared = solved_toy()
    figure = drawn(SubcomponentMatrices(), prepared)
    site = prepared.objective.model.sites["linear1"]
    np.testing.assert_array_equal(image_of(panel(figure, "linear1: V"))[:, :5], np.eye(5))
    upper, lower = panel(figure, "linear1: V"), panel(figure, "linear1: U")
    np.testing.assert_allclose(image_of(lower)[:, :5], site.target_weight.mT.numpy())
    low, high = lower.images[0].get_clim()
    assert low == -high and high == pytest.approx(float(site.target_weight.abs().max()))
    assert upper.get_ylabel() == "input dimension"
    assert lower.get_ylabel() == "output dimension"


def test_without_probes_matrices_are_ordered_by_activity_on_held_out_data():
    prepared = solved_toy()
    slope, offset = torch.zeros(20), torch.full((20,), -0.05)
    offset[11], offset[6] = 0.9, 0.4
    set_importance(prepared.objective.model, "linear1", slope, offset)
    bare = prepared._replace(problem=replace(prepared.problem, probes=None, solution={}))
    ax = panel(drawn(SubcomponentMatrices(), bare), "linear1: U")
    assert tick_labels(ax)[:2] == ["11", "6"]


def test_histograms_count_every_importance_once_clipped_to_the_unit_interval():
    prepared = solved_toy()
    ax = panel(drawn(ImportanceHistograms(), prepared), "linear1")
    (stairs,) = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    values, edges, _ = stairs.get_data()
    assert values.sum() == 2 * 64 * 20  # two batches
    g = torch.cat([ctx.ci.lower["linear1"] for ctx in eval_contexts(prepared)])
    assert values[0] == int((g < edges[1]).sum()) > 15 * 2 * 64
    assert values[-1] == int((g >= edges[-2]).sum())
    assert ax.get_yscale() == "log"


def test_mean_activity_is_sorted_and_tells_the_living_from_the_dead():
    prepared = solved_toy()
    ax = panel(drawn(MeanActivity(), prepared), "linear1: 5 of 20 alive")
    alive, dead, threshold = ax.lines
    g = torch.cat([ctx.ci.lower["linear1"] for ctx in eval_contexts(prepared)]).clamp(0, 1)
    expected = g.double().mean(dim=0)[columns_of(5, 20)].sort(descending=True).values
    np.testing.assert_allclose(np.asarray(alive.get_ydata()), expected.detach().numpy())
    assert list(np.asarray(dead.get_xdata())) == list(range(6, 21))
    least = float(np.asarray(threshold.get_ydata())[0])
    assert least == pytest.approx(0.1 / 128)
    assert (np.asarray(dead.get_ydata()) < least).all()


def line(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def test_loss_curves_draw_training_and_held_out_values_of_every_term():
    history = [
        {"step": 0, "eval/loss/total": 3.0, "eval/l0/a.b": 2.0, "eval/errors/a.b": 4.0},
        {"step": 0, "loss/total": 2.0, "loss/stochastic_recon": 1.5, "lr": 0.1},
        {"step": 10, "loss/total": 1.0, "loss/stochastic_recon": float("nan")},
        {"step": 20, "eval/loss/total": 0.5, "eval/l0/a.b": 1.0, "eval/errors/a.b": 0.0},
    ]
    figure = loss_curves(history)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["total", "stochastic recon", "L0, held out", "errors against the pattern"]
    assert line(panel(figure, "total"), "training") == ([0, 10], [2.0, 1.0])
    assert line(panel(figure, "total"), "held out") == ([0, 20], [3.0, 0.5])
    assert line(panel(figure, "stochastic recon"), "training") == ([0], [1.5])
    assert panel(figure, "total").get_yscale() == "log"
    assert line(panel(figure, "errors against the pattern"), "a.b") == ([0, 20], [4.0, 0.0])
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() for ax in figure.axes)


def test_loss_curves_of_many_sites_draw_their_sum():
    history = [{"step": s, **{f"eval/l0/s{i}": 1.0 + s for i in range(24)}} for s in range(2)]
    ax = panel(loss_curves(history), "L0, held out")
    assert line(ax, "sum over 24 sites") == ([0, 1], [24.0, 48.0])


def test_loss_curves_of_a_run_that_logged_nothing(tmp_path: Path):
    figure = loss_curves([])
    assert [text.get_text() for text in figure.axes[0].texts] == ["nothing was logged yet"]
    assert save_figures(tmp_path, 0, {"loss_curves": figure})["loss_curves"].is_file()


def test_saved_figures_are_whole_carry_their_text_and_are_released(tmp_path: Path):
    text = FigureText("Title – ‖W‖", "How to read 5 × 2.", "What it shows.")
    figure = DescribedFigure(text, figsize=(3.0, 2.0))
    figure.subplots()
    paths = save_figures(tmp_path, 1200, {"some_name": figure})
    assert paths == {"some_name": tmp_path / "some_name" / "00001200.png"}
    names = {path.name for path in (tmp_path / "some_name").iterdir()}
    assert names == {"00001200.png", "00001200.csv"}
    png = paths["some_name"].read_bytes()
    assert png.startswith(b"\x89PNG") and read_png(png) == (text, (288, 192))
    assert figure.axes == []
    plain = save_figures(tmp_path, 0, {"plain": Figure(figsize=(3.0, 2.0))})["plain"]
    assert read_png(plain.read_bytes()) == (None, (288, 192))


def test_no_two_labels_of_a_heat_map_overlap():
    figure = drawn(ProbeImportances(), solved_toy(40, 30, 200))
    figure.draw_without_rendering()
    ax = panel(figure, "linear1")
    assert "\n(155 more, none in use)" in ax.get_xlabel()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert len(boxes) > 5
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    assert all(re.fullmatch(r"\d+", label) for label in tick_labels(ax))
    assert PROBE == 0.75
