"""Little language models, a tokenizer whose tokens are awkward text, and a run of one.

Also the module of an experiment: `build` and `LittleConfig` are what a run of it names.
"""

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from spd.component_model import ComponentModel
from spd.config import parse
from spd.experiments.lm.model import TokenModel
from spd.experiments.lm.problem import LMProblem
from spd.importance import AffineImportanceConfig
from spd.runs.cli import cli
from spd.runs.execution import ExperimentConfig

VOCAB, WIDTH = 40, 16
AWKWARD = ("</script><script>fail('1')</script>", "<img src=x onerror=fail('2')>", "<!--<script>")
"""tokens that would end the page's data, or run, were they not text"""
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WIDTHS: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 24, "vocab_size": VOCAB}


def little_model(kind: str) -> TokenModel:
    """An untrained model of a family, its gains and biases random as well; maps ids to logits."""
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **WIDTHS, num_key_value_heads=2)),
        "gemma": lambda: GemmaForCausalLM(
            GemmaConfig(**SHAPE, **WIDTHS, num_key_value_heads=2, head_dim=4)
        ),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, **WIDTHS)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_head=4, n_embd=WIDTH, n_positions=64, vocab_size=VOCAB)
        ),
    }
    model = made[kind]()
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.5)
    return TokenModel(model, "logits").eval()


def unembed_of(model: TokenModel) -> str:
    head = model.inner.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return next(path for path, module in model.named_modules() if module is head)


def awkward_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at spaces: three awkward ones, then letters and `word3`, `word4`, …"""
    words = [*AWKWARD, "\u2028\n", "é", '"&amp;', *(f"word{i}" for i in range(6, VOCAB - 1)), "?"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


class RandomBatches:
    """Random token ids, without end."""

    def __init__(self, seed: int, shape: tuple[int, int] = (4, 32)) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return torch.randint(VOCAB, self.shape, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def decomposed(model: nn.Module, sites: dict[str, int]) -> ComponentModel:
    """With importances that are 0 at some positions and above 0 at others."""
    return ComponentModel(model, sites, AffineImportanceConfig())


class LittleConfig(ExperimentConfig):
    n_report_batches: int = 3
    batch_size: int = 4


def build(config: LittleConfig, device: torch.device) -> LMProblem:
    """A little Llama on random tokens."""
    return LMProblem(
        target=little_model("llama").to(device),
        train_batches=RandomBatches(0, (config.batch_size, 32)),
        eval_batches=RandomBatches(1),
        recon="kl",
        device=device,
        tokenizer=awkward_tokenizer(),
        unembed="lm_head",
        n_report_batches=config.n_report_batches,
    )


def little_config(**changes: Any) -> LittleConfig:
    raw = {
        "experiment": "little",
        "sites": {"model.layers.*.mlp.*_proj": 6, "model.embed_tokens": 5},
        "losses": {"stochastic_recon": {"coeff": 1.0}},
        "importance": {"type": "affine"},
        "metrics": {"sparsity": {}},
        "steps": 2,
        "lr": 1e-3,
        "execution": {"compile": False},
        "n_eval_batches": 2,
    }
    return parse(LittleConfig, {**raw, **changes}, "test")


def made_up_data(n: int, *, texts: list[str], n_contexts: int = 12) -> dict[str, Any]:
    """What the page shows of n subcomponents in four matrices, as `page_data` gives it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(texts), (n, 64 + 25 * n_contexts), generator=generator).tolist()
    shades = torch.randint(256, (n, n_contexts, 25), generator=generator).tolist()
    rows = []
    for c in range(n):
        own = tokens[c]
        pairs = [[token, round(1 / (place + 1), 3)] for place, token in enumerate(own[:64])]
        rows.append(
            {
                "site": 4 * c // n,
                "c": c % ((n + 3) // 4),
                "mean": round((c * 7919 % n) / n, 4),
                "active": c + 1,
                "highest": 0.9,
                "agree": 0.75,
                "flipped": False,
                "reads": [pairs[:10], pairs[10:20]],
                "writes": [pairs[20:30], pairs[30:40]],
                "shares": pairs[40:50],
                "means": [[token, x, 7] for token, x in pairs[50:60]],
                "companions": [[(c + i) % n, 0.5, 0.75] for i in range(1, 9)],
                "contexts": [
                    [16, bytes(shades[c][i]).hex(), *own[64 + 25 * i : 89 + 25 * i]]
                    for i in range(n_contexts)
                ],
            }
        )
    sites = [
        {"name": f"model.layers.{i}.mlp.up_proj", "C": n, "alive": n // 4}
        | {"reads": "stream", "writes": "stream"}
        for i in range(4)
    ]
    return {
        "sites": sites,
        "left_out": [],
        "positions": 100_000,
        "across": True,
        "rows": rows,
        "tokens": texts,
    }


if __name__ == "__main__":
    cli(LittleConfig, build)
