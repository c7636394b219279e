"""The registered experiments: their configurations, the published settings, the ways to start them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spd.config import UserError, load_config
from spd.registry import EXPERIMENTS, command_line, get_experiment
from spd.runs.execution import ExperimentConfig
from spd.settings import PACKAGE_DIR, REPO_DIR

TMS = {
    "data.feature_probability": 0.05,
    "data.value_range": [0.0, 1.0],
    "data.generation": None,  # as the target was trained
    "data.synced_inputs": None,
    "importance": {"type": "mlp", "n_hidden": 16},
    "lower_leak": "both",
    "lr": 1e-3,
    "lr_schedule.type": "cosine",
    "lr_schedule.warmup_frac": 0.0,
    "steps": 40_000,
    "batch_size": 4096,
    "tied_sites": [["linear1", "linear2"]],
    "wandb_project": "spd-tms",
}
TMS_SMALL = {**TMS, "losses.importance_minimality": {"coeff": 3e-3, "pnorm": 1.0}}
TMS_LARGE = {**TMS, "losses.importance_minimality": {"coeff": 1e-4, "pnorm": 2.0}}
ALL_LOSSES = {
    "losses.faithfulness": {"coeff": 1.0, "normalization": "entries"},
    "losses.stochastic_recon": {"coeff": 1.0, "n_samples": 1, "delta": False},
    "losses.stochastic_recon_layerwise": {"coeff": 1.0, "n_samples": 1, "delta": False},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "tms_5-2": {**TMS_SMALL, "sites": {"linear1": 20, "linear2": 20}},
    "tms_5-2-id": {
        **TMS_SMALL,
        "sites": {"linear1": 20, "hidden_layers.0": 20, "linear2": 20},
    },
    "tms_40-10": {**TMS_LARGE, "sites": {"linear1": 200, "linear2": 200}},
    "tms_40-10-id": {
        **TMS_LARGE,
        "sites": {"linear1": 200, "hidden_layers.0": 200, "linear2": 200},
    },
}
TMS_TARGET = {
    "data.feature_probability": 0.05,
    "data.value_range": [0.0, 1.0],
    "lr": 5e-3,
    "lr_schedule.type": "constant",
    "weight_decay": 0.01,
    "steps": 10_000,
    "model.hidden_init": "identity",
    "model.tied_weights": True,
}
SMALL_TARGET = {
    **TMS_TARGET,
    "batch_size": 1024,
    "model.n_features": 5,
    "model.n_hidden": 2,
    "model.init_bias_to_zero": False,
}
LARGE_TARGET = {
    **TMS_TARGET,
    "batch_size": 8192,
    "model.n_features": 40,
    "model.n_hidden": 10,
    "model.init_bias_to_zero": True,
}
PUBLISHED_TARGETS: dict[str, dict[str, Any]] = {
    "tms_5-2": {**SMALL_TARGET, "model.n_hidden_layers": 0},
    "tms_5-2-id": {**SMALL_TARGET, "model.n_hidden_layers": 1},
    "tms_40-10": {**LARGE_TARGET, "model.n_hidden_layers": 0},
    "tms_40-10-id": {**LARGE_TARGET, "model.n_hidden_layers": 1},
}
PUBLISHED_FIGURES = {  # of the paper: MMCS and ML2R
    "tms_5-2": ((1.0, 0.0), (0.993, 0.002)),
    "tms_5-2-id": ((1.0, 0.0), (0.992, 0.010)),
    "tms_40-10": ((1.0, 0.0), (1.010, 0.007)),
    "tms_40-10-id": ((1.0, 0.0), (1.031, 0.001)),
}


def config_class(module: ModuleType) -> type[ExperimentConfig]:
    """The configuration class that an experiment's script defines."""
    (found,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ExperimentConfig)
        and value.__module__ == module.__name__
    ]
    return found


def registered(name: str) -> tuple[ExperimentConfig, Path]:
    experiment = EXPERIMENTS[name]
    path = PACKAGE_DIR / experiment.config
    return load_config(config_class(importlib.import_module(experiment.module)), path), path


def at(config: dict[str, Any], place: str) -> Any:
    node: Any = config
    for key in place.split("."):
        node = node[key]
    return {k: v for k, v in node.items() if k != "type"} if "losses" in place else node


def assert_settings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {place: at(config, place) for place in expected} == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_configuration_is_read_and_bears_its_name(name: str):
    config, path = registered(name)
    assert config.experiment == name and path.stem == f"{name}_config"
    assert callable(importlib.import_module(EXPERIMENTS[name].module).build)
    assert EXPERIMENTS[name].minutes > 0 and EXPERIMENTS[name].expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_yaml_tells_its_story(name: str):
    """Command, expected time, expected result: the first three lines."""
    path = PACKAGE_DIR / EXPERIMENTS[name].config
    first = path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") for line in first)
    script = EXPERIMENTS[name].module.replace(".", "/") + ".py"
    assert first[0] == f"# python {script} {path.relative_to(REPO_DIR)}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_the_published_ones(name: str):
    config = registered(name)[0].model_dump(mode="json")
    assert_settings(config, {**PUBLISHED[name], **ALL_LOSSES})
    assert set(config["losses"]) == {
        *(place.removeprefix("losses.") for place in ALL_LOSSES),
        "importance_minimality",
    }


@pytest.mark.parametrize(
    ("name", "also"), [("tms_5-2", {"lower_leak", "tied_sites"}), ("tms_40-10", set())]
)
def test_a_fast_configuration_is_the_published_problem_optimised_otherwise(
    name: str, also: set[str]
):
    fast, published = (registered(each)[0].model_dump() for each in (f"{name}_fast", name))
    changed = {key for key, value in fast.items() if value != published[key]}
    assert changed == {"experiment", "steps", "batch_size", "lr", "lr_schedule", *also}


@pytest.mark.parametrize("name", PUBLISHED_TARGETS)
def test_the_targets_are_trained_as_published(name: str):
    from spd.experiments.tms.train_tms import TMSTrainConfig

    decomposition, path = registered(name)
    assert decomposition.target == f"{name}_target.yaml"
    target = load_config(TMSTrainConfig, path.with_name(f"{name}_target.yaml"))
    assert_settings(target.model_dump(mode="json"), PUBLISHED_TARGETS[name])
    if name.startswith("tms_5-2"):  # only about a quarter of the seeds represent all five features
        assert target.n_seeds >= 16


def published(name: str) -> dict[str, tuple[float, float | None]]:
    metrics = registered(name)[0].metrics.values()
    return {key: (p.value, p.spread) for spec in metrics for key, p in spec.published.items()}


@pytest.mark.parametrize("name", PUBLISHED_FIGURES)
def test_the_figures_to_compare_with_are_the_published_ones(name: str):
    mmcs, ml2r = PUBLISHED_FIGURES[name]
    assert published(name) == {"mmcs/linear1": mmcs, "ml2r/linear1": ml2r}


@pytest.mark.parametrize(("n_layers", "correlation"), [(1, 1.000), (2, 0.999), (3, 0.999)])
def test_the_published_correlation_of_residual_mlps(n_layers: int, correlation: float):
    expected = {"correlation/neuron_contributions": (correlation, None)}
    assert published(f"resid_mlp{n_layers}") == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_expected_holds_for_the_published_figures(name: str):
    metrics = registered(name)[0].metrics.values()
    expected = {key: ends for spec in metrics for key, ends in spec.expected.items()}
    assert ("solved" in expected) == name.startswith("tms")
    for key, (value, _) in published(name).items():
        low, high = expected[key]
        assert low <= value <= high


def test_every_experiment_can_be_started_from_the_editor():
    launch = json.loads((REPO_DIR / ".vscode" / "launch.json").read_text(encoding="utf-8"))
    entries = {
        entry["name"]: (entry["program"], *entry["args"])
        for entry in launch["configurations"]
        if "program" in entry
    }
    assert entries == {
        name: (
            "${workspaceFolder}/" + experiment.module.replace(".", "/") + ".py",
            f"spd/{experiment.config}",
        )
        for name, experiment in EXPERIMENTS.items()
    }


def test_the_other_commands_can_be_started_from_the_editor():
    launch = json.loads((REPO_DIR / ".vscode" / "launch.json").read_text(encoding="utf-8"))
    modules = [entry["module"] for entry in launch["configurations"] if "module" in entry]
    assert modules == ["spd.evals.run_evals", "spd.sweeps.sweep"]
    assert all(hasattr(importlib.import_module(module), "main") for module in modules)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'tms_5-3'; did you mean 'tms_5-2'\? .*tms_40-10-id"):
        get_experiment("tms_5-3")


def test_the_registry_imports_nothing_heavy():
    code = "import sys, spd.registry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "matplotlib", "wandb", "transformers", "datasets"}
    assert "spd.registry" in done.stdout.split() and not heavy & set(done.stdout.split())


def test_a_run_by_name_hands_its_arguments_on():
    """In order: an option keeps its value. The run's threads sleep while they wait."""
    code = """
import os, sys
def execve(program, command, environment):
    print(command)
    print(environment["OMP_WAIT_POLICY"], file=sys.stderr)
os.execve = execve
from spd.registry import main
main()
"""
    arguments = ["steps=5", "--resume", "somewhere", "lr=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "tms_5-2", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    command = command_line("tms_5-2", arguments)
    assert done.stderr == "passive\n"
    assert done.stdout == f"{command}\n" and command[-4:] == arguments
    assert command[:3] == [sys.executable, "-m", "spd.experiments.tms.tms_decomposition"]
    assert command[3] == str(PACKAGE_DIR / "experiments/tms/tms_5-2_config.yaml")


@pytest.mark.parametrize(
    "words",
    [
        *(["--resume", "{}"], ["--resume={}"], ["--trust", "--resume", "{}"]),
        *(["--resume", "{}", "--target", "there"], ["--target=there", "--resume={}"]),
    ],
    ids=" ".join,
)
def test_a_run_is_gone_on_with_under_its_own_configuration(tmp_path: Path, words: list[str]):
    """Whatever way the options are written, and beside which others."""
    arguments = [word.format(tmp_path) for word in words]
    command = command_line("tms_5-2", arguments)
    assert command == [sys.executable, "-m", EXPERIMENTS["tms_5-2"].module, *arguments]
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"experiment: mine\nmodule: {EXPERIMENTS['tms_5-2'].module}\n")
    command = command_line(str(mine), arguments)
    made_by = ["--made_by", str(mine)]
    assert command == [sys.executable, "-m", "spd.runs.cli", *made_by, *arguments]


@pytest.mark.parametrize("arguments", [["--resume"], ["--resume", "there", "steps=5"], ["a=1"]])
def test_what_says_more_than_the_run_is_compared_with_the_experiments_own_yaml(
    arguments: list[str],
):
    config = str(PACKAGE_DIR / "experiments/tms/tms_5-2_config.yaml")
    assert command_line("tms_5-2", arguments)[3:] == [config, *arguments]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("tms_40-10", "a run of 'tms_5-2', not of 'tms_40-10'"),
        ("resid_mlp1", "a run of spd.experiments.tms.tms_decomposition, but 'resid_mlp1' is of"),
    ],
)
def test_a_run_of_another_experiment_is_refused(tmp_path: Path, other: str, said: str):
    entry = {"module": EXPERIMENTS["tms_5-2"].module}
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"entry": entry, "config": {"experiment": "tms_5-2"}}))
    for arguments in (["--resume", str(tmp_path)], [f"--resume={tmp_path}", "--target", "there"]):
        assert command_line("tms_5-2", arguments)
        with pytest.raises(UserError, match=said) as raised:
            command_line(other, arguments)
        assert f"spd-run --resume {tmp_path} goes on with it" in str(raised.value)
    meta.write_text(json.dumps({"entry": entry}))  # as earlier runs left it
    assert command_line("tms_40-10", ["--resume", str(tmp_path)])
