"""Documents as packed token sequences, cached on disk, and endless shuffled batches of them."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd import settings
from spd.config import UserError, counted, nearest
from spd.experiments.lm.data.text import Documents, TextConfig, check_value
from spd.noise import derive_seed

logger = logging.getLogger(__name__)

TOKENS_FILE, INFO_FILE = "tokens.int32", "info.json"
DOCUMENTS_AT_ONCE = 256

Encode = Callable[[Sequence[Any]], list[list[int]]]
"""Values of the text column → the token ids of each, with what joins it to the next"""


def make_encode(config: TextConfig, tokenizer: PreTrainedTokenizerBase | None) -> Encode:
    """How documents become token ids: each alone, without special tokens, then the end token.

    Token ids are taken as they are. An empty document, and a null, gives nothing.
    """
    if not config.tokenized and tokenizer is None:
        raise UserError("tokenizer: text needs one, and the target has none; name one")
    end = [] if config.tokenized or tokenizer is None else end_tokens(config, tokenizer)

    def encode(documents: Sequence[Any]) -> list[list[int]]:
        for document in documents:
            if document is not None:
                check_value(document, config)
        whole = [document for document in documents if document]
        if config.tokenized or tokenizer is None or not whole:
            return [list(row) for row in whole]
        texts = [text.lower() for text in whole] if config.lowercase else whole
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*document, *end] for document in ids]

    return encode


def end_tokens(config: TextConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a document: the token that the configuration names, else eos, or an encoder's sep."""
    if config.end_token is not None:
        return [token_id(config.end_token, tokenizer, "data.end_token")] if config.end_token else []
    return [end_token_id(tokenizer)]


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a document of itself: eos, or an encoder's sep."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        f"tokenizer: {tokenizer.name_or_path!r} has no end token (eos_token, sep_token); name one of its"
        ' tokens with data.end_token, or join documents without one by data.end_token: ""'
    )


def token_id(token: str, tokenizer: PreTrainedTokenizerBase, place: str) -> int:
    """The number of a token, or a `UserError` that begins with `place`."""
    known = tokenizer.get_vocab()
    if token not in known:
        special = ", ".join(map(repr, tokenizer.all_special_tokens))
        raise UserError(
            f"{place}: {tokenizer.name_or_path!r} has no token {token!r}{nearest(token, known)}"
            f" (its special tokens: {special or 'none'})"
        )
    return known[token]


def begin_token(config: TextConfig, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """What every sequence begins with: BOS, or an encoder's cls; None: nothing.

    `auto` asks the tokenizer for what it adds itself; token ids are taken as they are.
    """
    if config.bos is False or (config.bos == "auto" and (config.tokenized or tokenizer is None)):
        return None
    if tokenizer is None:
        raise UserError("data.bos: true needs a tokenizer, and the target has none; name one")
    known = [tokenizer.bos_token_id, tokenizer.cls_token_id]
    if config.bos == "auto":
        added = tokenizer("", verbose=False)["input_ids"]
        return int(added[0]) if added and added[0] in known else None
    found = [token for token in known if isinstance(token, int)]
    if not found:
        raise UserError(
            f"data.bos: true, but {tokenizer.name_or_path!r} has no such token (bos_token, cls_token)"
        )
    return found[0]


def beginning_with(text: str, config: TextConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a text as the beginning of a sequence of the data.

    It is in lower case where the data are, after the token that sequences begin with, and has no end.
    """
    begin = begin_token(config, tokenizer)
    written = text.lower() if config.lowercase else text
    ids = list(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if begin is None else [begin, *ids]


def begun(rows: Int[np.ndarray, "n rest"], begin: int | None) -> Int[np.ndarray, "n length"]:
    """Sequences with the token that they begin with, if there is one."""
    if begin is None:
        return rows
    return np.concatenate([np.full((len(rows), 1), begin, dtype=rows.dtype), rows], axis=1)


def packed_sequences(
    documents: Documents,
    encode: Encode,
    config: TextConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    label: str,
) -> Int[np.ndarray, "n length"]:
    """All documents joined and cut into sequences, mapped from the cache; the rest at the end is left.

    The cache stands below the output root, under a hash of documents, tokenizer and length.
    """
    assert isinstance(documents, datasets.Dataset), "a stream is not kept"
    begin = begin_token(config, tokenizer)
    key = _hash(
        documents._fingerprint,
        tokenizer_hash(tokenizer) if tokenizer is not None and not config.tokenized else None,
        [config.column, config.tokenized, config.lowercase, config.context_length],
        [begin, config.end_token],
    )
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(config.source).name)
    directory = settings.output_root().absolute() / "data" / f"{stem}-{label}-{key}"
    with _once(directory) as partial:
        if partial is not None:
            logger.info("data: tokenising %s to %s", counted(len(documents), "document"), directory)
            _write_tokens(partial, documents, encode, config, begin)
    info = json.loads((directory / INFO_FILE).read_text(encoding="utf-8"))
    length, n = config.context_length, info["n_sequences"]
    if n == 0:
        raise UserError(
            f"data: {config.source!r} ({label}) has {counted(info['n_tokens'], 'token')}, which is less"
            f" than one sequence of {length}"
        )
    return np.memmap(directory / TOKENS_FILE, dtype=np.int32, mode="r", shape=(n, length))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Depends on everything that a tokenizer does, not on where it lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return _hash(type(tokenizer).__name__, inside, tokenizer.eos_token_id, tokenizer.sep_token_id)


def check_ids(ids: Int[Tensor, "n length"] | Int[np.ndarray, "n length"], n_vocab: int) -> None:
    """Raise `UserError` if a token is none of the target's."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_vocab:
        raise UserError(
            f"data: token ids from {low} to {high}, but the target knows 0 to {n_vocab - 1}; is this"
            " its tokenizer?"
        )


def copied_to(ids: Tensor, device: torch.device | str) -> Tensor:
    """`ids` on the device; a GPU fetches them by itself, so that nothing waits for it."""
    if torch.device(device).type != "cuda":
        return ids.to(device)
    return ids.pin_memory().to(device, non_blocking=True)


class PackedBatches:
    """Endless batches `[batch, length]`; every epoch is a permutation of its own. Knows its position.

    Batch number t depends on (seed, t) alone; a batch may end one epoch and begin the next.
    """

    def __init__(
        self,
        sequences: Int[np.ndarray, "n length"],
        *,
        batch_size: int,
        seed: int,
        stream: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sequences = sequences
        self.batch_size, self.device = batch_size, device
        self.seed, self.stream = seed, stream
        self.position = 0
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Int[Tensor, "batch length"]:
        first = self.position * self.batch_size
        rows = [self._row(place) for place in range(first, first + self.batch_size)]
        self.position += 1
        ids = torch.from_numpy(self.sequences[rows].astype(np.int64))
        return copied_to(ids, self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, len(self.sequences))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, permutation(len(self.sequences), self.stream, self.seed, epoch))
        return int(self._epoch[1][index])


def permutation(n: int, *parts: object) -> Int[np.ndarray, " n"]:
    """A random order of n things that depends on every part."""
    generator = torch.Generator().manual_seed(derive_seed("order", *parts))
    return torch.randperm(n, generator=generator).numpy()


def _write_tokens(
    directory: Path,
    documents: datasets.Dataset,
    encode: Encode,
    config: TextConfig,
    begin: int | None,
) -> None:
    n_tokens = n_sequences = n_nulls = 0
    length = config.context_length - (begin is not None)
    rest = np.empty(0, dtype=np.int32)
    values = iter(documents[config.column])
    with (directory / TOKENS_FILE).open("wb") as file:
        while some := list(islice(values, DOCUMENTS_AT_ONCE)):
            n_nulls += sum(value is None for value in some)
            ids = np.fromiter((i for document in encode(some) for i in document), dtype=np.int32)
            n_tokens += len(ids)
            rest = np.concatenate([rest, ids])
            n = len(rest) // length
            begun(rest[: n * length].reshape(n, length), begin).tofile(file)
            rest, n_sequences = rest[n * length :], n_sequences + n
    if n_nulls:
        rows = counted(n_nulls, "empty row")
        logger.info("data: %s of %s left out", rows, config.source)
    found = {"n_tokens": n_tokens, "n_sequences": n_sequences}
    info = json.dumps({**found, "data": config.model_dump(mode="json")}, indent=2)
    (directory / INFO_FILE).write_text(info + "\n", encoding="utf-8")


@contextmanager
def _once(directory: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `directory` whole or not at all; None if that is there.

    One process fills it, others wait.
    """
    if directory.is_dir():
        yield None
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        lock = FileLock(directory.with_name(f".{directory.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{directory.parent}: tokens cannot be cached there: {error.strerror or error};"
            " set SPD_OUT_DIR to a writable folder"
        ) from None
    try:
        if directory.is_dir():
            yield None
            return
        partial.mkdir()
        try:
            yield partial
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        if directory.is_dir():
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _hash(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
