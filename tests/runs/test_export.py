"""What `spd.export` writes is loaded by those who know nothing of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import spd
from spd.component_model import ComponentModel
from spd.config import UserError
from spd.experiments.lm.model import TokenModel
from tests.toy import Logits, decompose

pytestmark = pytest.mark.undrawn

IDS = torch.arange(2, 14).reshape(2, 6)
SMALL: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **changes))


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (llama, ["*up_proj", "*q_proj"]),
    "llama, tied, embedding": (lambda: llama(tie_word_embeddings=True), ["*embed_tokens"]),
    "llama, tied, head": (lambda: llama(tie_word_embeddings=True), ["lm_head", "*down_proj"]),
    "llama, tied, both": (
        lambda: llama(tie_word_embeddings=True),
        ["*embed_tokens", "lm_head"],
    ),
    "llama, tied, neither": (lambda: llama(tie_word_embeddings=True), ["*down_proj"]),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2)),
        ["*mlp.c_fc", "*.wpe"],
    ),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**SMALL)), ["*embed_tokens", "*o_proj"]),
    "falcon": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        ),
        ["*dense_h_to_4h"],
    ),
}


def made(kind: str, wrapped: bool = False) -> ComponentModel:
    torch.manual_seed(0)
    build, patterns = MODELS[kind]
    inner = build().eval()
    target = Logits(inner) if wrapped else TokenModel(inner, "logits")
    prefix = "inner." if wrapped else ""
    model = decompose(target, {(p if p[0] == "*" else prefix + p): 9 for p in patterns})
    with torch.no_grad():
        for parameter in model.subcomponent_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def logits(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM
    loaded, report = model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return loaded.eval()(IDS).logits


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "in a module of the user"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_hugging_face_model(kind: str, wrapped: bool, tmp_path: Path):
    model = made(kind, wrapped)
    with torch.no_grad():
        target = model.target(IDS)
        assert torch.equal(logits(spd.export(model, tmp_path / "target")), target)
        expected = model(IDS)
        assert (expected - target).abs().max() > 1e-3
        found = logits(spd.export(model, tmp_path / "sum", "sum"))
        modes = {path.stat().st_mode for path in (tmp_path / "sum").iterdir()}
        assert len(modes) == 1, "weights may be read by whoever may read the rest"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        m = {path: torch.linspace(0, 2, site.C) for path, site in model.sites.items()}
        edited = logits(spd.export(model, tmp_path / "edited", "edited", edits=m))
        ones = {path: spd.SiteMask(v.expand(*IDS.shape, -1)) for path, v in m.items()}
        deltas = {
            path: mask._replace(delta=torch.ones(IDS.shape[1:] if "wpe" in path else IDS.shape))
            for path, mask in ones.items()
        }
        deltas = {
            path: mask._replace(components=m[path]) if "wpe" in path else mask
            for path, mask in deltas.items()
        }
        torch.testing.assert_close(edited, model(IDS, deltas), rtol=1e-4, atol=1e-5)
        assert torch.equal(model.target(IDS), target), "the model itself is left as it was"
        assert torch.equal(logits(spd.export(model, tmp_path / "again")), target)


@pytest.mark.parametrize("kind", ["llama", "llama, tied, embedding", "gemma"])
def test_the_models_own_save_pretrained_writes_the_target(kind: str, tmp_path: Path):
    model = made(kind)
    with torch.no_grad():
        before = model.target(IDS)
    model.target.inner.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert torch.equal(logits(tmp_path), before)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_other_module_as_its_state(tmp_path: Path, dtype: torch.dtype):
    batch = torch.rand(5, 4, dtype=dtype)
    original = mlp().to(dtype)
    model = decompose(mlp().to(dtype), {"0": 9})

    def loaded(folder: Path) -> Tensor:
        module = mlp().to(dtype)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return module(batch)

    with torch.no_grad():
        assert torch.equal(loaded(spd.export(model, tmp_path / "a")), original(batch))
        tolerance: Any = {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else {}
        found = loaded(spd.export(model, tmp_path / "b", "sum"))
        torch.testing.assert_close(found.float(), model(batch), **tolerance)
        same = spd.export(model, tmp_path / "c", "edited", edits={"0": 1.0})
        torch.testing.assert_close(loaded(same), original(batch), **tolerance)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"what": "sums"}, "what: 'sums' is unknown; did you mean 'sum'.*target, sum, edited"),
        ({"what": "edited"}, "edits: needed for what='edited'"),
        ({"what": "sum", "edits": {"0": 0.0}}, "edits: no part of what='sum'"),
        ({"what": "edited", "edits": {"1": 0.0}}, "edits: '1' is no site.*sites: 0"),
        (
            {"what": "edited", "edits": {"0": torch.ones(8)}},
            r"that of '0' has the shape \(8,\).*\(9,\)",
        ),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(options: Any, said: str, tmp_path: Path):
    model = decompose(mlp(), {"0": 9})
    with pytest.raises(UserError, match=said):
        spd.export(model, tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_target_was_decomposed_again_is_refused(tmp_path: Path):
    target = mlp()
    first = decompose(target, {"0": 9})
    decompose(target, {"0": 9})
    with pytest.raises(UserError, match="decomposed again since"):
        spd.export(first, tmp_path / "new", "sum")
    assert not list(tmp_path.iterdir())


def test_one_parameter_has_one_value(tmp_path: Path):
    """Where two modules share it and one is changed, a state would hold both values."""
    target = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    target[2].weight = target[0].weight
    model = decompose(target, {"0": 9})
    assert spd.export(model, tmp_path / "same").is_dir()
    with pytest.raises(UserError, match=r"0\.weight and 2\.weight are one parameter"):
        spd.export(model, tmp_path / "new", "sum")
    assert not (tmp_path / "new").exists()


def test_a_path_is_no_model(tmp_path: Path):
    given: Any = str(tmp_path)
    with pytest.raises(UserError, match="source: str; what decompose or load_run gave"):
        spd.export(given, tmp_path / "new")


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path):
    (tmp_path / "mine").write_text("1")
    with pytest.raises(UserError, match="not empty"):
        spd.export(decompose(mlp(), {"0": 9}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
