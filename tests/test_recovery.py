"""The known solution of a toy model is found, from nothing to the verdict."""

from pathlib import Path

import pytest
import torch

from spd import settings
from spd.config import load_config, parse
from spd.experiments.resid_mlp import resid_mlp_decomposition
from spd.experiments.resid_mlp.model import mlp_in_path, mlp_out_path
from spd.experiments.resid_mlp.resid_mlp_decomposition import ResidMLPConfig
from spd.experiments.resid_mlp.train_resid_mlp import ResidMLPTrainConfig, train
from spd.experiments.targets import TrainedTarget, save_target
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.optimize import evaluate, prepare, run_steps
from spd.tracking import NullTracker

CONFIG = settings.PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_config.yaml"
FASTER = (
    "steps=12000",
    "batch_size=512",
    "lr=1e-2",
    "lr_schedule={type: half_cosine}",
    "tied_sites=[]",
    "lower_leak=gradient",
    "figures={}",
)


@pytest.mark.slow
@pytest.mark.compiled
def test_tms_5_2_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The published problem, with settings that need 27 times fewer examples than the published ones.

    Seed 0 is the first of those tried and not chosen for its result. With these settings seeds 0, 3
    and 4 were tried and all three solved, first without an error after 4,000 to 7,000 steps, with an
    ML2R of 1.006 to 1.007. Over 16,000 steps seeds 0, 1 and 2 were solved, over 8,000 steps seeds 0,
    1 and 2, but not seed 3.
    """
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))  # so that the target is trained here, too
    torch.set_num_threads(1)
    config = load_config(TMSConfig, CONFIG, [*FASTER, "seed=0"])
    prepared = prepare(build(config, torch.device("cpu")), config)
    model = run_steps(prepared, NullTracker())
    values = evaluate(prepared)

    assert values["eval/solved"] == 1.0 and values["eval/errors/total"] == 0.0
    assert values["eval/mmcs/linear1"] >= 0.999
    assert abs(values["eval/ml2r/linear1"] - 1) <= 0.01
    assert values["eval/alive/linear1"] == values["eval/alive/linear2"] == 5
    assert values["eval/loss/faithfulness"] < 1e-4

    # the same without the figures of merit: the subcomponents that feature j needs alone rebuild
    # what the matrix makes of it, one for every feature, each another one
    site = model.sites["linear1"]
    probes = 0.75 * torch.eye(5)
    g = model.causal_importances(model.target_forward(probes).site_inputs).lower["linear1"]
    needed = g.argmax(dim=-1)
    assert len(set(needed.tolist())) == 5
    for j, c in enumerate(needed.tolist()):
        alone = site.subcomponents.V[j, c] * site.subcomponents.U[c]
        column = site.weight[:, j]
        assert (alone - column).norm() < 0.03 * column.norm()


# --- residual MLPs, of 20 features and a stream of width 100 ----------------------------------------

N, WIDTH = 20, 100
SMALLER = (
    *("batch_size=1024", "data.feature_probability=0.05", "lower_leak=gradient"),
    *("lr=5e-3", "lr_schedule={type: half_cosine}", "n_eval_batches=2", "figures={}"),
)


def trained_layer(d_mlp: int, seed: int = 0) -> tuple[ResidMLPTrainConfig, TrainedTarget]:
    """A residual MLP of one layer, trained."""
    raw = {
        "model": {"n_features": N, "d_embed": WIDTH, "n_layers": 1, "d_mlp": d_mlp},
        "data": {"feature_probability": 0.05, "value_range": [-1.0, 1.0]},
        **{"steps": 2000, "batch_size": 1024, "lr": 3e-3, "lr_schedule": {"type": "cosine"}},
        **{"seed": seed, "n_seeds": 1},
    }
    config = parse(ResidMLPTrainConfig, raw, "test")
    return config, train(config, torch.device("cpu"))


def save_layers(folder: Path, n_layers: int, d_mlp: int) -> None:
    """A target of `n_layers` layers, each of which does all that a trained one does.

    In trained targets of this size some layer does 3 to 8 % of a feature's work, and that a subcomponent
    of every layer is needed for every feature is not the solution. Here each layer is. They read one
    set of directions of the stream and write another, so that none reads what another wrote.
    """
    config, one = trained_layer(d_mlp)
    read = one.weights[mlp_in_path(0) + ".weight"] @ one.weights["W_E"].mT
    write = one.weights["W_U"].mT @ one.weights[mlp_out_path(0) + ".weight"]
    drawn = torch.randn(WIDTH, 2 * N, generator=torch.Generator().manual_seed(0))
    inputs, outputs = torch.linalg.qr(drawn).Q.mT.split(N)
    weights = {"W_E": inputs.contiguous(), "W_U": (inputs + outputs).mT.contiguous()}
    for layer in range(n_layers):
        weights[mlp_in_path(layer) + ".weight"] = read @ inputs
        weights[mlp_out_path(layer) + ".weight"] = outputs.mT @ write
    model = config.model.model_copy(update={"n_layers": n_layers, "embedding": "trained"})
    save_target(folder, config.model_copy(update={"model": model}), TrainedTarget(weights, {}))
