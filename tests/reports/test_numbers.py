"""The table beside a figure holds what the figure shows."""

import csv
from io import StringIO

import numpy as np
import torch
from matplotlib.figure import Figure

from spd.experiments.tms.diagrams import Scale, draw_network
from spd.problem import Identity
from spd.reports.drawing import histogram_figure, probe_figure
from spd.reports.figures import loss_curves
from spd.reports.numbers import figure_csv
from spd.reports.png import DescribedFigure, FigureText


def rows(figure: Figure) -> list[list[str]]:
    heads, *rest = csv.reader(StringIO(figure_csv(figure)))
    assert heads == ["panel", "series", "x", "y", "value"]
    return rest


def test_curves():
    history = [
        {"step": 0, "loss/a": 0.5, "eval/loss/a": 2.0, "eval/l0/x": 3.0},
        {"step": 10, "loss/a": 0.1},
    ]
    assert rows(loss_curves(history)) == [
        ["a", "training", "0", "0.5", ""],
        ["a", "training", "10", "0.1", ""],
        ["a", "held out", "0", "2", ""],
        ["L0, held out", "x", "0", "3", ""],
    ]


def test_heat_maps_name_the_subcomponents_that_their_columns_are():
    g = torch.tensor([[0.0, 0.0, 1.0], [0.75, 0.0, 0.0]])
    figure = probe_figure({"w": g}, {"w": Identity(2)}, {"w": 0})
    found = rows(figure)
    assert len(found) == 6, "the colour bar is no panel, the dashed line no series"
    assert {(x, y): value for _, _, x, y, value in found if float(value)} == {
        ("2", "0"): "1",
        ("0", "1"): "0.75",
    }
    assert {row[0] for row in found} == {"w no errors"}


def test_histograms_and_other_artists():
    found = rows(histogram_figure({"w": torch.tensor([3.0, 0.0, 1.0, 2.0])}, {"w": 6}))
    assert [row[2:4] for row in found] == [["0", "3"], ["0.25", "0"], ["0.5", "1"], ["0.75", "2"]]
    figure = Figure()
    ax = figure.subplots()
    ax.axhline(1.0)
    ax.scatter([1, 2], [3, 4], label="points")
    ax.quiver([0, 0], [0, 0], [0.5, 1.5], [2.5, 3.5])
    ax.imshow(np.array([[7.0, 8.0]]))
    assert sorted(rows(figure)) == [
        ["1", "", "0", "0", "7"],
        ["1", "", "0.5", "2.5", ""],
        ["1", "", "1", "0", "8"],
        ["1", "", "1.5", "3.5", ""],
        ["1", "points", "1", "3", ""],
        ["1", "points", "2", "4", ""],
    ]


def test_networks_give_the_weights_of_their_edges():
    layer = torch.tensor([[0.5, 0.0, -2.0]])
    figure = DescribedFigure(FigureText("", "", ""), figsize=(2, 2))
    scale = Scale(1.0, [2.0], ["black"], ["inputs", "outputs"])
    draw_network(figure.subplots(), [layer], scale, named=True)
    assert rows(figure) == [
        ["1", "inputs to outputs", "0", "0", "0.5"],
        ["1", "inputs to outputs", "0", "1", "0"],
        ["1", "inputs to outputs", "0", "2", "-2"],
    ]
