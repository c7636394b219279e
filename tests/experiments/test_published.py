"""Runs of the published implementation: read from their layout, or refused with what it is."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from spd import registry
from spd.analysis.agreement import main as agreement
from spd.config import UserError
from spd.experiments.published.command import import_published, main
from spd.experiments.resid_mlp.model import label_coefficients
from spd.runs.cli import checked_config, report
from spd.runs.run import load_run, resume
from spd.runs.trust import parts_of_run
from tests.lm_stand_ins import little_llama, make_tokenizer, save_model, stories
from tests.published import (
    COEFFS,
    drawn,
    gates,
    importance_of,
    resid_mlp_modules,
    tms_modules,
    write_resid_mlp,
    write_tms,
    write_yaml,
)

QUICK = ("metrics={}", "figures={}", "n_eval_batches=1", "eval_batch_size=32")


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    return tmp_path / "out"


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest."""
    assert (found - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max().item())


def assert_same_computation(
    directory: Path, state: Mapping[str, Tensor], modules: Callable[..., Any], width: int
) -> None:
    """Target output, importances and outputs under masks, against the formulas."""
    model = load_run(directory).model
    x = torch.rand(16, width, generator=torch.Generator().manual_seed(0))
    expected, read = modules(state, x, None)
    target = model.target_forward(x)
    assert_close(target.output, expected)
    g = {module: importance_of(state, module, own) for module, own in read.items()}
    found = model.importances(x).lower
    assert found.keys() == g.keys()
    for module, own in g.items():
        assert (found[module] - own).abs().max() < 1e-5
        assert 0 < (own > 0).float().mean() < 1, "some are on, some off"
    generator = torch.Generator().manual_seed(1)
    masks = {module: torch.rand(own.shape, generator=generator) for module, own in g.items()}
    for m in (masks, {module: torch.ones_like(own) for module, own in g.items()}):
        assert_close(model(x, m), modules(state, x, m)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_toy_model_of_superposition(tmp_path: Path, tied: bool):
    state = write_tms(tmp_path / "theirs", tied=tied)
    directory = import_published(tmp_path / "theirs", QUICK)
    assert_same_computation(directory, state, tms_modules, 5)
    run = load_run(directory)
    config = run.config
    assert run.step == 40 and config.steps == 40 and config.seed == 3
    assert config.sites == {"linear1": 7, "linear2": 7, "hidden_layers.0": 7}
    assert config.tied_sites == ((("linear1", "linear2"),) if tied else ())
    assert config.importance.n_hidden == 3 and config.lower_leak == "both"
    assert set(config.losses) == {
        *("faithfulness", "stochastic_recon", "stochastic_recon_layerwise"),
        "importance_minimality",
    }
    assert config.losses["stochastic_recon"].n_samples == 2
    assert config.losses["importance_minimality"].coeff == 3e-3
    assert config.lr_schedule.type == "cosine"
    assert (config.data.feature_probability, config.data.n_active) == (0.2, 2)
    assert (directory / "target/config.yaml").read_text().count("hidden_init: random") == 1
    meta = json.loads((directory / "meta.json").read_text())
    assert meta["status"] == "finished"
    assert meta["imported"]["config"]["n_ci_mlp_neurons"] == 3


def test_a_residual_mlp(tmp_path: Path):
    coeffs = [1.0, 1.5, 2.0, 1.25, 1.75, 1.1]
    state = write_resid_mlp(tmp_path / "theirs", label_coeffs=coeffs)
    directory = import_published(tmp_path / "theirs", QUICK)
    assert_same_computation(directory, state, resid_mlp_modules, 6)
    run = load_run(directory)
    assert run.step == 30_000, "the newest state dict"
    assert run.config.lr_schedule.half_life == 500
    assert run.config.importance.type == "affine"
    x = torch.rand(4, 6)
    labels = x + torch.nn.functional.gelu(torch.tensor(coeffs) * x)
    problem: Any = run.problem
    assert torch.allclose(problem.labels(x), labels)
    training = yaml.safe_load((directory / "target/config.yaml").read_text())
    assert training["model"]["embedding"] == "fixed"


@pytest.mark.slow
def test_what_runs_are_good_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Report, figures, agreement; and going on is refused in one line."""
    write_tms(tmp_path / "theirs")
    options = ["n_eval_batches=1", "metrics={sparsity: {}}", "figures={mean_activity: {}}"]
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "theirs"), *options, "--run_dir", str(tmp_path / "ours")])
    assert ended.value.code == 0
    assert "imported_tms_5-2-id, seed 3, 40 steps" in capsys.readouterr().out
    ours = tmp_path / "ours"
    assert [path.name for path in (ours / "figures").iterdir()] == ["mean_activity"]
    report([str(ours)])
    page = (ours / "report.html").read_text(encoding="utf-8")
    assert "Trained by the published implementation and imported from" in page
    shutil.copytree(ours, tmp_path / "again")
    shutil.rmtree(tmp_path / "theirs")  # needed no more
    agreement([str(ours), str(tmp_path / "again")])
    assert "best match" in capsys.readouterr().out
    with pytest.raises(UserError, match="imported: it cannot be gone on with"):
        resume(*parts_of_run(ours), ours)


def state_without(folder: Path, name: str) -> None:
    path = folder / "model_40.pth"
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if not key.startswith(name)}, path)


def config_with(folder: Path, **changes: Any) -> None:
    path = folder / "final_config.yaml"
    raw = {**yaml.safe_load(path.read_text()), **changes}
    write_yaml(path, {key: value for key, value in raw.items() if value != "out"})


def change_target(folder: Path) -> None:
    state = torch.load(folder / "tms.pth", weights_only=True)
    state["linear2.bias"] += 1e-3
    torch.save(state, folder / "tms.pth")


class Harmful:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("was run",))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda d: (d / "final_config.yaml").unlink(), "holds a target of the pub"),
    "only a target": (
        lambda d: [(d / n).unlink() for n in ("final_config.yaml", "model_40.pth")],
        "holds a target of the published code and no decomposition",
    ),
    "no state": (lambda d: (d / "model_40.pth").unlink(), "its decomposition was not saved"),
    "no target": (lambda d: (d / "tms.pth").unlink(), "whose tms.pth is missing"),
    "no training": (
        lambda d: (d / "tms_train_config.yaml").unlink(),
        "tms_train_config.yaml is mi",
    ),
    "neither": (
        lambda d: [(d / n).unlink() for n in ("tms.pth", "tms_train_config.yaml")],
        "names no Hugging Face model",
    ),
    "a later format": (lambda d: config_with(d, n_ci_mlp_neurons="out"), "later ones are not read"),
    "a state of a target": (
        lambda d: shutil.copy(d / "tms.pth", d / "model_40.pth"),
        "not the state dict of a published decomposition",
    ),
    "cut short": (
        lambda d: (d / "model_40.pth").write_bytes((d / "model_40.pth").read_bytes()[:900]),
        "cannot be read",
    ),
    "a pickle": (lambda d: torch.save(Harmful(), d / "model_40.pth"), "cannot be read"),
    "no tensors": (
        lambda d: torch.save([1, 2], d / "model_40.pth"),
        "a list that is no state dict",
    ),
    "a module less": (
        lambda d: state_without(d, "components.linear2"),
        "its subcomponents are those",
    ),
    "a gate less": (
        lambda d: state_without(d, "gates.linear1.out_bias"),
        "out_bias here is missing",
    ),
    "another C": (lambda d: config_with(d, C=9), "has the shape"),
    "another target": (change_target, "linear2.bias differs from the target's by up to 0.001"),
    "a new loss": (lambda d: config_with(d, local_coeff=1.0), "local_coeff: 1.0; local is no loss"),
    "other sites": (
        lambda d: config_with(d, target_module_patterns=["linear3"]),
        "matches no module",
    ),
    "an odd value": (lambda d: config_with(d, lr=-1.0), "lr: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_or_partial_is_one_message(tmp_path: Path, output: Path, what: str):
    spoil, message = WRONG[what]
    write_tms(tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    with pytest.raises(UserError, match=message) as refused:
        import_published(tmp_path / "theirs", QUICK)
    assert str(tmp_path / "theirs") in str(refused.value) or what == "other sites"
    assert not list(output.rglob("meta.json")), "nothing was written"


def test_what_is_no_published_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such directory; spd-import reads"):
        import_published(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; spd-import reads"):
        import_published(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is empty"):
        import_published(tmp_path / "empty")
    write_tms(tmp_path / "theirs")
    ours = import_published(tmp_path / "theirs", QUICK)
    with pytest.raises(UserError, match="is a run of this package already"):
        import_published(ours)
    with pytest.raises(UserError, match="something else than a run"):
        import_published(tmp_path / "theirs", QUICK, run_dir=ours)


def test_a_published_configuration_names_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_tms(tmp_path / "theirs")
    path = tmp_path / "theirs" / "final_config.yaml"
    with pytest.raises(SystemExit) as ended:
        registry.main([str(path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a configuration of the published implementation" in line and "spd-import DIR" in line
    with pytest.raises(UserError, match="spd-import DIR"):
        checked_config(str(path))


def test_a_language_model(tmp_path: Path):
    """Named as on the hub, here by a directory; the text of the run is named anew."""
    model = little_llama()
    save_model(tmp_path / "model", model, make_tokenizer(lowercase=False))
    text = tmp_path / "stories.txt"
    text.write_text("<end>".join(stories(20, seed=1)), encoding="utf-8")
    theirs, C, path = tmp_path / "theirs", 6, "model.embed_tokens"
    theirs.mkdir()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["components.model-embed_tokens.A"] = drawn(200, C, seed=0)
    state["components.model-embed_tokens.B"] = drawn(C, 16, seed=1)
    gate = gates(C, 0, seed=2)
    state |= {f"gates.model-embed_tokens.{name}": tensor for name, tensor in gate.items()}
    torch.save(state, theirs / "model_5.pth")
    config = {
        **{**COEFFS, "stochastic_recon_coeff": None, "embedding_recon_coeff": 1.0, "C": C},
        **{"is_embed_unembed_recon": True, "target_module_patterns": [path]},
        **{"n_ci_mlp_neurons": 0, "batch_size": 2, "lr": 1e-4, "lr_warmup_pct": 0.01},
        "pretrained_model_name_hf": str(tmp_path / "model"),
    }
    write_yaml(theirs / "final_config.yaml", config)
    data = f"{{source: {text}, separator: <end>, eval_frac: 0.3, context_length: 16}}"
    ours = import_published(theirs, [*QUICK, f"data={data}", "n_report_batches=1"])
    run = load_run(ours)
    losses = run.config.losses
    assert losses["embedding_recon"].unembed == "lm_head" and "stochastic_recon" not in losses
    assert run.config.lr_schedule.warmup_frac == 0.01
    ids = torch.arange(12).reshape(2, 6)
    h = state["components.model-embed_tokens.A"][ids]
    z = h * gate["weight"] + gate["bias"]
    g = torch.where(z > 1, 1.0, torch.where(z > 0, z, 0.01 * z))
    assert torch.allclose(run.model.importances(ids).lower[path], g, atol=1e-6)
    masked = (h * g) @ state["components.model-embed_tokens.B"]
    with torch.no_grad():
        expected = model(inputs_embeds=masked).logits
        assert_close(run.model(ids, {path: g}), expected)


def test_the_coefficients_of_labels(tmp_path: Path):
    from spd.experiments.resid_mlp.train_resid_mlp import ResidMLPTrainConfig

    sizes = {"n_features": 2, "d_embed": 4, "d_mlp": 2, "n_layers": 1}
    raw = {"model": sizes, "steps": 1, "batch_size": 1, "lr": 1.0}
    config = ResidMLPTrainConfig.model_validate({**raw, "labels": {"coeffs": [1.5, 2]}})
    assert label_coefficients(config.labels, 2).tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match="there are 2 features"):
        ResidMLPTrainConfig.model_validate({**raw, "labels": {"coeffs": [1.5]}})
    with pytest.raises(ValueError, match="one of them must be null"):
        ResidMLPTrainConfig.model_validate({**raw, "labels": {"coeffs": [1, 2], "coeff_seed": 0}})
