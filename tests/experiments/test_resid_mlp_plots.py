"""The figures of residual MLPs show the data they claim to show; the command that redraws them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spd.config import UserError, load_config
from spd.engine.prepare import Prepared
from spd.experiments.resid_mlp import plots
from spd.experiments.resid_mlp.comparison import COMPARISON_FILE
from spd.experiments.resid_mlp.metrics import neuron_contributions
from spd.experiments.resid_mlp.plots import (
    ContributionScatter,
    NeuronContributionsFigure,
    ResponseCurves,
    responses,
)
from spd.experiments.resid_mlp.problem import ResidMLPProblem
from spd.experiments.resid_mlp.resid_mlp_decomposition import ResidMLPConfig
from spd.experiments.resid_mlp.train_resid_mlp import PROBE
from spd.reports.png import read_png
from spd.settings import PACKAGE_DIR
from tests.experiments.test_resid_mlp_solution import solved_resid_mlp
from tests.run_fixtures import Command
from tests.solved_toy import solved_toy

FOLDER = PACKAGE_DIR / "experiments" / "resid_mlp"
Spec = NeuronContributionsFigure | ContributionScatter | ResponseCurves


def drawn(spec: Spec, prepared: Prepared) -> Figure:
    maker = spec.build(prepared.objective.model, prepared.problem)
    ((name, figure),) = maker.compute().items()
    assert name == spec.type
    return figure


def points(ax: Axes, marker: str) -> np.ndarray:
    lines = [line for line in ax.lines if line.get_marker() == marker]
    return np.concatenate([np.asarray(line.get_xydata()) for line in lines])


def test_every_neuron_of_every_shown_feature_is_a_dot_target_above_subcomponents_below():
    prepared = solved_resid_mlp(2)
    layers = neuron_contributions(prepared.objective.model, "here")
    figure = drawn(NeuronContributionsFigure(n_features=4), prepared)
    upper, lower = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["target", "one subcomponent each"]
    for layer, marker in enumerate("os"):
        for ax, values in (
            (upper, layers[layer].target),
            (lower, layers[layer].subcomponents),
        ):
            dots = points(ax, marker)
            np.testing.assert_array_equal(dots[:, 0], np.repeat(np.arange(4), 3))
            np.testing.assert_allclose(dots[:, 1], values[:4].ravel().numpy())
    chosen = [f"{i}\n({layers[0].chosen[i]}, {layers[1].chosen[i]})" for i in range(4)]
    assert [label.get_text() for label in lower.get_xticklabels()] == chosen
    assert "contribution" in upper.get_ylabel() and "feature" in lower.get_xlabel()


def test_the_largest_neurons_are_labelled_with_their_numbers():
    prepared = solved_resid_mlp(1, d_mlp=5, n_features=3)
    (layer,) = neuron_contributions(prepared.objective.model, "here")
    upper = drawn(NeuronContributionsFigure(), prepared).axes[0]
    for feature, values in enumerate(layer.target.tolist()):
        largest = max(values)
        expected = {str(n) for n, v in enumerate(values) if v > 0.3 * largest > 0}
        labels = {
            text.get_text()
            for text in upper.texts
            if int(round(text.xy[0])) == feature  # pyright: ignore[reportAttributeAccessIssue]
        }
        assert labels == expected or (len(labels) == 4 and labels < expected)
    places = sorted((t.get_position() for t in upper.texts), reverse=True)
    for (x0, y0), (x1, y1) in zip(places, places[1:], strict=False):
        assert x0 != x1 or abs(y0 - y1) > 0


def test_the_scatter_holds_all_contributions_and_says_how_they_agree():
    prepared = solved_resid_mlp(2)
    layers = neuron_contributions(prepared.objective.model, "here")
    (ax,) = drawn(ContributionScatter(), prepared).axes
    for layer, marker in zip(layers, "os", strict=True):
        expected = torch.stack([layer.target.ravel(), layer.subcomponents.ravel()], dim=1)
        np.testing.assert_allclose(points(ax, marker), expected.numpy())
    assert ax.get_xlim() == ax.get_ylim()
    diagonal = np.asarray(ax.lines[0].get_xydata())
    np.testing.assert_array_equal(diagonal[:, 0], diagonal[:, 1])
    assert "correlation" in ax.get_title(loc="left") and "slope" in ax.get_title(loc="left")


def test_response_curves_are_the_outputs_of_single_features():
    prepared = solved_resid_mlp()
    model, problem = prepared.objective.model, prepared.problem
    assert isinstance(problem, ResidMLPProblem)
    found = responses(model, problem, 2)
    alone = torch.zeros(6)
    alone[1] = float(found.inputs[20])
    torch.testing.assert_close(found.target[1, 20], model.target(alone))
    torch.testing.assert_close(found.labels[1, 20], alone + alone.relu())
    _, site_inputs = model.target_forward(alone[None])
    masked = model(alone[None], model.causal_importances(site_inputs).lower)[0].detach()
    torch.testing.assert_close(found.decomposition[1, 20], masked)
    assert not torch.equal(masked, found.target[1, 20])
    assert (float(found.inputs[0]), float(found.inputs[-1])) == (-1.0, 1.0)

    figure = drawn(ResponseCurves(n_features=2), prepared)
    assert [ax.get_title() for ax in figure.axes] == ["feature 0", "feature 1"]
    curves = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[1].lines}
    for name, outputs in zip(("label", "target", "decomposition"), found[1:], strict=True):
        np.testing.assert_allclose(curves[name], outputs[1, :, 1].numpy())
    others = [line for line in figure.axes[1].lines if line.get_linestyle() == "--"]
    spill = found.target[1].abs()
    spill[:, 1] = 0
    np.testing.assert_allclose(np.asarray(others[0].get_ydata()), spill.amax(dim=1).numpy())


def test_the_figures_need_a_residual_mlp():
    toy = solved_toy()
    for spec in (NeuronContributionsFigure(), ContributionScatter(), ResponseCurves()):
        with pytest.raises(UserError, match=f"figures.{spec.type}: works on residual MLPs only"):
            spec.build(toy.objective.model, toy.problem)


# --- the script and the command ------------------------------------------------------------------

TARGET = {
    "kind": "resid_mlp",
    "model": {"n_features": 5, "d_embed": 12, "d_mlp": 4, "n_layers": 2},
    "data": {"feature_probability": 0.3, "value_range": [-1.0, 1.0]},
    "steps": 250,
    "batch_size": 128,
    "lr": 0.01,
}
QUICK = (
    *("steps=3", "log_every=1", "eval_every=2", "save_every=2", "batch_size=16"),
    *("eval_batch_size=16", "n_eval_batches=2", "wandb_project=null", "importance.n_hidden=4"),
    *("sites.layers.*.mlp_in=9", "sites.layers.*.mlp_out=7", "data.unlike_target=true"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the real script from a training YAML, which differ in the coefficient."""
    folder = tmp_path_factory.mktemp("resid_mlp")
    target = folder / "small_target.yaml"
    target.write_text(json.dumps(TARGET), encoding="utf-8")
    command = Command(folder, target)
    for coeff in ("1e-3", "1e-5"):
        done = command.run(
            FOLDER / "resid_mlp_decomposition.py",
            FOLDER / "resid_mlp2_config.yaml",
            f"target={target}",
            *QUICK,
            f"losses.importance_minimality.coeff={coeff}",
        )
        assert done.status == 0, done.err
        assert ("on first use" in done.err) == (coeff == "1e-3")
    return command.runs()


@pytest.mark.slow
def test_a_run_leaves_every_figure_metric_and_the_report(finished: list[Path]):
    run = finished[0]
    names = {path.parent.name for path in run.glob("figures/*/00000003.png")}
    assert names == {
        *("neuron_contributions", "contribution_scatter", "probe_importances", "response_curves"),
        *("importance_histograms", "mean_activity", "loss_curves"),
    }
    for path in run.glob("figures/*/*.png"):
        text, _ = read_png(path.read_bytes())
        assert text is not None and text.title and text.alt
    for name in ("report.html", "result.json", "config.yaml", "target/training.json"):
        assert (run / name).is_file()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    sites = [f"layers.{i}.{name}" for i in range(2) for name in ("mlp_in", "mlp_out")]
    expected = {f"eval/{name}/{site}" for name in ("errors", "l0", "alive") for site in sites}
    expected |= {"eval/correlation/neuron_contributions", "eval/slope/neuron_contributions"}
    kinds = ("target", "unmasked", "importance_masked", "stochastic")
    expected |= {f"eval/mse_to_labels/{kind}" for kind in kinds}
    assert expected <= last.keys()


@pytest.fixture
def run_dirs(finished: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the runs, to be changed at will."""
    return [shutil.copytree(run, tmp_path / "runs" / run.name) for run in finished]


@pytest.mark.slow
def test_redraws_the_runs_and_puts_them_side_by_side(
    run_dirs: list[Path], capsys: pytest.CaptureFixture[str]
):
    drawings = [path for run in run_dirs for path in sorted(run.glob("figures/*/*.png"))]
    for path in drawings:
        path.unlink()
    plots.main([str(run) for run in run_dirs])
    assert all(path.is_file() for path in drawings)
    comparison = run_dirs[0].parent / COMPARISON_FILE
    text, _ = read_png(comparison.read_bytes())
    assert text is not None and text.alt.index("minimality 1e-05") < text.alt.index("0.001")
    out = capsys.readouterr().out
    assert str(comparison) in out and all(run.name in out for run in run_dirs)


@pytest.mark.slow
def test_one_run_alone_is_compared_with_nothing(run_dirs: list[Path]):
    (run_dirs[0] / "result.json").unlink()
    plots.main([str(run_dirs[0]), "--unverified"])
    assert not (run_dirs[0].parent / COMPARISON_FILE).exists()


@pytest.mark.slow
def test_runs_with_different_sites_are_not_drawn_side_by_side(
    run_dirs: list[Path], capsys: pytest.CaptureFixture[str]
):
    path = run_dirs[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["sites"]["layers.*.mlp_out"]
    for entries in (config["metrics"], config["figures"]):
        for name in [name for name in entries if "contribution" in name]:
            del entries[name]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        plots.main([*(str(run) for run in run_dirs), "--unverified"])
    assert stopped.value.code == 2
    assert "parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n_layers", "C", "coeff", "n_hidden", "lr", "steps"),
    [
        (1, 100, 1e-5, 16, 2e-3, 30_000),
        (2, 400, 2e-5, 16, 1e-3, 50_000),
        (3, 500, 5e-6, 128, 1e-3, 100_000),
    ],
)
def test_the_shipped_configurations_hold_the_published_settings(
    n_layers: int, C: int, coeff: float, n_hidden: int, lr: float, steps: int
):
    path = FOLDER / f"resid_mlp{n_layers}_config.yaml"
    config = load_config(ResidMLPConfig, path)
    assert config.sites == {"layers.*.mlp_in": C, "layers.*.mlp_out": C}
    assert config.importance.model_dump() == {"type": "mlp", "n_hidden": n_hidden}
    assert (config.lr, config.lr_schedule.type, config.steps) == (lr, "constant", steps)
    losses = {name: spec.model_dump() for name, spec in config.losses.items()}
    assert losses["importance_minimality"] == {
        "type": "importance_minimality",
        "coeff": coeff,
        "pnorm": 2.0,
    }
    others = ("faithfulness", "stochastic_recon", "stochastic_recon_layerwise")
    assert [losses[name]["coeff"] for name in others] == [1.0, 1.0, 1.0]
    assert (config.batch_size, config.data.feature_probability) == (2048, 0.01)
    assert config.data.value_range == (-1.0, 1.0) and PROBE == 0.75
    assert config.lower_leak == "both" and config.target == f"resid_mlp{n_layers}_target.yaml"
