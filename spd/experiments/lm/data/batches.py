"""Training batches and held-out batches of token ids, from what a configuration says about text."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import datasets
import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd.config import UserError
from spd.experiments.lm.data.streaming import StreamedBatches
from spd.experiments.lm.data.text import (
    Documents,
    Text,
    TextConfig,
    load_text,
)
from spd.experiments.lm.data.tokens import (
    PackedBatches,
    begin_token,
    check_ids,
    make_encode,
    packed_sequences,
    permutation,
    tokenizer_hash,
)
from spd.problem import Resumable
from spd.run_files import forbidden, write_safetensors

logger = logging.getLogger(__name__)

HELD_OUT_FILE = "held_out.safetensors"


class BatchSettings(NamedTuple):
    """What besides the text decides on the batches."""

    text: TextConfig
    tokenizer: PreTrainedTokenizerBase | None
    n_vocab: int
    seed: int
    batch_size: int
    eval_batch_size: int
    n_eval_batches: int
    n_report_batches: int
    """the report's, which begin with those of the evaluation; fewer will do"""
    device: torch.device
    n_choice_batches: int = 0
    """by which several starts are compared; they come after those of evaluation and report"""

    @property
    def n_held_out(self) -> int:
        """Sequences that are needed."""
        return self.n_eval_batches * self.eval_batch_size

    @property
    def n_wanted(self) -> int:
        """Sequences that are kept where there are as many."""
        return max(self.n_eval_batches, self.n_report_batches) * self.eval_batch_size


class TokenBatches(NamedTuple):
    """Endless training batches, the held-out sequences, and batches of others to choose a start by."""

    train: Iterator[Tensor]
    held_out: Int[Tensor, "n length"]
    choice: Iterator[Tensor]
    """which opens the source of the text when it is asked for the first"""


def open_batches(settings: BatchSettings, kept: Path | None) -> TokenBatches:
    """The batches of a configuration; `kept` is a directory that may hold the held-out text already.

    Where it does, the source of the training text is opened only when it is asked for: whoever looks
    into a run needs no data set.
    """
    _say_begin(settings)
    held_out = read_held_out(kept, settings) if kept is not None else None
    if held_out is not None:
        late = LateBatches(lambda: _train_batches(load_text(settings.text).train, settings))
        return TokenBatches(late, held_out, _choice(lambda: load_text(settings.text), settings))
    text = load_text(settings.text)
    held_out = _held_out(text, settings)
    check_ids(held_out, settings.n_vocab)
    choice = _choice(lambda: text, settings)
    return TokenBatches(_train_batches(text.train, settings), held_out, choice)


class LateBatches:
    """Batches whose source is opened when it is first needed."""

    def __init__(self, open_source: Callable[[], Iterator[Tensor]]) -> None:
        self.open_source = open_source
        self._opened: Iterator[Tensor] | None = None

    @property
    def source(self) -> Iterator[Tensor]:
        if self._opened is None:
            self._opened = self.open_source()
        return self._opened

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        return next(self.source)

    def state_dict(self) -> dict[str, Any]:
        return self._resumable().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumable().load_state_dict(state)

    def _resumable(self) -> Resumable:
        assert isinstance(self.source, Resumable), "all token batches are"
        return self.source


def write_held_out(directory: Path, held_out: Tensor, settings: BatchSettings) -> None:
    """Keep the held-out sequences beside a run's target."""
    ids = held_out.to("cpu", torch.int32).contiguous()
    write_safetensors(directory / HELD_OUT_FILE, {"ids": ids}, {"key": _key(settings)})


def read_held_out(directory: Path, settings: BatchSettings) -> Int[Tensor, "n length"] | None:
    """What `write_held_out` kept under the same settings, else None."""
    path = directory / HELD_OUT_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != _key(settings):
                return None
            return file.get_tensor("ids").long().to(settings.device)
    except (OSError, SafetensorError) as error:
        raise forbidden(path, error) or UserError(f"{path}: damaged: {error}") from None


def _say_begin(settings: BatchSettings) -> None:
    text, tokenizer = settings.text, settings.tokenizer
    begin = begin_token(text, tokenizer)
    if begin is not None:
        assert tokenizer is not None, "what a sequence begins with is a token of its"
        name, why = tokenizer.convert_ids_to_tokens(begin), "as the tokenizer has it"
        why = why if text.bos == "auto" else "as bos: true says"
        logger.info("data: every sequence begins with %r, %s", name, why)
    elif not text.tokenized:
        logger.info("data: no token is put before a sequence (bos: %s)", str(text.bos).lower())


def _train_batches(documents: Documents, settings: BatchSettings) -> Iterator[Tensor]:
    text = settings.text
    encode = make_encode(text, settings.tokenizer)
    if isinstance(documents, datasets.IterableDataset):
        return _stream(documents, settings, epochs=None)
    sequences = packed_sequences(
        documents, encode, text, tokenizer=settings.tokenizer, label="train"
    )
    check_ids(sequences, settings.n_vocab)
    return PackedBatches(
        sequences,
        batch_size=settings.batch_size,
        seed=settings.seed,
        stream="train",
        device=settings.device,
    )


def _held_out(text: Text, settings: BatchSettings) -> Int[Tensor, "n length"]:
    wanted = settings.n_held_out
    if isinstance(text.held_out, datasets.IterableDataset):
        stream = _stream(text.held_out, settings, epochs=1)
        batches = list(islice(stream, settings.n_wanted // settings.eval_batch_size))
        if len(batches) < settings.n_eval_batches:
            raise UserError(
                f"n_eval_batches × eval_batch_size: {wanted} held-out sequences are wanted, but"
                f" {settings.text.source!r} has fewer in {settings.text.eval_split!r}"
            )
        return torch.cat(batches)
    sequences = _packed_held_out(text, settings)
    if len(sequences) < wanted:
        raise UserError(
            f"n_eval_batches × eval_batch_size: {wanted} held-out sequences are wanted, but"
            f" {settings.text.source!r} has {len(sequences)}"
        )
    rows = permutation(len(sequences), "eval", settings.text.eval_seed)[: settings.n_wanted]
    return torch.from_numpy(sequences[rows].astype(np.int64)).to(settings.device)


def _packed_held_out(text: Text, settings: BatchSettings) -> Int[np.ndarray, "n length"]:
    encode = make_encode(settings.text, settings.tokenizer)
    return packed_sequences(
        text.held_out, encode, settings.text, tokenizer=settings.tokenizer, label="held-out"
    )


def _choice(open_text: Callable[[], Text], settings: BatchSettings) -> Iterator[Tensor]:
    """Held-out batches that neither evaluation nor report sees; `UserError` if there are too few."""
    text, size, n = open_text(), settings.eval_batch_size, settings.n_choice_batches
    if isinstance(text.held_out, datasets.IterableDataset):
        first = settings.n_wanted // size
        found = list(islice(_stream(text.held_out, settings, epochs=1), first, first + n))
    else:
        sequences = _packed_held_out(text, settings)
        rows = permutation(len(sequences), "eval", settings.text.eval_seed)
        own = rows[settings.n_wanted : settings.n_wanted + n * size]
        batches = torch.from_numpy(sequences[own].astype(np.int64)).to(settings.device).split(size)
        found = [batch for batch in batches if len(batch) == size]
    if len(found) < n:
        raise UserError(
            f"n_choice_batches: {n} batches of {size} held-out sequences are wanted to compare the starts,"
            f" but {settings.text.source!r} has {len(found)} after the {settings.n_wanted} sequences of"
            " evaluation and report"
        )
    for batch in found:
        check_ids(batch, settings.n_vocab)
        yield batch


def _stream(
    documents: datasets.IterableDataset, settings: BatchSettings, *, epochs: int | None
) -> StreamedBatches:
    """Training batches, endless, or the held-out ones for one epoch."""
    text, training = settings.text, epochs is None
    return StreamedBatches(
        documents,
        make_encode(text, settings.tokenizer),
        column=text.column,
        length=text.context_length,
        n_vocab=settings.n_vocab,
        batch_size=settings.batch_size if training else settings.eval_batch_size,
        buffer_size=text.shuffle_buffer if training else settings.n_held_out,
        seed=settings.seed if training else text.eval_seed,
        stream="train" if training else "eval",
        device=settings.device,
        epochs=epochs,
        begin=begin_token(text, settings.tokenizer),
    )


def _key(settings: BatchSettings) -> str:
    """Changes with everything that the held-out text depends on, but its source's own contents."""
    tokenizer = settings.tokenizer
    parts = {
        "text": settings.text.model_dump(mode="json"),
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
        "begin": begin_token(settings.text, tokenizer),
        "n": [settings.n_held_out, settings.n_wanted],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
