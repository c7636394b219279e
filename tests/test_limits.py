"""How far the numbers of a configuration may go, and what is asked of memory before it is taken."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from spd.config import UserError, load_config
from spd.config.limits import MAX_STEPS
from spd.config.memory import free_memory, in_words, require_memory
from spd.engine.prepare import prepare
from spd.engine.size import check_step
from spd.experiments.resid_mlp.train_resid_mlp import RESID_MLP_TARGET, ResidMLPTrainConfig
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.experiments.tms.train_tms import TMS_TARGET, TMSTrainConfig
from spd.importance import (
    AffineImportanceConfig,
    ImportanceSpec,
    MLPImportanceConfig,
    SharedMLPImportanceConfig,
    VectorMLPImportanceConfig,
)
from tests.run_fixtures import EXPERIMENTS, TMS_CONFIG
from tests.runs.little_run import little_config

TMS_TRAINING = EXPERIMENTS / "tms/tms_5-2_target.yaml"
RESID_MLP_TRAINING = EXPERIMENTS / "resid_mlp/resid_mlp1_target.yaml"
CPU = torch.device("cpu")

REFUSED: dict[str, str] = {
    "steps=1e15": f"steps: .*less than or equal to {MAX_STEPS}, got 1000000000000000",
    "faithfulness_warmup={steps: 1e15, lr: 1}": "faithfulness_warmup.steps: .*less than or equal",
    "losses.stochastic_recon.n_samples=100000": "n_samples: .*less than or equal to 100, got 100000",
    "starts=1e9": "starts: .*less than or equal to 10000",
    "n_eval_batches=1e9": "n_eval_batches: .*less than or equal to 10000",
    "seed=1.0": "seed: a seed is a whole number, written without point or exponent: got 1.0",
    "seed='1.0'": "seed: a seed is a whole number",
    "seed=1e3": "seed: a seed is a whole number",
    "seed=9223372036854775808": "seed: .*less than or equal to 9223372036854775807",
    "seeds=[0, 1.0]": r"seeds\.1: a seed is a whole number",
    f"seeds={list(range(1001))}": "seeds: .*at most 1000 items",
    "data.feature_probability=0": "feature_probability: .*greater than or equal to 0.000001, got 0",
    "data.value_range=[0, .inf]": "value_range",
    "data.value_range=[.nan, 1]": "value_range",
    "data.synced_inputs=[[]]": "synced_inputs.0: .*at least 1 item",
    "importance={type: mlp, n_hidden: 1e11}": "n_hidden: .*less than or equal to 10000000",
    "lr_schedule={type: exponential, half_life: .inf}": "half_life: .*finite",
}


@pytest.mark.parametrize(("override", "said"), REFUSED.items(), ids=[key[:40] for key in REFUSED])
def test_a_number_beyond_its_limit(override: str, said: str):
    with pytest.raises(UserError, match=said) as caught:
        load_config(TMSConfig, TMS_CONFIG, [override])
    assert len(str(caught.value)) < 2000


def test_numbers_up_to_their_limits_are_taken():
    numbers = [f"steps={MAX_STEPS}", "seed=9223372036854775807", "seeds=[0, '1']"]
    config = load_config(TMSConfig, TMS_CONFIG, [*numbers, "losses.stochastic_recon.n_samples=1e2"])
    assert (config.steps, config.seed, config.seeds) == (99_999_999, 2**63 - 1, (0, 1))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.n_features=10000000", "model: n_seeds: 32 models of 50000000 parameters need"),
        ("model.n_hidden=1e11", "model.n_hidden: .*less than or equal to 10000000"),
        ("model.n_hidden_layers=1e9", "n_hidden_layers: .*less than or equal to 1000"),
        (
            "batch_size=1e12",
            "batch_size: 1000000000000: the outputs of 32 models of 5 features need",
        ),
        ("n_seeds=1e9", "n_seeds: .*less than or equal to 10000"),
        ("lr=.inf", "lr: .*finite"),
        ("model.n_features=0", "n_features: .*greater than or equal to 1"),
        ("model.n_hidden_layers=-1", "n_hidden_layers: .*greater than or equal to 0"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("n_seeds=0", "n_seeds: .*greater than or equal to 1"),
    ],
)
def test_a_training_that_is_too_large(override: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spd.config.memory.free_memory", lambda device: 10**9)
    with pytest.raises(UserError, match=said):
        TMS_TARGET.check(load_config(TMSTrainConfig, TMS_TRAINING, [override]), CPU)


def test_trainings_as_they_are_shipped_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spd.config.memory.free_memory", lambda device: 10**8)
    TMS_TARGET.check(load_config(TMSTrainConfig, TMS_TRAINING), CPU)
    training = load_config(ResidMLPTrainConfig, RESID_MLP_TRAINING)
    RESID_MLP_TARGET.check(training, CPU)
    with pytest.raises(UserError, match="batch_size"):
        RESID_MLP_TARGET.check(training.model_copy(update={"batch_size": 10**9}), CPU)


def test_a_residual_mlp_has_layers_and_at_most_a_thousand():
    for override in ("model.n_layers=0", "model.n_layers=1001"):
        with pytest.raises(UserError, match="n_layers: "):
            load_config(ResidMLPTrainConfig, RESID_MLP_TRAINING, [override])


def test_nothing_is_written_for_a_training_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from spd.experiments.targets import target_cli

    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    assert target_cli(TMS_TARGET, [str(TMS_TRAINING), "batch_size=1e15"]) == 2
    assert "error: batch_size: " in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spec",
    [
        MLPImportanceConfig(n_hidden=5),
        AffineImportanceConfig(),
        SharedMLPImportanceConfig(hidden_widths=(7, 3)),
        VectorMLPImportanceConfig(n_hidden=2),
    ],
    ids=lambda spec: spec.type,
)
def test_the_parameters_of_an_importance_function_are_counted(spec: ImportanceSpec):
    built: nn.Module = spec.build(11, 4, generator=torch.Generator())
    assert spec.n_parameters(11, 4) == sum(p.numel() for p in built.parameters())


def test_what_is_free():
    assert 10**6 < free_memory(CPU) < 10**16
    require_memory(10, "x: 1 needs")
    said = r"x: 1 needs at least 1e\+06 PB of memory, and .* are free on cpu; less is needed"
    with pytest.raises(UserError, match=said):
        require_memory(10**21, "x: 1 needs")
    assert [in_words(n) for n in (0, 999, 1500, 22_300_000_000)] == [
        *("0 bytes", "999 bytes", "1.5 kB", "22.3 GB")
    ]


def test_a_step_is_measured_by_what_it_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = little_config(tmp_path, "losses.stochastic_recon.n_samples=3")
    prepared = prepare(build(config, CPU), config)
    free: list[int] = [10**9]
    monkeypatch.setattr("spd.config.memory.free_memory", lambda device: free[0])
    drawn = 3 * (6 + 6)  # three samples of two sites with C = 6
    check_step(prepared, 1000)
    free[0] = 4 * drawn * 1_000_000
    check_step(prepared, 1_000_000)
    with pytest.raises(UserError, match=re.escape("batch_size: 1000001: the random masks of all")):
        check_step(prepared, 1_000_001)
    free[0] = 100
    with pytest.raises(UserError, match="sites: .* parameters of subcomponents"):
        check_step(prepared, 1)
