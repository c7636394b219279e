"""A decomposition saved alone, and laid over its target again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spd import Problem, SPDConfig, decompose
from spd.component_model import ComponentModel
from spd.config import UserError, load_config
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.importance import (
    AffineImportanceConfig,
    ImportanceConfig,
    MLPImportanceConfig,
    SharedMLPImportanceConfig,
)
from spd.runs.pretrained import Decomposition
from spd.runs.run import load_run, start
from tests.run_fixtures import QUICK, TMS_CONFIG, listing, make_tms_target
from tests.toy import MLP, MLP_SITES, TiedMLP, TokenModel

pytestmark = pytest.mark.undrawn


def toy(kind: str = "plain", seed: int = 0) -> tuple[nn.Module, dict[str, int], Tensor]:
    torch.manual_seed(seed)
    if kind == "tied":
        return TiedMLP(), {"enc": 4, "dec": 4}, torch.rand(3, 5)
    if kind == "tokens":
        return TokenModel(), {"embed": 4, "mid": 3}, torch.arange(6)
    return MLP(), MLP_SITES, torch.rand(3, 4)


def trained(
    kind: str = "plain", importance: ImportanceConfig | None = None, **options: Any
) -> tuple[Decomposition, Tensor]:
    """A decomposition whose parameters are not those it starts with."""
    target, sites, batch = toy(kind)
    importance = importance or MLPImportanceConfig(n_hidden=2)
    model = ComponentModel(target, sites, importance, **options)
    with torch.no_grad():
        for parameter in model.subcomponent_parameters().values():
            parameter.normal_()
    return Decomposition.of_model(model, importance, **options), batch


def assert_same(loaded: ComponentModel, model: ComponentModel, batch: Tensor) -> None:
    outputs, importances = [], []
    for each in (loaded, model):
        target_out, inputs = each.target_forward(batch)
        ci = each.causal_importances(inputs)
        outputs += [target_out, each(batch, ci.lower)]
        importances.append(ci)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    for path, g in importances[0].lower.items():
        assert torch.equal(g, importances[1].lower[path])


@pytest.mark.parametrize(
    ("kind", "importance", "options"),
    [
        ("plain", AffineImportanceConfig(), {"lower_leak": "gradient"}),
        ("tied", MLPImportanceConfig(n_hidden=2), {"tied_sites": (("enc", "dec"),)}),
        ("tokens", SharedMLPImportanceConfig(hidden_widths=(3, 2), normalize=True), {}),
    ],
    ids=["plain", "tied", "tokens"],
)
def test_saved_and_loaded_over_a_given_target(
    kind: str, importance: ImportanceConfig, options: dict[str, Any], tmp_path: Path
):
    decomposition, batch = trained(kind, importance, **options)
    decomposition.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == decomposition.model.subcomponent_parameters().keys(), "no target in it"
    loaded = Decomposition.from_pretrained(tmp_path / "saved", target=toy(kind)[0])
    assert_same(loaded.model, decomposition.model, batch)
    assert loaded.layout == decomposition.layout
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_of_a_run_over_a_target_made_as_the_run_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    target = make_tms_target(tmp_path / "target")
    config = load_config(TMSConfig, TMS_CONFIG, [*QUICK, f"target={target}", "steps=2"])
    directory = start(config, build)
    run = load_run(directory)
    Decomposition.of(directory).save_pretrained(tmp_path / "saved")
    batch = torch.rand(4, 5)
    assert_same(Decomposition.of(run).model, run.model, batch)
    assert_same(Decomposition.from_pretrained(directory).model, run.model, batch)
    shutil.rmtree(tmp_path / "out")  # neither the run nor its target is needed any more
    shutil.rmtree(target)
    loaded = Decomposition.from_pretrained(str(tmp_path / "saved"))
    assert_same(loaded.model, run.model, torch.rand(4, 5))
    loaded.save_pretrained(tmp_path / "again")
    assert listing(tmp_path / "again") == listing(tmp_path / "saved")


LOADED_ELSEWHERE = """
import json, sys, torch
from spd.runs.pretrained import Decomposition
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
model = Decomposition.from_pretrained(sys.argv[1]).model
x = torch.linspace(0, 1, 20).reshape(4, 5)
g = model.importances(x).lower
print(json.dumps([model(x, {}).tolist(), model(x, g).tolist(), g["linear1"].tolist()]))
"""


@pytest.mark.slow
def test_moved_to_a_machine_with_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The target was trained here from a YAML; there it is not trained again."""
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    training = tmp_path / "quick_target.yaml"
    text = (TMS_CONFIG.parent / "tms_5-2_target.yaml").read_text(encoding="utf-8")
    changed = {
        "steps: 10000": "steps: 300",
        "lr: 5e-3": "lr: 3e-2",
        "batch_size: 1024": "batch_size: 256",
    }
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    training.write_text(text, encoding="utf-8")
    config = load_config(TMSConfig, TMS_CONFIG, [*QUICK, f"target={training}", "steps=2"])
    run = load_run(start(config, build))
    Decomposition.of(run).save_pretrained(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "saved").rename(tmp_path / "elsewhere/moved")
    shutil.rmtree(tmp_path / "out")
    training.unlink()
    environment = {
        **os.environ,
        **{"ATEN_CPU_CAPABILITY": "default", "SPD_OUT_DIR": str(tmp_path / "other")},
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, str(moved)],
        **{"cwd": tmp_path / "elsewhere", "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    x = torch.linspace(0, 1, 20).reshape(4, 5)
    g = run.model.importances(x).lower
    expected = [run.model(x, {}), run.model(x, g), g["linear1"]]
    for found, own in zip(json.loads(done.stdout), expected, strict=True):
        assert torch.allclose(torch.tensor(found), own, atol=1e-6)
    assert not (tmp_path / "other").exists(), "nothing was made there"


def test_a_target_that_differs_by_rounding_is_said_and_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    decomposition, batch = trained()
    decomposition.save_pretrained(tmp_path)
    off = 1e-5

    def rounded(by: float) -> nn.Module:
        target = toy()[0]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in target.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += by * parameter.norm() * noise / noise.norm()
        return target

    loaded = Decomposition.from_pretrained(tmp_path, target=rounded(off))
    (said,) = [r.getMessage() for r in caplog.records if "of their norm" in r.getMessage()]
    found = float(re.findall(r"about (\S+) of their norm", said)[0])
    assert off / 2 < found < 2 * off
    g = decomposition.model.importances(batch).lower
    for path, own in loaded.model.importances(batch).lower.items():
        assert torch.allclose(own, g[path], atol=1e-3)
    with pytest.raises(UserError, match="by about 0.* of their norm; up to 0.01 is rounding"):
        Decomposition.from_pretrained(tmp_path, target=rounded(0.2))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "sketches": None}))
    with pytest.raises(UserError, match="others than those that were decomposed$"):
        Decomposition.from_pretrained(tmp_path, target=rounded(off))


def test_the_model_card_has_figures_and_says_how_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    target = make_tms_target(tmp_path / "target")
    options = [
        f"target={target}",
        "steps=2",
        "metrics={sparsity: {}, column_match: {site: linear1}}",
    ]
    run = load_run(start(load_config(TMSConfig, TMS_CONFIG, [*QUICK, *options]), build))
    Decomposition.of(run).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text(encoding="utf-8")
    assert "stochastic-parameter-decomposition" in card.split("---")[1]
    assert "# Decomposition: tms_5-2, seed 0, 2 steps" in card
    C = run.model.sites["linear1"].C
    assert f"| `linear1` | 5 | 2 | {C} |" in card and "comes with it" in card
    value = run.metrics[-1]["eval/mmcs/linear1"]
    figures = Decomposition.of(run).layout.figures
    own = [figure.value for figure in figures if figure.published == "–"]
    assert any(text.startswith(f"{value:.3f}") for text in own)
    assert all(figure.label in card for figure in figures)
    assert f"{value:.3f}" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {"batch": torch.rand(2, 5)}
    exec(code.replace("user/name", str(tmp_path / "saved")), scope)
    assert scope["output"].shape == (2, 5)
    alone, _ = trained()
    alone.save_pretrained(tmp_path / "alone")
    assert "target=module" in (tmp_path / "alone/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_of_what_decompose_returned(tmp_path: Path, kind: str):
    target, sites, batch = toy(kind)
    losses = {"faithfulness": {"coeff": 1.0}, "importance_minimality": {"coeff": 1.0, "pnorm": 1.0}}
    settings = {"sites": sites, "losses": losses, "steps": 2, "lr": 0.1, "lower_leak": "gradient"}
    ties = (("enc", "dec"),) if kind == "tied" else ()
    problem = Problem(target, [batch], [batch], tied_sites=ties)
    config = SPDConfig.model_validate({**settings, "n_eval_batches": 1})
    result = decompose(problem, config, quiet=True)
    Decomposition.of(result).save_pretrained(tmp_path)
    loaded = Decomposition.from_pretrained(tmp_path, target=toy(kind)[0])
    assert_same(loaded.model, result.model, batch)


def test_another_target_is_refused(tmp_path: Path):
    decomposition, _ = trained()
    decomposition.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="others than those that were decomposed"):
        Decomposition.from_pretrained(tmp_path, target=toy(seed=1)[0])
    with pytest.raises(UserError, match="matches no module"):
        Decomposition.from_pretrained(tmp_path, target=TiedMLP())


def test_a_target_that_no_file_may_make(tmp_path: Path):
    """Neither where none is named, nor by code from elsewhere that a file names."""
    decomposition, _ = trained()
    decomposition.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no run made it; give the target"):
        Decomposition.from_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    script = tmp_path / "evil.py"
    script.write_text("raise SystemExit('was run')")
    names = {"module": str(script), "config_class": "A", "build": "b", "config": {}}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "target": names}))
    with pytest.raises(UserError, match="evil.py made its target; give the target"):
        Decomposition.from_pretrained(tmp_path)


def test_folders_that_hold_no_decomposition(tmp_path: Path):
    with pytest.raises(UserError, match="no config.json there"):
        Decomposition.from_pretrained(tmp_path)
    trained()[0].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        Decomposition.from_pretrained(tmp_path, target=toy()[0])
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "sites": {"first": 3}}))
    with pytest.raises(UserError, match="model.safetensors|fingerprint|others"):
        Decomposition.from_pretrained(tmp_path, target=toy()[0])


def test_from_the_hub_by_name(tmp_path: Path):
    """Out of the cache, where the hub's client lays files down."""
    decomposition, batch = trained()
    repo, commit = tmp_path / "models--someone--toy", "0" * 40
    decomposition.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    loaded = Decomposition.from_pretrained("someone/toy", cache_dir=tmp_path, target=toy()[0])
    assert_same(loaded.model, decomposition.model, batch)


def test_pushed_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What would travel is what `save_pretrained` writes."""
    decomposition, batch = trained()
    calls: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, **_: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        calls[repo_id] = shutil.copytree(folder_path, tmp_path / "pushed")
        return "url"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert decomposition.push_to_hub("someone/toy") == "url"
    loaded = Decomposition.from_pretrained(calls["someone/toy"], target=toy()[0])
    assert_same(loaded.model, decomposition.model, batch)
