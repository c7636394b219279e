"""The table beside a figure holds what the figure shows."""

import csv
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from spd.experiments.resid_mlp import plots
from spd.experiments.resid_mlp.comparison import COMPARISON_FILE
from spd.experiments.tms.diagrams import Scale, draw_network
from spd.problem import Identity
from spd.reports.drawing import histogram_figure, probe_figure
from spd.reports.figures import loss_curves
from spd.reports.numbers import figure_csv
from spd.reports.png import DescribedFigure, FigureText
from spd.reports.report import write_report
from spd.reports.results import Start, Starts
from spd.reports.starts import write_starts_page
from tests.made_up_run import METRICS, add_figures, make_run, result


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


CLUSTERS: dict[str, Any] = {
    **{"costs": [9.0, 4.0, 6.0], "best_round": 1, "n_positions": 2, "clusters": [], "k": 3},
    **{"n_clusters": 2, "alpha": 1.0, "threshold": 0.1},
}


def run_with_every_figure(folder: Path) -> Path:
    """It has figures of its configuration, curves, a ladder, clusters and starts."""
    found = result(solved=True, errors=0)
    rungs = {"stochastic": 0.5, "ablated": 2.0, "adversarial_1_batch": 1.0}
    rows = [{"metric": n, "key": f"ladder/{n}", "value": value} for n, value in rungs.items()]
    found["rows"] = [*found["rows"], *rows]
    run = make_run(
        folder, **{"result.json": found, "analysis/clustering/clustering.json": CLUSTERS}
    )
    add_figures(run)
    starts = [
        Start(index=0, seed=0, losses={2: 1.0}, chosen=True),
        Start(index=1, seed=9, losses={2: 3.0}, dropped=2, reason="place 2 of 2"),
    ]
    record = Starts(together=True, starts=tuple(starts))
    (run / "starts.json").write_text(record.model_dump_json())
    return run


def test_every_figure_of_a_page_links_its_numbers(tmp_path: Path):
    run = run_with_every_figure(tmp_path)
    starts = write_starts_page(run)
    assert starts is not None
    tables = []
    for page, n in ((write_report(run, METRICS), 5), (starts, 1)):
        figures = re.findall("<figure>.*?</figure>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert len(figures) == n
        for figure in figures:
            (link,) = re.findall(r'href="([^"]*\.csv)"', figure)
            table = StringIO((run / link).read_text(encoding="utf-8"))
            tables.append(list(csv.DictReader(table)))
    assert len(tables) == 6 and all(tables)
    by_x = [[(row["x"], row["y"]) for row in table] for table in tables]
    assert any(points[:3] == [("0", "4.5"), ("1", "2"), ("2", "3")] for points in by_x), "clusters"
    assert ("2", "3") in by_x[-1], "starts"


def test_the_comparison_of_runs_has_its_numbers_beside_it(tmp_path: Path, monkeypatch: Any):
    figure = DescribedFigure(FigureText("a", "b", "c"), figsize=(2.0, 2.0))
    figure.subplots().plot([3, 4])
    monkeypatch.setattr(plots, "comparable", lambda _: {tmp_path: []})
    monkeypatch.setattr(plots, "compare", lambda _: figure)
    plots.side_by_side([])()
    path = tmp_path / COMPARISON_FILE
    assert path.is_file() and path.with_suffix(".csv").read_text().count("\n") == 3
