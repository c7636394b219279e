"""The configuration for a model of 67 million parameters: it starts, runs three steps and resumes.

On a random model of that shape, which needs 18 GB and is to run alone, and on a tiny one of the same kind.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd.registry import EXPERIMENTS
from spd.settings import PACKAGE_DIR, REPO_DIR
from tests.run_fixtures import log_lines

EXPERIMENT = EXPERIMENTS["pile_67m_vpd"]
FEW = (
    *("batch_size=1", "eval_batch_size=1", "n_eval_batches=1", "n_report_batches=1"),
    *("log_every=1", "figures={}", "device=cpu", "compile=false"),
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


def begun(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", EXPERIMENT.module, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPO_DIR), "WANDB_MODE": "disabled"}
    environment |= {"SPD_OUT_DIR": str(folder / "out"), "HF_HUB_OFFLINE": "1"}
    log = (folder / "log.txt").open("a", encoding="utf-8")
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=log, stderr=log)


def steps_of(run_dir: Path) -> set[int]:
    """Those that have been logged so far."""
    if not (run_dir / "metrics.jsonl").is_file():
        return set()
    return {int(line["step"]) for line in log_lines(run_dir) if "loss/total" in line}


def starts_and_resumes(
    folder: Path, target: Path, data: Path, *, steps: int, context: int, also: tuple[str, ...] = ()
) -> Path:
    """Stopped after its second step it goes on to the end; the run directory."""
    run_dir = folder / "run"
    settings = [
        *FEW,
        *(f"target={target}", f"steps={steps}", f"eval_every={steps}", f"save_every={steps}"),
        f"data={{source: {data}, split: train, eval_split: validation, column: ids, tokenized: true,"
        f" streaming: true, context_length: {context}, shuffle_buffer: 4}}",
        *also,
    ]
    first = begun(
        folder, str(PACKAGE_DIR / EXPERIMENT.config), *settings, "--run_dir", str(run_dir)
    )
    while first.poll() is None and 1 not in steps_of(run_dir):
        time.sleep(0.05)
    first.terminate()
    assert first.wait() == 143, (folder / "log.txt").read_text(encoding="utf-8")
    (stopped,) = (run_dir / "checkpoints").iterdir()
    assert 2 <= int(stopped.name) < steps
    second = begun(folder, "--resume", str(run_dir))
    assert second.wait() == 0, (folder / "log.txt").read_text(encoding="utf-8")
    (last,) = (run_dir / "checkpoints").iterdir()
    assert int(last.name) == steps, "one is kept"
    assert steps_of(run_dir) == set(range(steps))
    trained = [line for line in log_lines(run_dir) if "loss/total" in line][-1]
    assert {"loss/masked_recon", "loss/frequency", "grad_norm/importances"} <= trained.keys()
    return run_dir


@pytest.mark.slow
def test_a_tiny_model_of_its_kind(tmp_path: Path):
    target = save_target(tmp_path / "target", vocab=50, width=16, d_mlp=32, n_heads=2)
    data = save_tokens(tmp_path / "data", 50)
    starts_and_resumes(tmp_path, target, data, steps=200, context=8, also=TINY)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("SPD_LARGE_TESTS"), reason="SPD_LARGE_TESTS=1: needs 18 GB, to run alone"
)
def test_67_million_parameters(tmp_path: Path):
    target = save_target(tmp_path / "target", vocab=50_277, width=768, d_mlp=3072, n_heads=6)
    data = save_tokens(tmp_path / "data", 50_277)
    run_dir = starts_and_resumes(tmp_path, target, data, steps=3, context=64)
    saved = load_file(next((run_dir / "checkpoints").iterdir()) / "model.safetensors")
    assert sum(value.numel() for value in saved.values()) == 543_287_296 + 124_256_256
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 18e9, f"{peak / 1e9:.1f} GB"
