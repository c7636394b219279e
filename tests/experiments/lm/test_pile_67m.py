"""The configuration for a model of 67 million parameters: it starts, runs three steps and resumes.

On a random model of that shape, and on a tiny one of the same kind. The former needs 18 GB and is to run alone.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd.registry import EXPERIMENTS
from spd.settings import PACKAGE_DIR, REPO_DIR
from tests.run_fixtures import log_lines

EXPERIMENT = EXPERIMENTS["pile_67m_vpd"]
FEW = (
    *("steps=3", "batch_size=1", "eval_batch_size=1", "n_eval_batches=1", "n_report_batches=1"),
    *("log_every=1", "eval_every=3", "save_every=2", "figures={}", "device=cpu", "compile=false"),
    *("autocast=null", "tokenizer=null", "faithfulness_warmup.steps=2"),
    "metrics={usage: {}}",
)
TINY = (
    "sites={model.layers.*.self_attn.*_proj: 5, model.layers.*.mlp.*_proj: 7}",
    "importance={type: transformer, d_model: 16, n_layers: 1, n_heads: 2, d_ff: 32}",
)


def save_target(folder: Path, *, vocab: int, width: int, d_mlp: int, n_heads: int) -> Path:
    """Rotary positions, RMSNorm, an MLP of GELU neurons, tied embeddings, four layers."""
    from transformers import ArceeConfig, ArceeForCausalLM

    config = ArceeConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=d_mlp,
        num_hidden_layers=4,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        head_dim=width // n_heads,
        hidden_act="gelu",
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = ArceeForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def save_tokens(folder: Path, vocab: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for split in ("train", "validation"):
        rows = torch.randint(1, vocab, (24, 200), generator=generator).tolist()
        text = "\n".join(json.dumps({"ids": row}) for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", EXPERIMENT.module, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPO_DIR), "WANDB_MODE": "disabled"}
    environment |= {"SPD_OUT_DIR": str(folder / "out"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def starts_and_resumes(folder: Path, target: Path, data: Path, context: int, *also: str) -> Path:
    run_dir = folder / "run"
    settings = [
        *FEW,
        f"target={target}",
        f"data={{source: {data}, split: train, eval_split: validation, column: ids, tokenized: true,"
        f" streaming: true, context_length: {context}, shuffle_buffer: 4}}",
        *also,
    ]
    run(folder, str(PACKAGE_DIR / EXPERIMENT.config), *settings, "--run_dir", str(run_dir))
    (first,) = (run_dir / "checkpoints").iterdir()
    assert first.name == "00000003", "one checkpoint is kept"
    before = load_file(first / "model.safetensors")
    assert {line["step"] for line in log_lines(run_dir)} == {0, 1, 2, 3}
    last = log_lines(run_dir)[-2]
    assert {"loss/masked_recon", "loss/frequency", "grad_norm/importances"} <= last.keys()
    run(folder, "--resume", str(run_dir))
    for name, value in load_file(first / "model.safetensors").items():
        assert torch.equal(value, before[name])
    return run_dir


@pytest.mark.slow
def test_a_tiny_model_of_its_kind(tmp_path: Path):
    target = save_target(tmp_path / "target", vocab=50, width=16, d_mlp=32, n_heads=2)
    starts_and_resumes(tmp_path, target, save_tokens(tmp_path / "data", 50), 8, *TINY)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("SPD_LARGE_TESTS"), reason="SPD_LARGE_TESTS=1: needs 18 GB, to run alone"
)
def test_67_million_parameters(tmp_path: Path):
    target = save_target(tmp_path / "target", vocab=50_277, width=768, d_mlp=3072, n_heads=6)
    run_dir = starts_and_resumes(tmp_path, target, save_tokens(tmp_path / "data", 50_277), 64)
    saved = load_file(next((run_dir / "checkpoints").iterdir()) / "model.safetensors")
    assert sum(value.numel() for value in saved.values()) > 600_000_000
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 18e9, f"{peak / 1e9:.1f} GB"
