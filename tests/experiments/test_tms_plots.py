"""The paper's first figure for toy models, and the command that redraws the figures of runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from spd.config import UserError, load_config
from spd.engine.prepare import Prepared
from spd.experiments.targets import TrainedTarget, save_target
from spd.experiments.tms import plots
from spd.experiments.tms.model import TMSModel, TMSModelConfig
from spd.experiments.tms.plots import TMSVectors
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.reports.panels import BLUE, ORANGE
from spd.runs.run import start
from spd.settings import PACKAGE_DIR
from tests.solved_toy import columns_of, set_importance, solved_toy


def drawn(prepared: Prepared) -> Figure:
    maker = TMSVectors().build(prepared.objective.model, prepared.problem)
    return maker.compute()["tms_vectors"]


def arrows(ax: Axes) -> np.ndarray:
    (quiver,) = [item for item in ax.collections if isinstance(item, Quiver)]
    return np.stack([np.asarray(quiver.U), np.asarray(quiver.V)], axis=1)


def edges(ax: Axes) -> list[LineCollection]:
    return [item for item in ax.collections if isinstance(item, LineCollection)]


def titled(figure: Figure) -> dict[str, list[Axes]]:
    found: dict[str, list[Axes]] = {}
    for ax in figure.axes:
        if ax.get_title():
            found.setdefault(ax.get_title(), []).append(ax)
    return found


def test_target_sum_and_single_subcomponents_as_vectors():
    prepared = solved_toy()
    weight = prepared.objective.model.sites["linear1"].target_weight.numpy()
    panels = titled(drawn(prepared))
    singles = [f"subcomponent {c}" for c in columns_of(5, 20)]
    assert list(panels) == ["target", "sum of all", *singles]
    np.testing.assert_allclose(arrows(panels["target"][0]), weight)
    np.testing.assert_allclose(arrows(panels["sum of all"][0]), weight)
    for feature, title in enumerate(singles):
        only = np.where(np.arange(5)[:, None] == feature, weight, 0.0)
        np.testing.assert_allclose(arrows(panels[title][0]), only)
        names = [text.get_text() for text in panels[title][0].texts]
        assert names == [str(feature)]
    assert panels["target"][0].get_xlabel() == "hidden 0"


def test_networks_draw_each_weight_by_sign_and_size():
    prepared = solved_toy()
    figure = drawn(prepared)
    networks = [ax for ax in figure.axes if edges(ax)]
    assert len(networks) == 7
    weight = prepared.objective.model.sites["linear1"].target_weight.numpy()
    first, second = edges(networks[0])  # the target: linear1 and its transpose
    shown = np.abs(weight) > 0.02 * np.abs(weight).max()
    assert len(first.get_segments()) == len(second.get_segments()) == shown.sum()
    positive = [tuple(np.round(c[:3] * 255).astype(int)) for c in np.asarray(first.get_colors())]
    colours = {True: _rgb(BLUE), False: _rgb(ORANGE)}
    assert positive == [colours[bool(value > 0)] for value in weight[shown]]
    single = edges(networks[2])
    assert all(len(part.get_segments()) <= 2 for part in single)
    widths = np.asarray(first.get_linewidth())
    assert np.argmax(widths) == np.argmax(np.abs(weight[shown]))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_the_identity_layer_has_a_row_of_its_own_and_stands_in_every_network():
    figure = drawn(solved_toy(hidden_layer=True))
    panels = titled(figure)
    assert len(panels["target"]) == len(panels["sum of all"]) == 2
    assert {"subcomponent 3", "subcomponent 4"} <= panels.keys()
    np.testing.assert_allclose(arrows(panels["target"][1]), np.eye(2))
    hidden = np.concatenate([arrows(panels[f"subcomponent {c}"][-1]) for c in (3, 4)])
    np.testing.assert_allclose(np.sort(hidden.ravel()), [0, 0, 0, 0, 0, 0, 1, 1])
    networks = [ax for ax in figure.axes if edges(ax)]
    assert all(len(edges(ax)) == 3 for ax in networks)
    assert [len(part.get_segments()) for part in edges(networks[-1])] == [0, 1, 0]
    headings = [sub.get_suptitle() for sub in figure.subfigs]
    assert headings == [
        "linear1, with its transpose linear2: 5 of 20 subcomponents in use",
        "hidden_layers.0: 2 of 20 subcomponents in use",
    ]


def test_a_model_with_nothing_in_use_still_shows_target_and_sum():
    prepared = solved_toy()
    set_importance(prepared.objective.model, "linear1", torch.zeros(20), torch.full((20,), -0.05))
    assert list(titled(drawn(prepared))) == ["target", "sum of all"]


def test_beyond_the_plane_cosines_and_norms_stand_in_for_vectors():
    prepared = solved_toy(12, 6, 60)
    parts = prepared.objective.model.sites["linear1"].subcomponents
    with torch.no_grad():
        parts.U[columns_of(12, 60)[3]] *= 0.5
    panels = titled(drawn(prepared))
    weight = prepared.objective.model.sites["linear1"].target_weight.numpy()
    for title in ("target with target", "target with best subcomponent"):
        cosines = np.asarray(panels[title][0].images[0].get_array())
        np.testing.assert_allclose(cosines, weight @ weight.T, atol=1e-5)
    cosine, norm = panels["best subcomponent of each feature"][0].lines[1:]
    np.testing.assert_allclose(np.asarray(cosine.get_ydata()), 1.0, atol=1e-5)
    expected = np.where(np.arange(12) == 3, 0.5, 1.0)
    np.testing.assert_allclose(np.asarray(norm.get_ydata()), expected, atol=1e-5)
    assert [t for t in panels if t.startswith("sub")] == [
        f"subcomponent {c}" for c in columns_of(12, 60)[:3]
    ]


def test_tms_vectors_need_linear1_and_probes():
    prepared = solved_toy()
    with pytest.raises(UserError, match="needs the site 'linear1'"):
        TMSVectors().build(
            prepared.objective.model, replace(prepared.problem, probes=None, solution={})
        )


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a target that was never trained."""
    root = tmp_path_factory.mktemp("finished")
    sizes = TMSModelConfig(n_features=5, n_hidden=2)
    weights = {k: v.detach().clone() for k, v in TMSModel(5, 2).state_dict().items()}
    weights["linear2.weight"] = weights["linear1.weight"].mT.contiguous()
    save_target(
        root / "target",
        TMSTrainConfig(model=sizes, steps=1, batch_size=1, lr=1.0),
        TrainedTarget(weights, {"chosen_seed": 0, "seeds": []}),
    )
    overrides = [
        *("steps=2", "batch_size=8", "compile=false", "n_eval_batches=1", "eval_batch_size=8"),
        *("figures={tms_vectors: {}, mean_activity: {}}", f"target={root / 'target'}"),
    ]
    yaml = PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_config.yaml"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SPD_OUT_DIR", str(root / "out"))
        environment.setenv("WANDB_MODE", "disabled")
        return start(load_config(TMSConfig, yaml, overrides), build)


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed at will."""
    return shutil.copytree(finished_run, tmp_path / finished_run.name)


@pytest.mark.slow
def test_redraws_every_figure_and_the_report_and_prints_the_table(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    drawings = sorted(run_dir.glob("figures/*/*.png"))
    names = [path.parent.name for path in drawings]
    assert names == ["loss_curves", "mean_activity", "tms_vectors"]
    for path in [*drawings, run_dir / "report.html"]:
        path.unlink()
    plots.main([str(run_dir)])
    assert sorted(run_dir.glob("figures/*/*.png")) == drawings
    assert (run_dir / "report.html").is_file()
    table = capsys.readouterr().out
    assert run_dir.name in table and "MMCS" in table


@pytest.mark.slow
def test_an_unfinished_run_is_drawn_but_not_in_the_table(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    (run_dir / "result.json").unlink()
    meta = json.loads((run_dir / "meta.json").read_text())
    (run_dir / "meta.json").write_text(json.dumps({**meta, "status": "interrupted"}))
    plots.main([str(run_dir)])
    out, err = capsys.readouterr()
    assert "MMCS" not in out and "not finished" in err
    assert "Interrupted" in (run_dir / "report.html").read_text()


@pytest.mark.slow
def test_one_bad_run_stops_everything_before_anything_is_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (run_dir / "report.html").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        plots.main([str(run_dir), str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert message[-1].startswith("error: ") and "nowhere" in message[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
