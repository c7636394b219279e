"""Targets from the hub, from disk and from any class: what is loaded, and what is refused in words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

from spd.component_model import ComponentModel
from spd.config import Unreachable, UserError
from spd.experiments.lm.loading import (
    LoadedTarget,
    Wanted,
    load_lm,
    save_copy,
)
from spd.importance import AffineImportanceConfig
from spd.runs.wandb_run import WandbRun, download_run
from tests.lm_stand_ins import little_llama, make_tokenizer, save_model
from tests.wandb_stand_ins import FakeApi, FakeRun

CPU = torch.device("cpu")
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "little-llama"
    return save_model(folder, little_llama(tie_word_embeddings=True), make_tokenizer())


def wanted(target: Path | str, **changes: Any) -> Wanted:
    values: dict[str, Any] = {
        **{"target": str(target), "revision": None, "output": "logits", "dtype": "float32"},
        **{"model_class": "transformers.AutoModelForCausalLM", "tokenizer": None},
        "needs_tokenizer": True,
    }
    return Wanted(**{**values, **changes})


def load(target: Path | str, **changes: Any) -> LoadedTarget:
    return load_lm(wanted(target, **changes), CPU, folders=())


@pytest.mark.parametrize(
    "model_class", ["transformers.AutoModelForCausalLM", "transformers.LlamaForCausalLM"]
)
def test_a_directory_is_loaded_as_it_is_and_stays_so(llama: Path, model_class: str):
    loaded = load(llama, model_class=model_class)
    model = LlamaForCausalLM.from_pretrained(llama)
    model.eval()
    expected = model(IDS).logits
    assert torch.equal(loaded.model(IDS), expected)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    assert not loaded.model.inner.training
    sites = {"lm_head": 7, "model.embed_tokens": 5, "model.layers.*.mlp.up_proj": 3}
    decomposed = ComponentModel(loaded.model, sites, AffineImportanceConfig())
    assert torch.equal(decomposed.target_forward(IDS).output, expected)
    assert (loaded.unembed, loaded.n_vocab) == ("lm_head", 200)
    assert loaded.tokenizer is not None and len(loaded.tokenizer) <= 200


@pytest.mark.parametrize("output", ["last_hidden_state", 0])
def test_an_output_by_attribute_or_index(llama: Path, output: str | int):
    loaded = load(llama, model_class="transformers.AutoModel", output=output)
    assert loaded.model(IDS).shape == (2, 6, 16)
    assert loaded.unembed is None and loaded.n_vocab == 200


def test_an_encoder(tmp_path: Path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    bert = BertForMaskedLM(config).eval()
    folder = save_model(tmp_path / "bert", bert)
    loaded = load(folder, model_class="transformers.AutoModelForMaskedLM", needs_tokenizer=False)
    assert torch.equal(loaded.model(IDS), bert(IDS).logits)
    assert loaded.unembed == "cls.predictions.decoder"
    assert loaded.tokenizer is None, "one that the library makes up is none"


class OwnModel(nn.Module, PyTorchModelHubMixin):
    """A model of one's own, which returns a tuple."""

    def __init__(self, n_vocab: int, d: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_vocab, d)
        self.out = nn.Linear(d, n_vocab)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> tuple[None, Tensor]:
        return None, self.out(self.embed(ids))


def test_a_class_of_ones_own(tmp_path: Path):
    torch.manual_seed(0)
    own = OwnModel(n_vocab=20, d=4).to(torch.bfloat16)
    own.save_pretrained(tmp_path / "own")
    path = f"{__name__}.OwnModel"
    loaded = load(tmp_path / "own", model_class=path, output=1, needs_tokenizer=False)
    assert torch.equal(loaded.model(IDS), own.float()(IDS)[1])
    assert loaded.n_vocab == 20
    with pytest.raises(UserError, match="returns no item 2; it returns a tuple of 2"):
        load(tmp_path / "own", model_class=path, output=2, needs_tokenizer=False)
    with pytest.raises(UserError, match="output: 'logits' is None; .* returns a tuple of 2"):
        load(tmp_path / "own", model_class=path, needs_tokenizer=False)


def test_a_target_of_a_run_on_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Downloaded once; the target of a run lies inside its directory, with the record of its origin."""
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    source = save_model(tmp_path / "source", little_llama(), make_tokenizer())
    loaded = load(source)
    run = tmp_path / "run-1"
    save_copy(loaded.model, loaded.tokenizer, loaded.origin, run / "target", max_megabytes=1)
    (run / "config.yaml").write_text("experiment: little\n", encoding="utf-8")
    sent = FakeRun()
    WandbRun(sent).upload(run)
    download_run("wandb:me/project/run-1", FakeApi(sent.files))
    shutil.rmtree(source)
    shutil.rmtree(run)
    again = load("wandb:me/project/run-1")
    assert torch.equal(again.model(IDS), loaded.model(IDS)) and again.tokenizer is not None
    assert again.origin.reference == str(source)
    with pytest.raises(UserError, match="wandb:me/project/run-2: W&B needs a key"):
        load("wandb:me/project/run-2")


def test_weights_of_another_precision_become_float32(tmp_path: Path):
    folder = save_model(tmp_path / "half", little_llama().to(torch.bfloat16), make_tokenizer())  # pyright: ignore
    assert {p.dtype for p in load(folder).model.parameters()} == {torch.float32}
    half = load(folder, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_class": "transformers.NoSuchModel"},
            "'transformers.NoSuchModel' cannot be imported",
        ),
        ({"model_class": "nosuchpackage.Model"}, "cannot be imported: No module named"),
        ({"model_class": "Model"}, "cannot be imported"),
        ({"model_class": "torch.nn.Linear"}, "is no class with from_pretrained"),
        (
            {"model_class": "transformers.AutoModelForTokenClassification"},
            r"has no weights for score\.bias, score\.weight",
        ),
        ({"output": "hidden"}, "output: 'hidden' is None; .* returns named outputs logits"),
        ({"output": 5}, "output: the model returns no item 5"),
        ({"tokenizer": "/no/such/tokenizer"}, "tokenizer.*/no/such/tokenizer"),
        ({"revision": "main"}, "is not on the hub, it has no revisions"),
    ],
)
def test_what_does_not_fit_a_model(llama: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load(llama, **changes)


@pytest.mark.parametrize(
    "name", ["AutoProcessor", "AutoConfig", "AutoTokenizer", "GenerationConfig", "BertTokenizer"]
)
def test_what_is_no_model_of_transformers_is_not_asked_for_one(llama: Path, name: str):
    """Some of them would ask whether to run code that lies beside the model."""
    with pytest.raises(UserError, match=f"model_class: 'transformers.{name}' is no model"):
        load(llama, model_class=f"transformers.{name}")


LEADS_AWAY: dict[str, tuple[str, Any, str]] = {
    "a way up": (
        "model.safetensors.index.json",
        {"weight_map": {"a": "../x"}},
        r"'\.\./x': the name",
    ),
    "a place": ("model.safetensors.index.json", {"weight_map": {"a": "/x"}}, "'/x': the name of a"),
    "no map": ("pytorch_model.bin.index.json", {}, "weight_map: None: the name of a file beside"),
    "a list": ("model.safetensors.index.json", [], "weight_map: None"),
    "an adapter": ("adapter_config.json", {"base_model_name_or_path": "/x"}, "an adapter, which"),
    "kernels": ("config.json", {"_attn_implementation": "me/code"}, "'me/code' is code on the hub"),
    "kernels of a part": (
        "config.json",
        {"text_config": {"attn_implementation": {"": "me/code@1:f"}}},
        "attn_implementation: 'me/code@1:f' is code on the hub",
    ),
    "kernels of experts": ("config.json", {"experts_implementation": "me/code"}, "is code on"),
    "its own code": (
        "config.json",
        {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
        "it needs code that lies beside it, which is not run",
    ),
}


@pytest.mark.parametrize(("name", "change", "said"), LEADS_AWAY.values(), ids=LEADS_AWAY)
def test_a_folder_leads_nowhere_else(
    llama: Path, tmp_path: Path, name: str, change: Any, said: str
):
    folder = Path(shutil.copytree(llama, tmp_path / "theirs"))
    mark = tmp_path / "it-was-run"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nM = C\n")
    path = folder / name
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **change} if isinstance(change, dict) else change))
    with pytest.raises(UserError, match=said):
        load(folder)
    assert not mark.exists()


def test_a_model_in_several_files_is_loaded(tmp_path: Path):
    folder = tmp_path / "parts"
    little_llama().save_pretrained(folder, max_shard_size="4KB")
    make_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    assert load(folder).n_vocab > 0


@pytest.mark.parametrize("target", ["./nothing", "/no/such/model", "a/b/c", "~/nothing"])
def test_a_directory_that_is_not_there(target: str):
    with pytest.raises(UserError, match="no such directory; expected a name on the Hugging Face"):
        load(target)


def test_a_directory_that_holds_no_model(tmp_path: Path):
    with pytest.raises(UserError, match=f"target '{tmp_path}' as .* cannot be loaded"):
        load(tmp_path)


def test_a_model_without_a_tokenizer_of_its_own(tmp_path: Path, llama: Path):
    folder = save_model(tmp_path / "bare", little_llama())
    with pytest.raises(UserError, match=f"tokenizer '{folder}': cannot be loaded"):
        load(folder)
    assert load(folder, needs_tokenizer=False).tokenizer is None
    assert load(folder, tokenizer=str(llama)).tokenizer is not None


def test_without_the_hub_the_message_names_the_experiment_that_needs_none():
    with pytest.raises(Unreachable, match="'some/model'.*pydoc_emb") as caught:
        load("some/model")
    assert "\n" not in str(caught.value)


# --- the copy in a run -----------------------------------------------------------------------------


def test_a_copy_loads_without_what_it_was_made_of(tmp_path: Path):
    source = save_model(tmp_path / "source", little_llama(), make_tokenizer())
    tokenizer = tmp_path / "tokenizer"
    make_tokenizer(end="[END]").save_pretrained(tokenizer)
    loaded = load(source, tokenizer=str(tokenizer))
    expected = loaded.model(IDS)
    model = ComponentModel(loaded.model, {"lm_head": 7}, AffineImportanceConfig())
    copy = tmp_path / "run" / "target"
    save_copy(loaded.model, loaded.tokenizer, loaded.origin, copy, max_megabytes=1)
    assert torch.equal(model.target_forward(IDS).output, expected), "the sites are back in place"
    assert model.sites["lm_head"] is loaded.model.get_submodule("lm_head")
    for folder in (source, tokenizer):
        folder.rename(folder.with_name(f"{folder.name}-gone"))
    again = load(copy, tokenizer=str(tokenizer))
    assert torch.equal(again.model(IDS), expected)
    assert again.tokenizer is not None and again.tokenizer.eos_token == "[END]"
    assert again.origin.reference == str(source)


def test_large_weights_stay_where_they_are(tmp_path: Path):
    source = save_model(tmp_path / "source", little_llama(), make_tokenizer())
    loaded = load(source)
    copy = tmp_path / "target"
    save_copy(loaded.model, loaded.tokenizer, loaded.origin, copy, max_megabytes=0)
    assert not list(copy.glob("*.safetensors"))
    assert torch.equal(load(copy).model(IDS), loaded.model(IDS))
