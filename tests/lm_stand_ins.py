"""Stand-ins on disk for what the hub holds: a model, its tokenizer and a data set, laid out as there."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = (
    *("the", "a", "little", "big", "cat", "dog", "girl", "boy", "sat", "ran", "saw", "found"),
    *("in", "on", "to", "and", "sun", "moon", "tree", "house"),
)


def stories(n: int, *, seed: int, n_words: int = 200) -> list[str]:
    """Texts of capitalised sentences, no two alike."""
    draw = random.Random(seed)
    texts = []
    for _ in range(n):
        sentences = [
            " ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(n_words // 8)
        ]
        texts.append(" ".join(sentences))
    return texts


def make_tokenizer(*, lowercase: bool = True, end: str | None = "[EOS]") -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of the stories' words; without capitals it does not know them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if not lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    special = ["[UNK]", *([end] if end else [])]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    texts = [text.lower() for text in stories(40, seed=0)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token=end)


def save_model(directory: Path, model: PreTrainedModel, tokenizer: Any = None) -> Path:
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def little_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        **{"vocab_size": 200, "hidden_size": 16, "intermediate_size": 24},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 64},
    }
    return LlamaForCausalLM(LlamaConfig(**{**size, **changes}))


def simple_stories_llama() -> LlamaForCausalLM:
    """Of the shape of SimpleStories-1.25M."""
    return little_llama(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=341,
        num_hidden_layers=4,
        max_position_embeddings=512,
    )


def tiny_stories_neo() -> GPTNeoForCausalLM:
    """Of the shape of TinyStories-1M, with fewer words."""
    torch.manual_seed(0)
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=1000,
            hidden_size=64,
            num_layers=8,
            num_heads=16,
            attention_types=[[["global", "local"], 4]],
            max_position_embeddings=2048,
        )
    )


def save_data_set(
    directory: Path, splits: Mapping[str, Sequence[str]], *, column: str, n_shards: int = 1
) -> Path:
    """Parquet files as the hub lays them out: data/<split>-00000-of-00002.parquet, …"""
    for split, texts in splits.items():
        table = datasets.Dataset.from_dict(
            {column: list(texts), "topic": [f"topic {i}" for i in range(len(texts))]}
        )
        for i in range(n_shards):
            path = directory / "data" / f"{split}-{i:05d}-of-{n_shards:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.shard(n_shards, i).to_parquet(path)
    return directory
