"""Every key of every configuration changes what comes out: here, or in the test that is named for it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd.settings import REPO_DIR
from tests.knob_effects import (
    SWEEP,
    Raw,
    decomposition,
    features,
    figures,
    inherited,
    labels,
    language_model,
    masked,
    one_parameter,
    plain,
    reference,
    resid_mlp_model,
    resid_mlp_training,
    schedule,
    slurm_script,
    sweep,
    sweep_with,
    tms_model,
    tms_training,
)
from tests.test_knobs import configs, fields
from tests.toy import ALL_LOSSES, MLP_SITES

# --- the table --------------------------------------------------------------------------------------

LOSSES = {
    name: ALL_LOSSES[name] for name in ("faithfulness", "stochastic_recon", "importance_minimality")
}
RUN: Raw = {
    **{"sites": dict(MLP_SITES), "losses": LOSSES, "steps": 6, "lr": 1e-2, "log_every": 2},
    **{"eval_every": 3, "save_every": 2, "execution": {"compile": False}},
}
GROUP = {"lr": {"lr": 0.03}, "lr_schedule": {"lr_schedule": {"type": "linear"}}}
CLIPS = {**GROUP, "grad_clip": {"grad_clip": 1e-3}}
SMALL_TMS: Raw = {"n_features": 4, "n_hidden": 2, "n_hidden_layers": 1}
SMALL_RESID_MLP: Raw = {"n_features": 4, "d_embed": 4, "d_mlp": 2, "n_layers": 1}
TRAINING: Raw = {"steps": 4, "batch_size": 16, "lr": 1e-2, "n_seeds": 2}
TRAINING_CHANGES: dict[str, Raw] = {
    **{"seed": {"seed": 1}, "n_seeds": {"n_seeds": 3}, "data_seed": {"data_seed": 1}},
    **{"steps": {"steps": 5}, "batch_size": {"batch_size": 8}, "lr": {"lr": 0.02}},
    **{"lr_schedule": {"lr_schedule": {"type": "linear"}}, "weight_decay": {"weight_decay": 0.5}},
    "data": {"data": {"feature_probability": 0.5}},
}
EXACTLY: Raw = {"generation": "exactly_n_active", "n_active": 2}
INPUTS: dict[str, Raw] = {
    **{"feature_probability": {"feature_probability": 0.8}, "value_range": {"value_range": [2, 3]}},
    **{"generation": EXACTLY, "n_active": {**EXACTLY, "n_active": 3}},
    "synced_inputs": {"synced_inputs": [[0, 1]]},
}
NONE: Raw = {"distribution": None, "min": None, "max": None, "q": None}
NORMAL: Raw = {**NONE, "distribution": "normal", "mu": 0.0, "sigma": 1.0}
SMALL_LM: Raw = {
    "vocab_size": 280,
    "model": {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_model": 16, "d_mlp": 32},
    **{"steps": 3, "batch_size": 16, "lr": 1e-2},
}
COUNT: Raw = {"type": "smooth_l0", "gamma": 0.1}
CURVE: Raw = {"type": "piecewise", "half_life": None, "segments": [{"to": 0.5}]}
TABLE: dict[str, tuple[Callable[[Raw], Any], Raw, dict[str, Raw]]] = {
    "SPDConfig": (
        decomposition,
        RUN,
        {
            "sites": {"sites": {**MLP_SITES, next(iter(MLP_SITES)): 9}},
            "losses": {"losses": {"recon": {"coeff": 1.0}}},
            "importance": {"importance": {"type": "affine"}},
            "lower_leak": {"lower_leak": "gradient"},
            **{"steps": {"steps": 7}, "lr": {"lr": 0.02}, "seed": {"seed": 1}},
            "lr_schedule": {"lr_schedule": {"type": "linear"}},
            "grad_clip": {"grad_clip": 1e-3},
            **{"components": {"components": {"lr": 0.1}}},
            **{"importances": {"importances": {"lr": 0.1}}},
            "faithfulness_warmup": {"faithfulness_warmup": {"steps": 2, "lr": 0.1}},
            "metrics": {"metrics": {"sparsity": {}}},
            **{"n_eval_batches": {"n_eval_batches": 2}, "log_every": {"log_every": 1}},
            **{"eval_every": {"eval_every": 2}, "save_every": {"save_every": 5}},
            "keep_checkpoints": {"keep_checkpoints": 3},
        },
    ),
    "WarmupConfig": (
        lambda raw: decomposition({**RUN, "faithfulness_warmup": raw}),
        {"steps": 2, "lr": 0.1},
        {"steps": {"steps": 3}, "lr": {"lr": 0.2}},
    ),
    "GroupConfig": (lambda raw: decomposition({**RUN, "importances": raw}), {}, CLIPS),
    "LossSpec": (
        lambda raw: decomposition({**RUN, "losses": {"recon": raw}}),
        {"coeff": 1.0},
        {"coeff": {"coeff": 2.0}},
    ),
    "_Sampled": (
        lambda raw: decomposition({**RUN, "losses": {"stochastic_recon": raw}}),
        {"coeff": 1.0},
        {"n_samples": {"n_samples": 2}},
    ),
    "_Masked": (
        lambda raw: decomposition({**RUN, "losses": {"stochastic_recon": raw}}),
        {"coeff": 1.0},
        {"delta": {"delta": True}},
    ),
    "MaskedRecon": (
        lambda raw: decomposition({**RUN, "losses": {"masked_recon": {"coeff": 1.0, **raw}}}),
        {"source": {"type": "uniform"}},
        {"source": {"source": {"type": "pgd"}}, "delta": {"delta": False}},
    ),
    "Uniform": (masked("uniform"), {}, {"routing": {"routing": "uniform_k"}}),
    "FreshPGD": (
        masked("pgd"),
        {"n_steps": 2},
        {
            **{"scope": {"scope": "bc"}, "n_steps": {"n_steps": 3}},
            "step_size": {"step_size": 0.2},
        },
    ),
    "AdamAscent": (
        masked("persistent"),
        {"scope": "bc"},
        {
            **{"scope": {"scope": "c"}, "n_warmup": {"n_warmup": 1}, "lr": {"lr": 0.1}},
            **{"lr_ramp": {"lr_ramp": 0.9}, "betas": {"betas": [0.1, 0.9]}, "eps": {"eps": 0.1}},
        },
    ),
    "Merged": (
        masked("merged"),
        {"scope": "bc"},
        {"adv_fraction": {"adv_fraction": 0.9}, "routing": {"routing": None}},
    ),
    "ImportanceMinimality": (
        lambda raw: decomposition({**RUN, "losses": {"importance_minimality": raw}}),
        {"coeff": 1.0, "pnorm": 1.0},
        {"pnorm": {"pnorm": 0.5}},
    ),
    "Faithfulness": (
        lambda raw: decomposition({**RUN, "losses": {"faithfulness": raw}}),
        {"coeff": 1.0},
        {"normalization": {"normalization": "relative"}},
    ),
    "Activity": (
        lambda raw: decomposition({**RUN, "losses": {"activity": raw}}),
        {"coeff": 1.0, "penalty": COUNT},
        {"penalty": {"penalty": {**COUNT, "gamma": 0.2}}},
    ),
    "Frequency": (
        lambda raw: decomposition({**RUN, "losses": {"frequency": raw}}),
        {"coeff": 1.0, "penalty": COUNT, "reference_count": 8},
        {
            "penalty": {"penalty": {**COUNT, "gamma": 0.2}},
            **{"reference_count": {"reference_count": 80}, "half_life": {"half_life": 2}},
        },
    ),
    "LpPenalty": (
        lambda raw: decomposition({**RUN, "losses": {"activity": {"coeff": 1, "penalty": raw}}}),
        {"type": "lp", "p": 0.5},
        {"p": {"p": 0.6}, "eps": {"eps": 0.1}},
    ),
    "SmoothL0Penalty": (
        lambda raw: decomposition({**RUN, "losses": {"activity": {"coeff": 1, "penalty": raw}}}),
        COUNT,
        {"gamma": {"gamma": 0.2}, "normalize_at_one": {"normalize_at_one": True}},
    ),
    "ScheduledValue": (
        lambda raw: decomposition({**RUN, "losses": {"recon": {"coeff": raw}}}),
        {"peak": 1.0, "segments": [{"to": 0.5}]},
        {
            **{"peak": {"peak": 2.0}, "start": {"start": 0.2}},
            "segments": {"segments": [{"to": 0.6}]},
        },
    ),
    "Segment": (
        lambda raw: decomposition(
            {**RUN, "losses": {"recon": {"coeff": {"peak": 1.0, "segments": [raw]}}}}
        ),
        {"to": 0.5},
        {"curve": {"curve": "cosine"}, "to": {"to": 0.4}, "until": {"until": 0.5}},
    ),
    "Schatten": (
        lambda raw: decomposition({**RUN, "losses": {"schatten": raw}}),
        {"coeff": 1.0, "pnorm": 1.0},
        {"pnorm": {"pnorm": 0.5}},
    ),
    "MLPImportanceConfig": (
        lambda raw: decomposition({**RUN, "importance": {"type": "mlp", **raw}}),
        {},
        {"n_hidden": {"n_hidden": 5}},
    ),
    "SharedMLPImportanceConfig": (
        lambda raw: decomposition({**RUN, "importance": {"type": "shared_mlp", **raw}}),
        {},
        {"hidden_widths": {"hidden_widths": [5, 4]}, "normalize": {"normalize": True}},
    ),
    "VectorMLPImportanceConfig": (
        lambda raw: decomposition({**RUN, "importance": {"type": "vector_mlp", **raw}}),
        {},
        {"n_hidden": {"n_hidden": 5}, "normalize": {"normalize": True}},
    ),
    "WholeImportanceSpec": (
        lambda raw: decomposition({**RUN, "importance": {"type": "global_mlp", **raw}}),
        {},
        {"chunks": {"chunks": [{"sites": ["first"]}, {"sites": ["deep.*", "last"]}]}},
    ),
    "Chunk": (
        lambda raw: decomposition(
            {**RUN, "importance": {"type": "global_mlp", "chunks": [raw, {"sites": ["last"]}]}}
        ),
        {"sites": ["first", "deep.*"]},
        {"sites": {"sites": ["[fd]*"], "reads": ["last"]}, "reads": {"reads": ["*"]}},
    ),
    "GlobalMLPImportanceConfig": (
        lambda raw: decomposition({**RUN, "importance": {"type": "global_mlp", **raw}}),
        {},
        {"hidden_widths": {"hidden_widths": [5, 4]}, "normalize": {"normalize": True}},
    ),
    "ScheduleConfig": (
        schedule,
        {"type": "exponential", "half_life": 3},
        {
            "type": {"type": "cosine", "half_life": None},
            "warmup_frac": {"warmup_frac": 0.5},
            "half_life": {"half_life": 4},
            "start": {**CURVE, "start": 0.5},
            "segments": CURVE,
        },
    ),
    "SparseFeatureConfig": (features, {}, {**INPUTS}),
    "InheritedFeatures": (
        inherited,
        {"feature_probability": 0.4},
        {
            **INPUTS,
            "generation": {"feature_probability": None, "unlike_target": True, **EXACTLY},
            "n_active": {**EXACTLY, "n_active": 3, "unlike_target": True},
            "unlike_target": {"unlike_target": True},
        },
    ),
    "TMSModelConfig": (
        tms_model,
        SMALL_TMS,
        {
            **{"n_features": {"n_features": 5}, "n_hidden": {"n_hidden": 3}},
            "n_hidden_layers": {"n_hidden_layers": 2},
            **{"hidden_init": {"hidden_init": "random"}, "tied_weights": {"tied_weights": False}},
            "init_bias_to_zero": {"init_bias_to_zero": True},
        },
    ),
    "TMSTrainConfig": (
        tms_training,
        {**TRAINING, "model": SMALL_TMS},
        {"model": {"model": {**SMALL_TMS, "n_hidden": 3}}, "data": TRAINING_CHANGES["data"]},
    ),
    "TargetTrainConfig": (
        tms_training,
        {**TRAINING, "model": SMALL_TMS},
        {key: change for key, change in TRAINING_CHANGES.items() if key != "data"},
    ),
    "ResidMLPModelConfig": (
        resid_mlp_model,
        SMALL_RESID_MLP,
        {
            **{"n_features": {"n_features": 5}, "d_embed": {"d_embed": 5}, "d_mlp": {"d_mlp": 3}},
            **{"n_layers": {"n_layers": 2}, "act_fn": {"act_fn": "gelu"}},
            **{"in_bias": {"in_bias": True}, "out_bias": {"out_bias": True}},
            "embedding": {"embedding": "identity"},
        },
    ),
    "LabelConfig": (
        labels,
        {},
        {
            **{"type": {"type": "abs"}, "coeff_seed": {"coeff_seed": 1}},
            "coeffs": {"coeffs": [1.5, 1.0, 1.0, 2.0, 1.0, 1.0]},
        },
    ),
    "ResidMLPTrainConfig": (
        resid_mlp_training,
        {**TRAINING, "model": SMALL_RESID_MLP},
        {
            "model": {"model": {**SMALL_RESID_MLP, "d_mlp": 3}},
            "labels": {"labels": {"type": "abs"}},
            **{"data": TRAINING_CHANGES["data"], "loss": {"loss": "residual"}},
            **{"feature_importance": {"feature_importance": 0.5}, "n_seeds": {"n_seeds": 3}},
        },
    ),
    "Resources": (
        slurm_script,
        {},
        {
            **{key: {key: "word"} for key in ("partition", "account", "qos", "constraint")},
            **{"gpus": {"gpus": 3}, "cpus": {"cpus": 5}, "nodes": {"nodes": 2}},
            **{"processes": {"processes": 2}, "memory_gb": {"memory_gb": 7}, "time": {"time": 99}},
            **{"max_parallel": {"max_parallel": 2}, "grace": {"grace": 33}},
            "max_timeouts": {"max_timeouts": 5},
        },
    ),
    "Quantity": (
        figures,
        {"label": "X"},
        {
            **{"label": {"label": "Y"}, "meaning": {"meaning": "what it is"}},
            **{"format": {"format": ".1%"}, "headline": {"headline": False}},
            **{"spread": {"spread": "x_sd"}, "published_as": {"published_as": "y", "label": "X"}},
        },
    ),
    "Published": (reference, {"value": 0.5}, {"value": {"value": 1}, "spread": {"spread": 0.1}}),
    "Parameter": (
        one_parameter,
        {"distribution": "q_uniform", "min": 1, "max": 9, "q": 2},
        {
            **{"value": {**NONE, "value": 3}, "values": {**NONE, "values": [1, 2]}},
            "probabilities": {**NONE, "values": [1, 2], "probabilities": [0.25, 0.75]},
            **{"distribution": {"distribution": "uniform"}, "min": {"min": 3}, "max": {"max": 5}},
            **{"q": {"q": 4}, "mu": {**NORMAL, "mu": 1.0}, "sigma": {**NORMAL, "sigma": 2.0}},
        },
    ),
    "Metric": (
        sweep_with("metric"),
        {"name": "x"},
        {"name": {"name": "y"}, "goal": {"goal": "maximize"}, "target": {"target": 0.5}},
    ),
    "EarlyTermination": (
        sweep_with("early_terminate"),
        {"type": "hyperband", "min_iter": 2},
        {
            **{"min_iter": {"min_iter": 3}, "max_iter": {"min_iter": None, "max_iter": 9, "s": 2}},
            **{"s": {"min_iter": None, "max_iter": 9, "s": 1}, "eta": {"eta": 4}},
            "strict": {"strict": True},
        },
    ),
    "Definition": (
        sweep,
        SWEEP,
        {
            **{"method": {"method": "bayes"}, "metric": {"metric": {"name": "y"}}},
            "parameters": {"parameters": {"lr": {"value": 1}}},
            "early_terminate": {"early_terminate": {"type": "hyperband", "min_iter": 2}},
            **{key: {key: "word"} for key in ("name", "description", "entity")},
            "run_cap": {"run_cap": 9},
        },
    ),
    "LMTrainConfig": (
        language_model,
        {**SMALL_LM, "lr_schedule": {"type": "linear"}},
        {
            **{"vocab_size": {"vocab_size": 270}, "seed": {"seed": 1}, "steps": {"steps": 4}},
            **{"batch_size": {"batch_size": 8}, "lr": {"lr": 0.1}},
            "lr_schedule": {"lr_schedule": {"type": "constant"}},
            **{"weight_decay": {"weight_decay": 0.9}, "clip_grad_norm": {"clip_grad_norm": 1e-3}},
            "model": {"model": {**SMALL_LM["model"], "d_mlp": 8}},
        },
    ),
}
LAUNCHED = (
    *("launch/test_arguments.py", "launch/test_launch_end_to_end.py", "evals/test_evals.py"),
    *("slurm/test_slurm.py", "sweeps/test_sweep_definition.py"),
)
ELSEWHERE = {
    "SPDConfig": ("runs/test_cli.py", "engine/test_gpu.py", "runs/test_starts.py"),
    "LaunchOptions": (*LAUNCHED, "launch/test_launch.py"),
    "EvalsOptions": (*LAUNCHED, "evals/test_controls.py"),
    "SweepOptions": (*LAUNCHED, "sweeps/test_wandb_sweep.py"),
    "Execution": (
        "engine/test_gpu.py",
        "engine/test_passes.py",
        "engine/test_precision_and_memory.py",
        "runs/test_starts.py",
    ),
    "ExperimentConfig": (
        *("runs/test_cli.py", "runs/test_wandb.py", "runs/test_run_seeds.py"),
        "experiments/test_null_targets.py",
    ),
    "TMSConfig": (
        "experiments/test_null_targets.py",
        "experiments/test_target_seeds.py",
        "experiments/test_tms_decomposition.py",
        "run_fixtures.py",
        "runs/test_cli.py",
    ),
    "ResidMLPConfig": (
        "experiments/test_null_targets.py",
        "experiments/test_target_seeds.py",
        "experiments/test_held_out_streams.py",
        "experiments/test_resid_mlp_plots.py",
    ),
    "NeuronContributionsFigure": ("experiments/test_resid_mlp_plots.py",),
    "ResponseCurves": ("experiments/test_resid_mlp_plots.py",),
    "EmbeddingRecon": ("test_losses.py",),
    "ColumnMatchMetric": ("test_metrics.py",),
    "LadderMetric": ("test_ladder.py", "test_evaluation.py"),
    "UsageMetric": ("test_evaluation.py",),
    "CrossEntropyMetric": ("test_evaluation.py",),
    "MeanActivity": ("test_evaluation.py",),
    "TransformerImportanceConfig": ("test_whole_importance.py",),
    "MetricSpec": ("test_metrics.py", "test_registry.py", "reports/test_report.py"),
    "Conclusion": ("test_metrics.py", "reports/test_report.py", "runs/test_wandb.py"),
    "TextConfig": ("experiments/lm/test_lm_text.py", "experiments/lm/test_lm_decomposition.py"),
    "LMConfig": (
        "experiments/lm/test_lm_decomposition.py",
        "experiments/lm/test_lm_loading.py",
        "experiments/lm/test_lm_null.py",
    ),
    "LlamaSize": ("experiments/lm/test_train_lm.py",),
    "LMTrainConfig": ("experiments/lm/test_train_lm.py",),
    "Definition": ("sweeps/test_sweep_definition.py", "sweeps/test_wandb_sweep.py"),
    "TargetReference": ("runs/test_pretrained.py",),
    "Layout": ("runs/test_pretrained.py",),
    "Figure": ("runs/test_pretrained.py",),
}
"""class → the tests that are about its other keys"""
SELECT = {"type", "kind", "open_group"}
"""choose the class itself, or say how it is written"""

CASES = [
    pytest.param(observe, base, changes[key], id=f"{name}.{key}")
    for name, (observe, base, changes) in TABLE.items()
    for key in changes
]
_SEEN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def observed(observe: Callable[[Raw], Any], raw: Raw) -> Any:
    key = f"{id(observe)} {raw}"
    if key not in _SEEN:
        _SEEN[key] = plain(observe(raw))
    return _SEEN[key]


@pytest.mark.slow
@pytest.mark.parametrize(("observe", "base", "change"), CASES)
def test_a_key_changes_what_comes_out(observe: Callable[[Raw], Any], base: Raw, change: Raw):
    before, after = observed(observe, base), observed(observe, {**base, **change})
    assert before != after


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_what_comes_out_depends_on_the_configuration_alone(name: str):
    observe, base, _ = TABLE[name]
    assert observed(observe, base) == plain(observe(base))


NODES = {node.name: set(fields(node)) - SELECT for node in configs()}


@pytest.mark.parametrize("name", NODES)
def test_every_key_stands_in_the_table_or_in_a_test_that_is_named(name: str):
    _, _, changes = TABLE.get(name, (None, None, {}))
    tests = [REPO_DIR / "tests" / path for path in ELSEWHERE.get(name, ())]
    words = {
        word for path in tests for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))
    }
    assert NODES[name] - set(changes) - words == set()
    assert set(changes) - SELECT <= NODES[name]


def test_the_table_names_classes_that_there_are():
    assert TABLE.keys() | ELSEWHERE.keys() <= NODES.keys()
