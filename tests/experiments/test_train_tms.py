"""Training of the toy model of superposition, from the configuration to the loaded target."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from spd import settings
from spd.config import UserError, load_config, parse
from spd.experiments.sparse_features import SparseFeatures
from spd.experiments.target_training import TargetError, stack_seeds
from spd.experiments.targets import resolve_target, save_target, target_cli
from spd.experiments.tms.model import TMSModel, initial_weights
from spd.experiments.tms.train_tms import (
    TMS_TARGET,
    TMSTrainConfig,
    load_tms_target,
    outputs_at_probe,
    train,
    train_seeds,
)

CPU = torch.device("cpu")
FOLDER = settings.PACKAGE_DIR / "experiments" / "tms"
EASY = {
    "model": {"n_features": 3, "n_hidden": 3, "n_hidden_layers": 1},
    "data": {"feature_probability": 0.3},
    "n_seeds": 3,
    "steps": 250,
    "batch_size": 128,
    "lr": 0.02,
}


def config(**changes: object) -> TMSTrainConfig:
    return parse(TMSTrainConfig, {**EASY, **changes}, "test")


def write(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**EASY, **changes}), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def test_the_shipped_configurations_hold_the_published_settings():
    published = {"5-2": (5, 2, 1024, False), "40-10": (40, 10, 8192, True)}
    for name, (n_features, n_hidden, batch_size, zero_bias) in published.items():
        for suffix, n_hidden_layers in (("", 0), ("-id", 1)):
            path = FOLDER / f"tms_{name}{suffix}_target.yaml"
            found = load_config(TMSTrainConfig, path)
            assert path.read_text().count("\n#") >= 2 and path.name in path.read_text()
            assert found.model.model_dump() == {
                "n_features": n_features,
                "n_hidden": n_hidden,
                "n_hidden_layers": n_hidden_layers,
                "hidden_init": "identity",
                "tied_weights": True,
                "init_bias_to_zero": zero_bias,
            }
            assert (found.steps, found.batch_size) == (10_000, batch_size)
            assert (found.lr, found.weight_decay) == (5e-3, 0.01)
            assert found.lr_schedule.type == "constant"
            assert (found.data.feature_probability, found.data.value_range) == (0.05, (0.0, 1.0))


@pytest.mark.parametrize("hidden_init", ["identity", "random"])
def test_tie_and_hidden_layers_are_kept_through_training(hidden_init: str):
    model = {**EASY["model"], "hidden_init": hidden_init}
    settings = config(model=model, steps=20)
    trained = train_seeds(settings, CPU)
    initial = stack_seeds(
        lambda g: initial_weights(settings.model, generator=g), settings.seeds, CPU
    )
    assert torch.equal(trained["linear2.weight"], trained["linear1.weight"].mT)
    assert torch.equal(trained["hidden_layers.0.weight"], initial["hidden_layers.0.weight"])
    for name in ("linear1.weight", "linear2.bias"):
        assert (trained[name] - initial[name]).abs().amin() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_training_equals_a_plain_loop_over_modules(tied: bool):
    settings = config(model={**EASY["model"], "tied_weights": tied}, steps=10)
    trained = train_seeds(settings, CPU)
    initial = stack_seeds(
        lambda g: initial_weights(settings.model, generator=g), settings.seeds, CPU
    )
    for i in range(settings.n_seeds):
        model = TMSModel(3, 3, 1)
        model.hidden_layers.requires_grad_(False)
        member = {name: w[i] for name, w in initial.items()}
        model.load_state_dict({"linear2.weight": member["linear1.weight"].T, **member})
        if tied:
            del model.linear2.weight
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.02, weight_decay=0.01)
        data = SparseFeatures(settings.data, 3, batch_size=128, seed=0, stream="target train")
        for x in islice(data, settings.steps):
            if tied:
                model.linear2.weight = model.linear1.weight.T
            loss = ((model(x) - x.abs()) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name in ("linear1.weight", "linear2.bias", *(() if tied else ("linear2.weight",))):
            expected = model.get_parameter(name).detach()
            torch.testing.assert_close(trained[name][i], expected, atol=1e-5, rtol=1e-5)


def test_the_probe_reads_each_features_own_output():
    weights = train_seeds(config(steps=20), CPU)
    outputs = outputs_at_probe(TMSModel(3, 3, 1), weights)
    model = TMSModel(3, 3, 1)
    for i in range(3):
        model.load_state_dict({name: w[i] for name, w in weights.items()})
        for j in range(3):
            alone = torch.zeros(3)
            alone[j] = 0.75
            torch.testing.assert_close(outputs[i, j], model(alone)[j].detach())


def test_a_saved_target_loads_frozen_and_as_it_was(tmp_path: Path):
    settings = config()
    target = train(settings, CPU)
    save_target(tmp_path / "target", settings, target)
    model, loaded = load_tms_target(tmp_path / "target", CPU)
    assert loaded == settings
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, target.weights[name])
    assert torch.equal(model.linear2.weight, model.linear1.weight.T)
    own = model(0.75 * torch.eye(3)).diagonal()
    assert (own >= 0.375).all()
    record = json.loads((tmp_path / "target" / "training.json").read_text())
    chosen = next(row for row in record["seeds"] if row["seed"] == record["chosen_seed"])
    assert chosen["outputs_at_probe"] == pytest.approx(own.tolist(), abs=1e-5)
    assert chosen["n_represented"] == record["n_features"] == 3


def test_one_hidden_unit_can_be_saved(tmp_path: Path):
    settings = config(model={"n_features": 1, "n_hidden": 1}, n_seeds=1, seed=1)
    save_target(tmp_path / "target", settings, train(settings, CPU))
    load_tms_target(tmp_path / "target", CPU)


def test_a_target_that_lost_features_is_refused_and_not_saved(tmp_path: Path):
    path = write(tmp_path / "lost.yaml", steps=1)
    with pytest.raises(TargetError, match="none of 3 seeds represents all 3 features"):
        resolve_target(str(path), TMS_TARGET, device=CPU)
    assert not [p for p in settings.targets_root().iterdir() if p.is_dir()]


def test_the_command_trains_once_and_prints_directory_and_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "easy.yaml")
    assert target_cli(TMS_TARGET, [str(path), "seed=4"]) == 0
    first = capsys.readouterr().out
    (directory,) = [p for p in settings.targets_root().iterdir() if p.is_dir()]
    assert directory.name.startswith("easy-") and str(directory) in first
    assert load_tms_target(directory, CPU)[1].seed == 4
    for line in ("chosen", "     4 ", "     6 "):
        assert line in first
    weights = directory / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert target_cli(TMS_TARGET, [str(path), "seed=4"]) == 0
    assert "trained earlier" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [
        ("steps=1", 1, "none of 3 seeds"),
        ("steps=-1", 2, "steps"),
        ("model.n_featurs=4", 2, "did you mean 'n_features'"),
        ("kind=resid_mlp", 2, "kind"),
        ("data.synced_inputs=[[0,7]]", 2, "names input 7"),
        ("--device=nonsense", 2, "nonsense"),
    ],
)
def test_the_command_says_what_is_wrong(
    argument: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "easy.yaml")
    assert target_cli(TMS_TARGET, [str(path), argument]) == status
    assert said in capsys.readouterr().err
    assert status == 1 or not settings.output_root().exists()


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path):
    target = train(config(), CPU)
    wrong = config(model={**EASY["model"], "n_hidden": 2})
    save_target(tmp_path / "target", wrong, target)
    with pytest.raises(UserError, match="does not fit"):
        load_tms_target(tmp_path / "target", CPU)
