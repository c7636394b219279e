"""The known solutions of small residual MLPs are found, from nothing to the verdict."""

from pathlib import Path

import pytest
import torch
import yaml

from spd import settings
from spd.config import load_config
from spd.experiments.resid_mlp.resid_mlp_decomposition import ResidMLPConfig, build
from spd.optimize import evaluate, prepare, run_steps
from spd.tracking import NullTracker

FOLDER = settings.PACKAGE_DIR / "experiments" / "resid_mlp"
TARGET = {
    "kind": "resid_mlp",
    "model": {"n_features": 20, "d_embed": 100},
    "data": {"feature_probability": 0.05, "value_range": [-1.0, 1.0]},
    "n_seeds": 2,
    "steps": 2000,
    "batch_size": 1024,
    "lr": 3e-3,
    "lr_schedule": {"type": "cosine"},
}
FASTER = (
    "steps=6000",
    "batch_size=512",
    "lr=1e-2",
    "lr_schedule={type: half_cosine}",
    "lower_leak=gradient",
    "data.feature_probability=0.05",
    "losses.importance_minimality.coeff=1e-4",
    "eval_batch_size=512",
    "n_eval_batches=8",
    "figures={}",
)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("n_layers", "d_mlp", "C"), [(1, 10, 20), (2, 5, 40), (3, 4, 40)])
def test_a_small_residual_mlp_is_solved(
    n_layers: int, d_mlp: int, C: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fifth of the published features, a tenth of the width.

    TRIED
    """
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))
    torch.set_num_threads(1)
    model = {**TARGET["model"], "n_layers": n_layers, "d_mlp": d_mlp}
    target = tmp_path / "small_target.yaml"
    target.write_text(yaml.safe_dump({**TARGET, "model": model}), encoding="utf-8")
    overrides = [
        *FASTER,
        f"target={target}",
        f"sites={{layers.*.mlp_in: {C}, layers.*.mlp_out: {C}}}",
    ]
    config = load_config(ResidMLPConfig, FOLDER / "resid_mlp1_config.yaml", overrides)
    prepared = prepare(build(config, torch.device("cpu")), config)
    run_steps(prepared, NullTracker())
    values = evaluate(prepared)
    print({key: round(value, 4) for key, value in values.items()})

    assert values["eval/solved"] == 1.0 and values["eval/errors/total"] == 0.0
    assert values["eval/correlation/neuron_contributions"] >= 0.99
    assert abs(values["eval/slope/neuron_contributions"] - 1) <= 0.05
    kept = values["eval/mse_to_labels/importance_masked"]
    assert kept <= 1.1 * values["eval/mse_to_labels/target"]
