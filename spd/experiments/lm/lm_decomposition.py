"""Decompose a language model of Hugging Face's `transformers` (paper, section 4).

python spd/experiments/lm/lm_decomposition.py spd/experiments/lm/pydoc_mlp_config.yaml [key=value ...]
"""

import math
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from spd.config import (
    BY_TYPE,
    NAME_IS_TYPE,
    UserError,
    load_config,
)
from spd.experiments.lm.data.batches import (
    BatchSettings,
    TokenBatches,
    open_batches,
    write_held_out,
)
from spd.experiments.lm.data.text import TextConfig
from spd.experiments.lm.data.tokens import token_id
from spd.experiments.lm.loading import (
    Dtype,
    LoadedTarget,
    Wanted,
    load_lm,
    save_copy,
)
from spd.experiments.lm.metrics import CrossEntropyMetric
from spd.experiments.lm.problem import LMProblem, weights_without
from spd.experiments.lm.train_lm import LMTrainConfig, is_trained_here
from spd.experiments.targets import CONFIG_FILE
from spd.metrics import GeneralMetric
from spd.problem import ReconKind, copy_folder
from spd.runs.cli import cli
from spd.runs.execution import ExperimentConfig

LMMetric = GeneralMetric | CrossEntropyMetric
LMMetrics = Annotated[Mapping[str, Annotated[LMMetric, BY_TYPE]], NAME_IS_TYPE]


class LMConfig(ExperimentConfig):
    """A decomposition of a language model."""

    target: str = Field()  # pyright: ignore[reportIncompatibleVariableOverride]
    """also a name on the Hugging Face hub"""
    revision: str | None = None
    """branch, tag or commit of a target on the hub"""
    model_class: str = "transformers.AutoModelForCausalLM"
    """what loads it: any importable class with `from_pretrained`"""
    output: str | int = "logits"
    """attribute of what the model returns, or an index into it"""
    dtype: Dtype = "float32"
    """of the target's weights; subcomponents are float32 always"""
    tokenizer: str | None = None
    """None: the target's own"""
    data: TextConfig | None = None
    """None: the text that the target was trained on here, with the same documents held out"""
    recon: ReconKind = "kl"
    batch_size: int = Field(ge=1)
    eval_batch_size: int = Field(ge=1)
    """sequences"""
    n_report_batches: int = Field(default=32, ge=1)
    """held-out batches that the report is made of, those of the evaluation first, or what there is"""
    copy_target_mb: int = Field(default=1000, ge=0)
    """a target of at most so many megabytes is copied into the run, which then needs no hub"""
    null: bool = False
    """decompose the target as it is initialised, before any training, with everything else as it is;
    such a target is always copied into the run"""
    metrics: LMMetrics = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _precision(self) -> Self:
        if self.dtype != "float32" and self.execution.autocast is None:
            raise ValueError(
                f"dtype {self.dtype} needs autocast: bf16, as subcomponents are float32"
            )
        return self

    def named_code(self) -> Mapping[str, str]:
        return {"model_class": self.model_class}


def build(
    config: LMConfig,
    device: torch.device,
    *,
    target: str | Path | nn.Module | None = None,
    device_map: Any = None,
) -> LMProblem:
    """Target, tokenizer, and text to train on and held-out text.

    `target`, a place or a module, gives the model alone; `device_map` is what transformers takes.
    """
    wanted = Wanted(
        target=config.target,
        revision=config.revision,
        model_class=config.model_class,
        output=config.output,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        needs_tokenizer=config.data is None or not config.data.tokenized,
        null=config.null,
    )
    loaded = load_lm(
        wanted, device, folders=(Path(__file__).parent,), instead=target, device_map=device_map
    )
    device = loaded.device
    settings = BatchSettings(
        text=_text(config, loaded),
        tokenizer=loaded.tokenizer,
        n_vocab=loaded.n_vocab,
        seed=config.seed,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        n_eval_batches=config.n_eval_batches,
        n_report_batches=config.n_report_batches,
        device=device,
        n_choice_batches=config.n_choice_batches,
    )
    batches = open_batches(settings, loaded.origin.directory)
    excluded = _excluded(settings, batches.held_out)
    return LMProblem(
        target=loaded.model,
        train_batches=batches.train,
        eval_batches=iter(batches.held_out.split(config.eval_batch_size)),
        choice_batches=batches.choice,
        recon=config.recon,
        position_weights=partial(weights_without, excluded=excluded) if excluded else None,
        device=device,
        tokenizer=loaded.tokenizer,
        unembed=loaded.unembed,
        text=settings.text,
        n_report_batches=config.n_report_batches,
        write_target=lambda directory: _write(directory, config, loaded, batches, settings),
    )


def _excluded(settings: BatchSettings, held_out: Tensor) -> tuple[int, ...]:
    """The ids of the tokens that do not count, after checking that there are others."""
    named, tokenizer = settings.text.exclude_tokens, settings.tokenizer
    ids = []
    for token in named:
        if isinstance(token, str):
            if tokenizer is None:
                raise UserError(f"data.exclude_tokens: {token!r} needs a tokenizer; give its id")
            token = token_id(token, tokenizer, "data.exclude_tokens")
        if not 0 <= token < settings.n_vocab:
            last = settings.n_vocab - 1
            raise UserError(f"data.exclude_tokens: {token}: the target knows 0 to {last}")
        ids.append(token)
    if ids and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("data.exclude_tokens: a run of several processes counts every token")
    if ids and not weights_without(held_out, ids).any():
        raise UserError("data.exclude_tokens: nothing is left of the held-out text")
    return tuple(ids)


def _text(config: LMConfig, loaded: LoadedTarget) -> TextConfig:
    """The text to use, after checking that the target can read sequences of its length."""
    directory = loaded.origin.directory
    if config.data is not None:
        text = config.data
    elif directory is not None and is_trained_here(directory):
        text = load_config(LMTrainConfig, directory / CONFIG_FILE).data
    else:
        raise UserError(
            f"data: a value is required: target {config.target!r} was not trained here, so its text is"
            " not known"
        )
    known = getattr(loaded.model.inner, "config", None)
    longest = getattr(known, "max_position_embeddings", None)
    if isinstance(longest, int) and text.context_length > longest:
        raise UserError(
            f"data.context_length: {text.context_length} is more than the {longest} positions that the"
            " target knows"
        )
    return text


def _write(
    directory: Path,
    config: LMConfig,
    loaded: LoadedTarget,
    batches: TokenBatches,
    settings: BatchSettings,
) -> None:
    source = loaded.origin.directory
    if source is not None and is_trained_here(source):
        copy_folder(source, directory)
    else:
        save_copy(
            loaded.model,
            loaded.tokenizer,
            loaded.origin,
            directory,
            max_megabytes=math.inf if config.null else config.copy_target_mb,
        )
    write_held_out(directory, batches.held_out, settings)


if __name__ == "__main__":
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers would fill a log with them
    cli(LMConfig, build)
