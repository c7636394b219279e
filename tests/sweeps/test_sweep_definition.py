"""Sweep definitions in W&B's schema: what is read, what is refused, and what W&B would get."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from spd.config import UserError
from spd.launch import study as launch
from spd.sweeps import optuna_backend as local_study
from spd.sweeps import wandb_backend as wandb_sweep
from spd.sweeps.definition import check, overrides_of, read_definition
from spd.sweeps.sweep import SHIPPED, main

SCHEMA = json.loads((Path(__file__).parents[1] / "sweep_schema.json").read_text(encoding="utf-8"))
GRID = {
    "method": "grid",
    "metric": {"name": "eval/loss/total"},
    "parameters": {"seed": {"values": [0, 1]}, "lr": {"values": ["1e-3", 2e-3]}},
}
RANDOM = {
    "method": "random",
    "metric": {"name": "loss/total", "goal": "minimize"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "importance.n_hidden": {"min": 4, "max": 32},
        "data.feature_probability": {"min": 0.01, "max": 0.5},
        "lower_leak": {"values": ["both", "gradient"]},
        "seed": {"value": 3},
    },
    "run_cap": 8,
    "early_terminate": {"type": "hyperband", "min_iter": 2},
}


def written(folder: Path, raw: dict[str, Any], **changes: Any) -> Path:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}, sort_keys=False), encoding="utf-8")
    return path


def checked(path: Path, *fixed: str) -> None:
    check(read_definition(path), "tms_5-2", list(fixed), path.name)


def test_the_shipped_sweep_is_a_grid_over_five_seeds_for_every_experiment():
    definition = read_definition(SHIPPED)
    assert list(definition.points()) == [{"seed": seed} for seed in range(5)]
    for name in ("tms_5-2", "tms_40-10-id"):
        check(definition, name, [], str(SHIPPED))


def test_points_come_in_order_and_as_the_numbers_they_look_like(tmp_path: Path):
    definition = read_definition(written(tmp_path, GRID))
    assert list(definition.points()) == [
        {"seed": 0, "lr": 1e-3},
        {"seed": 0, "lr": 2e-3},
        {"seed": 1, "lr": 1e-3},
        {"seed": 1, "lr": 2e-3},
    ]
    assert definition.n_points == 4
    assert overrides_of({"lr": 1e-05, "a.b": [0, 1.5], "c": "both", "d": True}) == [
        *("lr=1e-05", "a.b=[0, 1.5]", 'c="both"', "d=true"),
    ]


def test_nested_parameters_are_dotted(tmp_path: Path):
    nested = {"losses": {"parameters": {"faithfulness": {"parameters": {"coeff": {"value": 2}}}}}}
    definition = read_definition(written(tmp_path, GRID, parameters=nested))
    assert list(definition.points()) == [{"losses.faithfulness.coeff": 2}]
    checked(tmp_path / "params.yaml")


@pytest.mark.parametrize("raw", [GRID, RANDOM], ids=["grid", "random"])
def test_what_fits_is_accepted_by_both_back_ends(tmp_path: Path, raw: dict[str, Any]):
    path = written(tmp_path, raw)
    checked(path)
    local_study.check(read_definition(path))
    wandb_sweep.check(read_definition(path))


@pytest.mark.parametrize("key", ["compile", "execution.compile"])
def test_settings_of_execution_are_swept_with_and_without_their_group(tmp_path: Path, key: str):
    path = written(tmp_path, GRID, parameters={key: {"values": [True, False]}})
    checked(path, "passes=together")
    for fixed in ("compile=false", "execution.compile=false"):
        with pytest.raises(UserError, match=f"parameters.{key}: is set for all trials already"):
            checked(path, fixed)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "gird"}, "method: .*'grid', 'random' or 'bayes'"),
    "key": ({"metrics": {}}, "metrics: unknown key; did you mean 'metric'?"),
    "ours": ({"program": "x.py"}, "program: is set by spd-sweep"),
    "no parameters": ({"parameters": {}}, "parameters: "),
    "no values": ({"parameters": {"seed": {}}}, "parameters.seed: needs value, values"),
    "two ways": (
        {"parameters": {"seed": {"value": 1, "min": 0, "max": 2}}},
        "parameters.seed: one of them is allowed, not value with min and max",
    ),
    "half an interval": ({"parameters": {"seed": {"min": 1}}}, "both min and max are needed"),
    "empty interval": ({"parameters": {"lr": {"min": 2, "max": 1}}}, "min 2.* is not below max 1"),
    "value twice": ({"parameters": {"seed": {"values": [1, 1]}}}, "a value stands twice"),
    "interval in a grid": (
        {"parameters": {"lr": {"min": 0.1, "max": 0.2}}},
        "parameters.lr: a grid takes value, values, or whole min and max, not uniform",
    ),
    "misspelt setting": (
        {"parameters": {"sed": {"values": [1]}}},
        "parameters.sed: tms_5-2 has no such setting; did you mean 'seed'?",
    ),
    "misspelt below": (
        {"parameters": {"losses.faithfullness.coeff": {"values": [1]}}},
        "no such setting; did you mean 'losses.faithfulness.coeff'?",
    ),
    "setting twice": (
        {"parameters": {"tf32": {"value": True}, "execution.tf32": {"value": False}}},
        "parameters.tf32: stands twice, also as execution.tf32",
    ),
    "nested and dotted": (
        {
            "parameters": {
                "data.feature_probability": {"value": 0.1},
                "data": {"parameters": {"feature_probability": {"value": 0.2}}},
            }
        },
        "parameters.data.feature_probability: stands twice, with dots and below another key",
    ),
    "unknown site": (
        {"parameters": {"sites.linear3": {"values": [5]}}},
        "sites.linear3: .*no such",
    ),
    "bad value": ({"parameters": {"seed": {"values": [0, -1]}}}, "seed: .*got -1"),
    "bad word": (
        {"parameters": {"lower_leak": {"values": ["both", "none"]}}},
        "lower_leak: .*'none'",
    ),
    "metric": ({"metric": {"name": "eval/loss/totl"}}, "did you mean 'eval/loss/total'?"),
    "metric of no loss": ({"metric": {"name": "loss/schatten"}}, "'loss/schatten' is not logged"),
    "metric of a figure": (
        {"metric": {"name": "eval/errors/totl"}},
        "'eval/errors/totl' is not logged; did you mean 'eval/errors/total'?",
    ),
    "metric of no site": ({"metric": {"name": "l0/linear3"}}, "did you mean 'l0/linear"),
    "metric of no figure": (
        {"metric": {"name": "eval/errrors/total"}},
        "mean 'eval/errors/total'?",
    ),
    "metric from nowhere": ({"metric": {"name": "accuracy"}}, "'accuracy' is not logged"),
    "goal": (
        {"metric": {"name": "loss/total", "goal": "less"}},
        "goal: .*'minimize' or 'maximize'",
    ),
    "early end": ({"early_terminate": {"type": "hyperband"}}, "one of min_iter and max_iter"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    path = written(tmp_path, GRID, **changes)
    with pytest.raises(UserError, match=said) as raised:
        checked(path)
    assert str(raised.value).count("params.yaml") >= 1


def test_both_ends_of_an_interval_are_checked(tmp_path: Path):
    parameters = {**RANDOM["parameters"], "data.feature_probability": {"min": 0.1, "max": 1.5}}
    path = written(tmp_path, RANDOM, parameters=parameters)
    with pytest.raises(UserError, match=r"data.feature_probability: .*got 1.5"):
        checked(path)


WHOLE = "importance.n_hidden"


@pytest.mark.parametrize(
    "spec",
    [
        {"distribution": "uniform", "min": 4, "max": 32},
        {"distribution": "q_uniform", "min": 4, "max": 32, "q": 0.5},
        {"distribution": "log_uniform_values", "min": 4, "max": 32},
        {"distribution": "beta"},
    ],
    ids=lambda spec: spec["distribution"],
)
def test_real_values_of_a_whole_setting_are_refused(tmp_path: Path, spec: dict[str, Any]):
    path = written(tmp_path, RANDOM, parameters={WHOLE: spec})
    with pytest.raises(UserError, match=r"mlp.n_hidden: .*valid integer, .*got \d+\.\d"):
        checked(path)


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        (WHOLE, {"min": 4, "max": 32}),
        (WHOLE, {"distribution": "q_uniform", "min": 4, "max": 32, "q": 4}),
        (WHOLE, {"distribution": "q_uniform", "min": 4.0, "max": 32.0}),
        (WHOLE, {"distribution": "q_log_uniform", "min": 1.5, "max": 3.5}),
        (WHOLE, {"distribution": "q_normal", "mu": 100, "sigma": 10}),
        ("lr", {"distribution": "normal", "mu": 1e-3, "sigma": 1e-4}),
        ("lr", {"distribution": "log_normal", "mu": -7.0, "sigma": 1.0}),
        ("lr", {"distribution": "log_normal"}),
        ("lr", {"distribution": "inv_log_uniform", "min": 5.0, "max": 9.0}),
        ("data.feature_probability", {"distribution": "beta"}),
    ],
)
def test_values_that_fit_are_those_that_are_drawn(tmp_path: Path, key: str, spec: dict[str, Any]):
    path = written(tmp_path, RANDOM, parameters={key: spec})
    checked(path)
    wandb_sweep.check(read_definition(path))


def test_a_point_is_one_run(tmp_path: Path):
    with pytest.raises(
        UserError, match="seeds: every point of a sweep is one run; sweep over seed"
    ):
        checked(written(tmp_path, GRID), "seeds=[0, 1]")
    swept = written(tmp_path, GRID, parameters={"seeds": {"values": [[0], [1]]}})
    with pytest.raises(UserError, match="seeds: every point of a sweep is one run"):
        checked(swept)


SEEDS_ALONE = {"seed": {"values": [0, 1, 2]}}


@pytest.mark.parametrize(
    ("experiment", "changes"),
    [
        ("pydoc_emb", {"parameters": SEEDS_ALONE}),
        ("tms_5-2", {}),
        ("tms_5-2", {"parameters": SEEDS_ALONE, "early_terminate": RANDOM["early_terminate"]}),
    ],
    ids=["a language model", "other settings", "pruning"],
)
def test_what_cannot_go_side_by_side_is_not_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], experiment: str, changes: dict[str, Any]
):
    params = str(written(tmp_path, GRID, **changes))
    words = [experiment, "2", "--dry_run", "--local", "--params", params, "--backend", "local"]
    for ensemble, status in (("always", 2), ("auto", 0)):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--ensemble", ensemble])
        assert ended.value.code == status
        assert (status == 2) == ("goes with a grid over seed alone" in capsys.readouterr().err)


def test_what_is_fixed_is_not_swept(tmp_path: Path):
    path = written(tmp_path, GRID)
    with pytest.raises(UserError, match="parameters.lr: is set for all trials already"):
        checked(path, "lr=1e-3")
    with pytest.raises(UserError, match="stepz: unknown key"):
        checked(path, "stepz=1")


def test_what_only_wandb_can_do_is_refused_locally(tmp_path: Path):
    normal = {"lr": {"distribution": "normal", "mu": 1.0, "sigma": 0.1}}
    definition = read_definition(written(tmp_path, RANDOM, parameters=normal))
    with pytest.raises(UserError, match="parameters.lr: normal is for W&B alone"):
        local_study.check(definition)
    early = {"type": "hyperband", "min_iter": 3, "strict": True}
    with pytest.raises(UserError, match="early_terminate.strict: true is for W&B alone"):
        local_study.check(read_definition(written(tmp_path, RANDOM, early_terminate=early)))
    endless = {key: value for key, value in RANDOM.items() if key != "run_cap"}
    with pytest.raises(UserError, match="run_cap: is needed"):
        local_study.check(read_definition(written(tmp_path, endless)))


def test_null_does_not_reach_wandb(tmp_path: Path):
    values = {"figures_every": {"values": [None, 5]}}
    with pytest.raises(UserError, match="W&B writes null as None"):
        wandb_sweep.check(read_definition(written(tmp_path, GRID, parameters=values)))


# --- what W&B would get -----------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [GRID, RANDOM, yaml.safe_load(SHIPPED.read_text())])
def test_the_definition_that_is_sent_has_wandbs_documented_form(
    tmp_path: Path, raw: dict[str, Any]
):
    definition = read_definition(written(tmp_path, raw))
    record = {
        "definition": definition.model_dump(mode="json", exclude_unset=True),
        "name": "spd-sweep-5m",
        "project": "spd-tms",
    }
    sent = wandb_sweep.sent(launch.Study(tmp_path / "a-study", record))
    jsonschema.validate(sent, SCHEMA)
    assert sent["command"][-1] == "${args_no_hyphens}" and sent["name"] == "spd-sweep-5m"
    assert sent["parameters"].keys() == raw["parameters"].keys()
    assert sent["metric"]["name"] == raw["metric"]["name"]


@pytest.mark.parametrize(
    "change",
    [
        {"method": "annealing"},
        {"metric": {"goal": "minimize"}},
        {"command": ["python", "${args_without_hyphens}"]},
        {"parameters": {"lr": {"values": [1], "value": 1}}},
        {"parameters": {"lr": {"min": 1}}},
        {"max_runs": 5},
    ],
)
def test_the_schema_can_say_no(change: dict[str, Any]):
    good = {**RANDOM, "program": "x.py", "command": ["python", "${args_no_hyphens}"]}
    jsonschema.validate(good, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, **change}, SCHEMA)


@pytest.mark.parametrize(
    "name",
    [
        *("loss/total", "eval/loss/faithfulness", "l0/linear1", "eval/l0/linear2", "eval/solved"),
        *("eval/mmcs/linear1", "eval/mmcs_sd/linear1", "eval/errors/total", "eval/alive/linear2"),
    ],
)
def test_every_figure_of_a_run_can_be_the_metric(tmp_path: Path, name: str):
    definition = read_definition(written(tmp_path, {**GRID, "metric": {"name": name}}))
    check(definition, "tms_5-2", [], "here")
