"""Train a small Llama with a tokenizer of its own on any text, and keep it in Hugging Face format.

python spd/experiments/lm/train_lm.py spd/experiments/lm/pydoc_target.yaml [key=value ...]
"""

import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import datasets
import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spd.config import BaseConfig, UserError, counted, read_yaml
from spd.config.limits import MAX_WIDTH, Layers, Seed, Steps, Width
from spd.config.memory import NUMBER, TRAINED, require_memory
from spd.experiments.lm.data.text import TextConfig, load_text
from spd.experiments.lm.data.tokens import (
    PackedBatches,
    end_token_id,
    make_encode,
    packed_sequences,
)
from spd.experiments.lm.metrics import entropy_of_counts, next_token_cross_entropy
from spd.experiments.targets import (
    CONFIG_FILE,
    TargetKind,
    TrainedTarget,
    target_cli,
)
from spd.noise import derive_seed
from spd.schedule import ScheduleConfig, schedule_factor

logger = logging.getLogger(__name__)

END_TOKEN = "<|end|>"
LOG_SECONDS = 20
SEQUENCES_AT_ONCE = 64


class LlamaSize(BaseConfig):
    """The size of a Llama; its feed-forward layers are gated."""

    n_layers: Layers
    n_heads: Width
    n_kv_heads: Width
    d_model: int = Field(ge=2, le=MAX_WIDTH)
    d_mlp: Width
    tied_embeddings: bool = False

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d_model % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of 2 · n_heads {self.n_heads}, and n_heads"
                f" one of n_kv_heads {self.n_kv_heads}"
            )
        return self


class LMTrainConfig(BaseConfig):
    """Training of a Llama to predict the next token."""

    kind: Literal["lm"] = "lm"
    data: TextConfig
    vocab_size: int = Field(ge=257, le=MAX_WIDTH)
    """of the byte-level BPE tokenizer that is trained on the training documents"""
    model: LlamaSize
    seed: Seed = 0
    steps: Steps
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0.0, allow_inf_nan=False)
    lr_schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    clip_grad_norm: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _text(self) -> Self:
        if self.data.tokenized or self.data.streaming:
            raise ValueError("data: a tokenizer is trained on text that is at hand, not streamed")
        if self.data.exclude_tokens:
            raise ValueError("data.exclude_tokens: a target is trained on every token")
        return self


def n_parameters(config: LMTrainConfig) -> int:
    """Of the model that is to be trained."""
    size, d = config.model, config.model.d_model
    attention = 2 * d * d + 2 * d * (d // size.n_heads) * size.n_kv_heads
    layer = attention + 3 * d * size.d_mlp + 2 * d
    embeddings = config.vocab_size * d * (1 if size.tied_embeddings else 2)
    return embeddings + size.n_layers * layer + d


def check_size(config: LMTrainConfig, device: torch.device) -> None:
    """`UserError` where the model, or what a step keeps for its gradients, would not fit into memory."""
    n, size = n_parameters(config), config.model
    require_memory(TRAINED * n, f"model: a Llama of {n} parameters needs", device)
    length = config.data.context_length
    each = config.vocab_size + size.n_layers * (3 * size.d_mlp + 4 * size.d_model)
    what = f"batch_size: a step on {config.batch_size} sequences of {length} tokens needs"
    require_memory(NUMBER * config.batch_size * length * each, what, device)


def train(config: LMTrainConfig, device: torch.device) -> TrainedTarget:
    """A trained model, its tokenizer, and how well it predicts the held-out documents."""
    return _made(config, device, fit=True)


def untrained(config: LMTrainConfig, device: torch.device) -> TrainedTarget:
    """The same before its training."""
    target = _made(config, device, fit=False)
    return target._replace(record={**target.record, "untrained": True})


def _made(config: LMTrainConfig, device: torch.device, *, fit: bool) -> TrainedTarget:
    start = time.perf_counter()
    text = load_text(config.data)
    assert isinstance(text.train, datasets.Dataset), "validated: the text is not streamed"
    tokenizer = train_tokenizer([row for row in text.train[config.data.column] if row], config)
    encode = make_encode(config.data, tokenizer)
    train_ids, held_out = (
        packed_sequences(documents, encode, config.data, tokenizer=tokenizer, label=label)
        for documents, label in ((text.train, "train"), (text.held_out, "held-out"))
    )
    model = initial_model(config, tokenizer)
    model.to(device)  # pyright: ignore[reportArgumentType] - a decorator there hides the signature
    batches = PackedBatches(
        train_ids,
        batch_size=config.batch_size,
        seed=config.seed,
        stream="target train",
        device=device,
    )
    if fit:
        _fit(model, batches, config)
    else:
        model.eval()
    record = {
        "seconds": round(time.perf_counter() - start, 1),
        "device": str(device),
        "torch": torch.__version__,
        "seed": config.seed,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_train_tokens": train_ids.size,
        "n_held_out_tokens": held_out.size,
        "train_cross_entropy": mean_cross_entropy(model, train_ids[: len(held_out)]),
        "held_out_cross_entropy": mean_cross_entropy(model, held_out),
        "held_out_unigram_entropy": entropy_of_counts(
            torch.from_numpy(np.bincount(held_out[:, 1:].reshape(-1)))
        ),
    }
    record["held_out_perplexity"] = math.exp(record["held_out_cross_entropy"])
    logger.info("target: %s", summary(record))
    weights = {name: w.contiguous() for name, w in _own_weights(model).items()}
    return TrainedTarget(weights, record, _files(model, tokenizer))


def train_tokenizer(texts: Iterable[str], config: LMTrainConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens, of which the first ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole = (text.lower() if config.data.lowercase else text for text in texts)
    tokenizer.train_from_iterator(whole, trainer)
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise UserError(
            f"vocab_size: the text gives only {counted(tokenizer.get_vocab_size(), 'token')}, not"
            f" {config.vocab_size}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN
    )


def initial_model(config: LMTrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with the library's own initialisation, drawn from the seed."""
    size, end = config.model, end_token_id(tokenizer)
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_kv_heads,
        max_position_embeddings=config.data.context_length,
        tie_word_embeddings=size.tied_embeddings,
        bos_token_id=end,
        eos_token_id=end,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("lm target", config.seed))
        return LlamaForCausalLM(llama)


@torch.no_grad()
def mean_cross_entropy(model: nn.Module, sequences: Int[np.ndarray, "n length"]) -> float:
    """Mean over all predicted tokens of all sequences."""
    device = next(model.parameters()).device
    total = 0.0
    for some in _chunks(sequences):
        ids = torch.from_numpy(some.astype(np.int64)).to(device)
        total += next_token_cross_entropy(model(ids).logits, ids).sum().item()
    return total / sequences[:, 1:].size


def is_trained_here(directory: Path) -> bool:
    """Whether a target directory was made by this module."""
    path = directory / CONFIG_FILE
    return path.is_file() and read_yaml(path).get("kind") == LM_TARGET.name


def summary(record: dict[str, Any]) -> str:
    """How good a trained model is, in a line."""
    return (
        f"{record['n_parameters']:,} parameters, held-out perplexity"
        f" {record['held_out_perplexity']:.1f}: cross-entropy"
        f" {record['held_out_cross_entropy']:.3f} nats per token (training text"
        f" {record['train_cross_entropy']:.3f}), unigram entropy"
        f" {record['held_out_unigram_entropy']:.3f}"
    )


def _fit(model: LlamaForCausalLM, batches: PackedBatches, config: LMTrainConfig) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True
    )
    model.train()
    said = time.perf_counter()
    for step in tqdm(range(config.steps), desc="training the target", disable=None):
        factor = schedule_factor(config.lr_schedule, step, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        ids = next(batches)
        loss = next_token_cross_entropy(model(ids).logits, ids).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if time.perf_counter() - said > LOG_SECONDS:
            said = time.perf_counter()
            logger.info("target: step %d of %d, loss %.3f", step, config.steps, loss.item())
    model.eval()


def _own_weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights that are saved: of tied ones the first."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: w.detach().cpu() for name, w in model.state_dict().items() if name not in tied}


def _files(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """What lies beside the weights in Hugging Face format."""
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def _chunks(sequences: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(sequences), SEQUENCES_AT_ONCE):
        yield sequences[first : first + SEQUENCES_AT_ONCE]


LM_TARGET = TargetKind(
    name="lm",
    config_class=LMTrainConfig,
    train=train,
    summary=summary,
    untrained=untrained,
    check=check_size,
)


if __name__ == "__main__":
    sys.exit(target_cli(LM_TARGET))
