"""Training of residual MLPs, from the configuration to the loaded target."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spd import settings
from spd.config import UserError, load_config, parse
from spd.experiments.resid_mlp.model import ResidMLP, initial_weights, make_labels
from spd.experiments.resid_mlp.train_resid_mlp import (
    RESID_MLP_TARGET,
    ResidMLPTrainConfig,
    baseline_losses,
    bends_at_probe,
    folded_forward,
    load_resid_mlp_target,
    resid_mlp_loss,
    train,
    train_seeds,
)
from spd.experiments.sparse_features import SparseFeatures
from spd.experiments.target_training import TargetError, stack_seeds
from spd.experiments.targets import resolve_target, save_target, target_cli

CPU = torch.device("cpu")
FOLDER = settings.PACKAGE_DIR / "experiments" / "resid_mlp"
EASY = {
    "model": {"n_features": 4, "d_embed": 12, "d_mlp": 6, "n_layers": 1},
    "data": {"feature_probability": 0.3, "value_range": [-1.0, 1.0]},
    "n_seeds": 2,
    "steps": 200,
    "batch_size": 128,
    "lr": 0.01,
}
ALL = {"n_layers": 3, "act_fn": "gelu", "in_bias": True, "out_bias": True}


def config(**changes: object) -> ResidMLPTrainConfig:
    return parse(ResidMLPTrainConfig, {**EASY, **changes}, "test")


def model_with(**changes: object) -> dict[str, object]:
    return {**EASY["model"], **changes}


def initial(settings: ResidMLPTrainConfig) -> dict[str, Tensor]:
    return stack_seeds(lambda g: initial_weights(settings.model, generator=g), settings.seeds, CPU)


def member(weights: dict[str, Tensor], index: int = 0) -> dict[str, Tensor]:
    return {name: value[index] for name, value in weights.items()}


def loaded(settings: ResidMLPTrainConfig, weights: dict[str, Tensor]) -> ResidMLP:
    model = ResidMLP(settings.model)
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def write(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**EASY, **changes}), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def test_the_shipped_configurations_hold_the_published_settings():
    for n_layers, (n_features, d_mlp, steps) in enumerate(
        [(100, 50, 1000), (100, 25, 1000), (102, 17, 10_000)], start=1
    ):
        path = FOLDER / f"resid_mlp{n_layers}_target.yaml"
        found = load_config(ResidMLPTrainConfig, path)
        assert path.read_text().count("\n#") >= 2 and path.name in path.read_text()
        assert found.model.model_dump() == {
            "n_features": n_features,
            "d_embed": 1000,
            "d_mlp": d_mlp,
            "n_layers": n_layers,
            "act_fn": "relu",
            "in_bias": False,
            "out_bias": False,
            "embedding": "fixed",
        }
        assert (found.steps, found.batch_size) == (steps, 2048)
        assert (found.lr, found.weight_decay, found.lr_schedule.type) == (3e-3, 0.01, "cosine")
        assert (found.data.feature_probability, found.data.value_range) == (0.01, (-1.0, 1.0))
        assert (found.labels.type, found.labels.coeff_seed) == ("act_plus_resid", None)
        assert (found.loss, found.feature_importance) == ("readout", 1.0)


# --- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, ALL], ids=["plain", "gelu and biases"])
def test_the_folded_forward_pass_is_the_models(changes: dict[str, object]):
    settings = config(model=model_with(**changes))
    weights = member(initial(settings))
    model, x = loaded(settings, weights), torch.randn(7, 4)
    out = folded_forward(settings.model, weights, x, read=weights["W_U"])
    torch.testing.assert_close(out, model(x))
    residual = folded_forward(settings.model, weights, x, read=None)
    torch.testing.assert_close(residual, model.residual(x))


def test_each_loss_by_a_loop():
    x = torch.randn(5, 4)
    for changes in ({}, {"feature_importance": 0.5}, {"loss": "residual"}):
        settings = config(model=model_with(n_layers=2), labels={"coeff_seed": 1}, **changes)
        weights = member(initial(settings))
        model, labels = loaded(settings, weights), make_labels(settings.labels, settings.model)(x)
        total = 0.0
        if settings.loss == "residual":
            errors = model.residual(x) - labels @ weights["W_E"]
            total = sum(value**2 for row in errors.tolist() for value in row) / 60
        else:
            for row in range(5):
                for i in range(4):
                    error = float(model(x)[row, i] - labels[row, i])
                    total += settings.feature_importance**i * error**2 / 20
        assert resid_mlp_loss(settings, CPU)(weights, x).item() == pytest.approx(total, rel=1e-5)


def test_training_equals_a_plain_loop_over_modules():
    settings = config(
        model=model_with(n_layers=2, in_bias=True),
        steps=10,
        lr_schedule={"type": "cosine"},
    )
    trained, start = train_seeds(settings, CPU), initial(settings)
    for i in range(settings.n_seeds):
        model = ResidMLP(settings.model)
        model.load_state_dict(member(start, i))
        model.W_E.requires_grad_(False)
        model.W_U.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
        data = SparseFeatures(settings.data, 4, batch_size=128, seed=0, stream="target train")
        for step, x in enumerate(islice(data, settings.steps)):
            quarter = torch.tensor(0.5 * torch.pi * step / 9).cos().item()
            optimizer.param_groups[0]["lr"] = 0.01 * quarter
            loss = ((model(x) - x - x.relu()) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(trained[name][i], parameter.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding": "identity", "d_embed": 4},
        {"embedding": "trained"},
        {"embedding": "trained", "n_layers": 2, "out_bias": True},
    ],
)
@pytest.mark.parametrize("loss", ["readout", "residual"])
def test_embeddings_stay_fixed_and_tied_where_the_configuration_says_so(
    changes: dict[str, object], loss: str
):
    settings = config(model=model_with(**changes), steps=10, loss=loss)
    trained, start = train_seeds(settings, CPU), initial(settings)
    for name in ("W_E", "W_U"):
        fixed = torch.equal(trained[name], start[name])
        read = name == "W_E" or loss == "readout"  # the residual loss has no use for W_U
        assert fixed == (settings.model.embedding != "trained") or not read
    if settings.model.embedding != "trained":
        assert torch.equal(trained["W_U"], trained["W_E"].mT)
    for name in trained.keys() - {"W_E", "W_U"}:
        assert not torch.equal(trained[name], start[name])


@pytest.mark.parametrize(
    "data",
    [
        {"generation": "exactly_n_active", "n_active": 2, "value_range": [-1, 1]},
        {"feature_probability": 0.1, "value_range": [-1, 1], "synced_inputs": [[0, 1], [2, 3]]},
    ],
)
def test_other_kinds_of_data_train_too(data: dict[str, object]):
    target = train(config(data=data, labels={"type": "abs", "coeff_seed": 0}), CPU)
    assert target.record["seeds"][0]["final_loss"] < target.record["linear_loss"]


# --- what a target must be -------------------------------------------------------------------------


def test_bends_of_a_linear_and_of_an_exact_network():
    """Feature 0 has the ReLU it should have, feature 1 half of it, feature 2 none."""
    model = {"n_features": 3, "d_embed": 3, "d_mlp": 3, "n_layers": 1, "embedding": "identity"}
    settings = config(model=model)
    weights = {
        "W_E": torch.eye(3),
        "W_U": torch.eye(3),
        "layers.0.mlp_in.weight": torch.eye(3),
        "layers.0.mlp_out.weight": torch.diag(torch.tensor([1.0, 0.5, 0.0])),
    }
    bends = bends_at_probe(settings, {name: w[None] for name, w in weights.items()})
    torch.testing.assert_close(bends, torch.tensor([[1.0, 0.5, 0.0]]))


def test_the_best_linear_map_and_idle_mlps():
    """y = x + ReLU(x) on U(-1, 1): the best slope is 3/2; what is left is |x|/2 less its mean."""
    model = {"n_features": 2, "d_embed": 2, "d_mlp": 1, "n_layers": 1, "embedding": "identity"}
    data = {"feature_probability": 1.0, "value_range": [-1.0, 1.0]}
    settings = config(model=model, data=data, batch_size=10_000)
    found = baseline_losses(settings, member(initial(settings)), CPU)
    assert found.linear_loss == pytest.approx((1 / 3 - 1 / 4) / 4, rel=0.02)
    assert found.idle_loss == pytest.approx(1 / 6, rel=0.02)


def test_a_target_no_better_than_a_linear_one_is_refused_and_not_saved(tmp_path: Path):
    path = write(tmp_path / "idle.yaml", steps=1)
    with pytest.raises(TargetError) as refused:
        resolve_target(str(path), RESID_MLP_TARGET, device=CPU)
    message = str(refused.value)
    for words in ("best of 2 seeds", "not clearly (5 %) below", "linear network", "seed=2"):
        assert words in message
    assert not [p for p in settings.targets_root().iterdir() if p.is_dir()]


def test_a_target_that_gave_up_a_feature_is_refused():
    """Good on average: feature 3 counts next to nothing, and stays linear."""
    changes = {"feature_importance": 1e-3, "model": model_with(d_mlp=1)}
    with pytest.raises(TargetError, match="of 4 features with an own output that bends"):
        train(config(**changes), CPU)


def test_a_saved_target_loads_frozen_and_as_it_was(tmp_path: Path):
    settings = config(model=model_with(in_bias=True), labels={"coeff_seed": 7})
    target = train(settings, CPU)
    save_target(tmp_path / "target", settings, target)
    model, found = load_resid_mlp_target(tmp_path / "target", CPU)
    assert found == settings
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, target.weights[name])
    record = json.loads((tmp_path / "target" / "training.json").read_text())
    chosen = next(row for row in record["seeds"] if row["seed"] == record["chosen_seed"])
    data = SparseFeatures(settings.data, 4, batch_size=128, seed=0, stream="target eval")
    x = torch.cat(list(islice(data, 10)))
    labels = make_labels(settings.labels, settings.model)(x)
    own_loss = (model(x) - labels).square().mean().item()
    assert chosen["final_loss"] == pytest.approx(own_loss, rel=1e-4)
    assert own_loss < 0.95 * record["linear_loss"] < 0.95 * record["idle_loss"]
    assert chosen["n_represented"] == record["n_features"] == 4


# --- the command -----------------------------------------------------------------------------------


def test_the_command_trains_once_and_prints_directory_and_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "easy.yaml")
    assert target_cli(RESID_MLP_TARGET, [str(path), "seed=4"]) == 0
    first = capsys.readouterr().out
    (directory,) = [p for p in settings.targets_root().iterdir() if p.is_dir()]
    assert directory.name.startswith("easy-") and str(directory) in first and "4/4" in first
    assert target_cli(RESID_MLP_TARGET, [str(path), "seed=4"]) == 0
    assert "trained earlier" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["steps=1"], 1, "linear network"),
        (["model.embedding=identity"], 2, "needs n_features = d_embed, got 4 and 12"),
        (["loss=residual", "feature_importance=0.9"], 2, "goes with loss readout only"),
        (["model.act_fn=tanh"], 2, "model.act_fn"),
        (["labels.coef_seed=1"], 2, "did you mean 'coeff_seed'"),
        (["kind=tms"], 2, "kind"),
        (["data.synced_inputs=[[0,7]]"], 2, "names input 7"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "easy.yaml")
    assert target_cli(RESID_MLP_TARGET, [str(path), *arguments]) == status
    assert said in capsys.readouterr().err
    assert status == 1 or not settings.output_root().exists()


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path):
    target = train(config(), CPU)
    save_target(tmp_path / "target", config(model=model_with(d_mlp=5)), target)
    with pytest.raises(UserError, match="does not fit"):
        load_resid_mlp_target(tmp_path / "target", CPU)
