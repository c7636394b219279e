"""A small Llama with its own tokenizer: trained, saved in Hugging Face format, found again."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd.config import UserError, load_config, parse
from spd.experiments.lm.data.text import load_text
from spd.experiments.lm.train_lm import (
    LM_TARGET,
    LMTrainConfig,
    initial_model,
    is_trained_here,
    mean_cross_entropy,
    n_parameters,
    summary,
    train_tokenizer,
)
from spd.experiments.targets import cached_target, target_cli
from spd.settings import PACKAGE_DIR
from tests.lm_stand_ins import stories

PYDOC_TARGET = PACKAGE_DIR / "experiments" / "lm" / "pydoc_target.yaml"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """Twenty stories to train on; a story's words are drawn from twenty."""
    path = tmp_path / "stories.txt"
    path.write_text("<end>".join(stories(25, seed=1)), encoding="utf-8")
    return {
        "data": {
            **{"source": str(path), "separator": "<end>", "eval_frac": 0.2, "context_length": 16},
            "lowercase": True,
        },
        "vocab_size": 280,
        "model": {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_model": 16, "d_mlp": 32},
        **{"steps": 60, "batch_size": 16, "lr": 1e-2},
    }


def config(raw: dict[str, Any], **changes: Any) -> LMTrainConfig:
    return parse(LMTrainConfig, {**raw, **changes}, "test")


SIZES = {"n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "d_model": 16, "d_mlp": 24}


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_of_a_model_are_known_before_it_is_made(raw: dict[str, Any], tied: bool):
    training = config(raw, model={**SIZES, "tied_embeddings": tied})
    tokenizer = train_tokenizer(stories(25, seed=1), training)
    model = initial_model(training, tokenizer)
    assert sum(p.numel() for p in model.parameters()) == n_parameters(training)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch_size=1e11", r"batch_size: a step on 100000000000 sequences of 64 tokens needs"),
        ("model.d_mlp=10000000", r"model: a Llama of \d+ parameters needs at least .*GB of memory"),
        ("model.n_layers=1000", "batch_size: a step on 32 sequences of 64 tokens needs at least 8"),
        ("data.context_length=1000000", "batch_size: a step on 32 sequences of 1000000 tokens"),
        ("steps=1e15", "steps: .*less than or equal to"),
    ],
)
def test_a_training_that_does_not_fit_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    override: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("spd.config.memory.free_memory", lambda device: 2 * 10**9)
    assert target_cli(LM_TARGET, [str(PYDOC_TARGET), override]) == 2
    err = capsys.readouterr().err
    assert re.search(f"^error: .*{said}", err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_trained_target_is_a_hugging_face_directory(raw: dict[str, Any]):
    training = config(raw)
    directory, trained = cached_target("stories", training, LM_TARGET, device=CPU)
    assert trained and is_trained_here(directory)
    record = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    assert record["held_out_cross_entropy"] < record["held_out_unigram_entropy"] < math.log(280)
    assert record["held_out_perplexity"] == pytest.approx(
        math.exp(record["held_out_cross_entropy"])
    )

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    held_out: Any = load_text(training.data).held_out
    ids = [
        i
        for row in held_out
        for i in [*tokenizer(row["text"].lower())["input_ids"], tokenizer.eos_token_id]
    ]
    n = len(ids) // 16
    sequences = torch.tensor(ids[: 16 * n], dtype=torch.int32).reshape(n, 16).numpy()
    assert record["n_held_out_tokens"] == 16 * n
    assert record["held_out_cross_entropy"] == pytest.approx(
        mean_cross_entropy(model.eval(), sequences), rel=1e-5
    )
    text = "the cat sat on a big house."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    again, trained = cached_target("stories", training, LM_TARGET, device=CPU)
    assert again == directory and not trained


def test_the_same_seed_gives_the_same_weights(raw: dict[str, Any]):
    weights = [LM_TARGET.train(config(raw, steps=3, seed=seed), CPU).weights for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_tied_embeddings_are_one_matrix(raw: dict[str, Any]):
    size = {**raw["model"], "tied_embeddings": True}
    directory, _ = cached_target("t", config(raw, model=size, steps=2), LM_TARGET, device=CPU)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_command_prints_the_perplexity(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "target.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert target_cli(LM_TARGET, [str(path), "steps=2"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    (record,) = (tmp_path / "out" / "targets").glob("*/training.json")
    assert first == summary(json.loads(record.read_text(encoding="utf-8")))
    assert "held-out perplexity" in first and last.startswith("trained in")


def test_the_tokenizer_sees_training_documents_alone(raw: dict[str, Any]):
    texts = ["zzzz zzzz " * 20]
    tokenizer = train_tokenizer(texts, config(raw, vocab_size=258))
    assert "zzzz" in tokenizer.get_vocab() or "zz" in tokenizer.get_vocab()
    with pytest.raises(UserError, match="vocab_size: the text gives only"):
        train_tokenizer(texts, config(raw, vocab_size=5000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "vocab_size"),
        (
            {"model": {"n_layers": 1, "n_heads": 3, "n_kv_heads": 1, "d_model": 16, "d_mlp": 8}},
            "mult",
        ),
        (
            {"data": {"source": "a/b", "eval_split": "t", "context_length": 8, "streaming": True}},
            "str",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(raw: dict[str, Any], changes: Any, message: str):
    with pytest.raises(UserError, match=message):
        config(raw, **changes)


def test_the_default_text_is_in_every_python():
    training = load_config(LMTrainConfig, PYDOC_TARGET)
    assert training.data.source == "pydoc" and training.data.eval_split is None
