"""A run whose sites are matrices of experts, from its configuration to its report and back in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from spd.config import parse
from spd.engine.experts import experts_in
from spd.experiments.lm.lm_decomposition import LMConfig, build
from spd.runs.export import export
from spd.runs.run import load_run, resume, start
from tests.lm_stand_ins import make_tokenizer, save_model, stories

PATTERN = "model.layers.*.mlp.experts.*.down_proj"


@pytest.fixture
def mixtral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LMConfig:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    torch.manual_seed(0)
    settings = transformers.MixtralConfig(
        vocab_size=200,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    model = transformers.MixtralForCausalLM(settings)
    save_model(tmp_path / "model", model, make_tokenizer())
    (tmp_path / "stories.txt").write_text("<end>".join(stories(40, seed=1)), encoding="utf-8")
    raw = {
        "experiment": "mixtral",
        "target": str(tmp_path / "model"),
        "data": {
            **{"source": str(tmp_path / "stories.txt"), "eval_frac": 0.2, "context_length": 16},
            "separator": "<end>",
        },
        "sites": {PATTERN: 6, "model.layers.0.mlp.experts.1.gate_up_proj": 5},
        "losses": {
            "faithfulness": {"coeff": 1.0},
            "stochastic_recon": {"coeff": 1.0},
            "importance_minimality": {"coeff": 1e-3, "pnorm": 1.0},
        },
        "metrics": {"cross_entropy": {}, "sparsity": {}},
        **{"steps": 4, "batch_size": 4, "eval_batch_size": 4, "n_eval_batches": 1, "lr": 1e-3},
        **{"log_every": 1, "eval_every": 2, "save_every": 2, "execution": {"compile": False}},
    }
    return parse(LMConfig, raw, "test")


@pytest.mark.slow
def test_a_run_of_experts_is_gone_on_with_loaded_reported_and_exported(
    mixtral: LMConfig, tmp_path: Path
):
    whole = start(mixtral, build)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "00000004")
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    before = [line for line in lines if json.loads(line)["step"] < 2]
    (stopped / "metrics.jsonl").write_text("".join(before), encoding="utf-8")
    resume(LMConfig, build, stopped)
    for name in ("metrics.jsonl", "checkpoints/00000004/model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "model.layers.1.mlp.experts.3.down_proj" in page

    shutil.rmtree(tmp_path / "model")
    run = load_run(whole)
    assert len(run.model.sites) == 9 and len(experts_in(run.model.target)) == 2
    ids = torch.randint(0, 200, (2, 8))
    exported = transformers.MixtralForCausalLM.from_pretrained(export(run, tmp_path / "new"))
    torch.testing.assert_close(exported(ids).logits, run.model.target_forward(ids).output)
    copied = transformers.MixtralForCausalLM.from_pretrained(whole / "target")
    assert all(
        torch.equal(value, exported.state_dict()[name])
        for name, value in copied.state_dict().items()
    )
