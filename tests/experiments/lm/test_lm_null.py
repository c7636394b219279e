"""`null: true` of language models: as their training, or the library, begins with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spd.config import UserError, parse
from spd.experiments.lm.lm_decomposition import LMConfig, build
from spd.experiments.lm.loading import initialised_anew
from spd.experiments.lm.train_lm import (
    LM_TARGET,
    LMTrainConfig,
    initial_model,
    train_tokenizer,
)
from spd.experiments.targets import cached_target
from spd.runs.run import load_run, start
from tests.experiments.lm.test_lm_loading import load
from tests.lm_stand_ins import little_llama, make_tokenizer, save_model, stories

pytestmark = pytest.mark.undrawn

CPU = torch.device("cpu")
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def test_a_model_of_the_hub_is_initialised_anew(tmp_path: Path):
    """The class, sizes, ties and tokenizer are its own; the weights are not, and always the same."""
    llama = save_model(tmp_path / "llama", little_llama(tie_word_embeddings=True), make_tokenizer())
    trained, null, again = load(llama), load(llama, null=True), load(llama, null=True)
    weights = [loaded.model.get_parameter(QUERY) for loaded in (trained, null, again)]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert weights[1].std() == pytest.approx(0.02, rel=0.2), "the library's initialisation"
    inner = null.model.inner
    assert type(inner) is type(trained.model.inner)
    assert inner.get_parameter("lm_head.weight") is inner.get_parameter("model.embed_tokens.weight")
    assert not any(p.requires_grad for p in null.model.parameters())
    assert null.tokenizer is not None and null.origin == trained.origin


def test_what_is_no_model_of_transformers_cannot_be():
    with pytest.raises(UserError, match="null: a Linear cannot be initialised anew"):
        initialised_anew(nn.Linear(2, 2))


def test_a_target_that_is_trained_here_is_as_its_training_begins_and_lies_in_the_run(
    tmp_path: Path,
):
    text = tmp_path / "stories.txt"
    text.write_text("<end>".join(stories(25, seed=1)), encoding="utf-8")
    data = {"source": str(text), "separator": "<end>", "eval_frac": 0.2, "context_length": 16}
    raw = {
        **{"data": {**data, "lowercase": True}, "vocab_size": 280, "steps": 1, "batch_size": 16},
        "model": {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_model": 16, "d_mlp": 32},
    }
    training = parse(LMTrainConfig, {**raw, "lr": 1e-2}, "test")
    directory, _ = cached_target("stories", training, LM_TARGET, device=CPU)
    settings: dict[str, Any] = {
        **{"experiment": "little", "target": str(directory), "sites": {"model.embed_tokens": 3}},
        **{"losses": {"stochastic_recon": {"coeff": 1.0}}, "importance": {"type": "affine"}},
        **{"steps": 1, "lr": 1e-3, "batch_size": 2, "eval_batch_size": 2, "n_eval_batches": 1},
        **{"null": True, "n_report_batches": 1, "execution": {"compile": False}, "device": "cpu"},
    }
    run = load_run(start(parse(LMConfig, settings, "test"), build, directory=tmp_path / "run"))
    expected = initial_model(training, train_tokenizer(stories(20, seed=1), training))
    target = run.problem.target
    assert torch.equal(target.get_parameter(QUERY), expected.get_parameter(QUERY))
    assert run.config.null
