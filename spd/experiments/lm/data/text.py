"""Text as documents, from wherever it is: the hub, the disk, or Python's own documentation.

Knows no tokenizer and no model.
"""

import glob
import gzip
import importlib
import logging
import os
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import datasets
import torch
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pydantic import Field, model_validator

from spd.config import BaseConfig, UserError, counted
from spd.config.limits import MAX_WIDTH, Seed, Width
from spd.experiments.lm.hub import hub_commit, unreachable
from spd.noise import derive_seed

logger = logging.getLogger(__name__)

PYDOC = "pydoc"
LOADER_OF = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
"""how a file is read, by its suffix in letters of any size; `.gz` may follow, but not `.parquet`"""
TABLES = {".csv", ".tsv", ".arrow", ".feather", ".orc", ".xlsx", ".sqlite"}
ARCHIVES = {".bz2", ".xz", ".lzma", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"}
NOT_READ = {*TABLES, *ARCHIVES, ".parquet.gz"}
"""suffixes of what is no plain text, and is not read here"""
READ = ".txt, .jsonl, .ndjson, .json (.gz may follow) or .parquet"
MAX_NULLS = 10_000
"""rows at the beginning of a column that may hold nothing"""

Documents = datasets.Dataset | datasets.IterableDataset
"""the second where `streaming` is set"""


class TextConfig(BaseConfig):
    """Where text comes from, what is held out, and how it is cut into sequences."""

    source: str
    """`pydoc`, a file, or a pattern of .txt, .json(l), .ndjson (all also .gz) or .parquet files; else a
    directory laid out like a data set of the hub, or one on the hub. A file of another name is read as
    text."""
    subset: str | None = None
    revision: str | None = None
    """branch, tag or commit of a data set on the hub"""
    split: str = "train"
    eval_split: str | None = None
    eval_frac: float | None = Field(default=None, gt=0.0, lt=1.0)
    """without an `eval_split`: so much of the documents of `split` is held out"""
    eval_seed: Seed = 0
    """which documents are held out, and in what order held-out text is read"""
    column: str = "text"
    tokenized: bool = False
    """the column holds token ids; rows are joined as they are"""
    lowercase: bool = False
    separator: str | None = None
    """what stands between the documents of a text file; None: a file is one document"""
    bos: Literal["auto"] | bool = "auto"
    """whether every sequence begins with the tokenizer's BOS; auto: where the tokenizer adds it itself"""
    exclude_tokens: tuple[int | str, ...] = ()
    """tokens, as pads or BOS, whose positions count neither in losses nor in figures and contexts; the
    target reads them all the same"""
    end_token: str | None = None
    """the token that ends a document; None: the tokenizer's own (eos, or an encoder's sep); "": none"""
    context_length: int = Field(ge=2, le=MAX_WIDTH)
    streaming: bool = False
    """read while training, without a copy on disk"""
    shuffle_buffer: Width = 1000
    """of how many sequences a stream mixes its batches"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.eval_split is None) == (self.eval_frac is None):
            raise ValueError("exactly one of eval_split and eval_frac is needed")
        if self.eval_split == self.split:
            raise ValueError(f"eval_split and split are both {self.split!r}; held-out text differs")
        if self.streaming and self.eval_split is None:
            raise ValueError("a stream needs an eval_split: its documents are not counted")
        if self.tokenized and self.lowercase:
            raise ValueError("lowercase has no effect on token ids (tokenized: true)")
        if self.tokenized and self.end_token is not None:
            raise ValueError("end_token has no effect on token ids (tokenized: true)")
        kind = self.kind
        if self.separator is not None and kind not in ("text", None):
            raise ValueError(f"separator goes with text files, not with {self.source!r}")
        if kind is not None:
            self.check_is_whole()
        if kind in (PYDOC, "text"):
            self.check_is_text()
        return self

    @property
    def kind(self) -> str | None:
        """`pydoc`, or how files of that name are read; None where its name does not tell."""
        return PYDOC if self.source == PYDOC else LOADER_OF.get(_suffix_of(Path(self.source)))

    def check_is_whole(self) -> None:
        """`ValueError` where parts are asked for of what has none."""
        if self.eval_split is not None or self.split != "train":
            raise ValueError(f"{self.source!r} has no splits; give eval_frac")
        if (self.subset, self.revision) != (None, None):
            raise ValueError(f"{self.source!r} has no subset or revision")

    def check_is_text(self) -> None:
        """`ValueError` where columns or token ids are asked for of plain text."""
        if (self.column, self.tokenized) != ("text", False):
            raise ValueError(f"{self.source!r} has one column, text, and no token ids")


class Text(NamedTuple):
    """Documents to train on and documents that are held out; the column is `TextConfig.column`."""

    train: Documents
    held_out: Documents


def load_text(config: TextConfig) -> Text:
    """The documents that a configuration names; `UserError` says what is missing of them."""
    train = _load(config, config.split)
    _check_column(train, config)
    if config.eval_split is not None:
        held_out = _load(config, config.eval_split)
        _check_column(held_out, config)
        return Text(train, held_out)
    assert isinstance(train, datasets.Dataset) and config.eval_frac is not None
    if len(train) < 2:
        raise UserError(
            f"data.source: {config.source!r} has {counted(len(train), 'document')}, of which none can be"
            " held out; name a separator, or a source with an eval_split"
        )
    n_held_out = min(max(1, round(config.eval_frac * len(train))), len(train) - 1)
    generator = torch.Generator().manual_seed(derive_seed("held out", config.eval_seed))
    order = torch.randperm(len(train), generator=generator)
    held_out, kept = sorted(order[:n_held_out].tolist()), sorted(order[n_held_out:].tolist())
    return Text(train.select(kept), train.select(held_out))


def pydoc_documents() -> list[str]:
    """The documentation of the Python language, one document per topic, each paragraph once.

    Long topics contain shorter ones whole: what a shorter topic has said is left out of them, so that
    no paragraph of a held-out topic stands in another.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise UserError("data.source: this Python comes without pydoc_data.topics") from None
    seen: set[str] = set()
    documents = []
    for text in sorted(topics.values(), key=lambda text: (len(text), text)):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                fresh.append(paragraph)
        if fresh:
            documents.append("\n\n".join(fresh))
    return documents


def _load(config: TextConfig, split: str) -> Documents:
    path = Path(config.source).expanduser()
    if config.kind == PYDOC:
        found = datasets.Dataset.from_dict({"text": pydoc_documents()})
    elif config.kind is not None or _is_pattern(path) or (_is_there(path) and not path.is_dir()):
        found = _load_files(config, path)
    elif config.separator is not None:
        raise UserError(f"data.separator: goes with text files, and {config.source!r} is none")
    else:
        return _load_dataset(config, split)
    return found.to_iterable_dataset() if config.streaming else found


def _is_there(path: Path) -> bool:
    """Whether anything has that name, though it be a link that leads nowhere."""
    return os.path.lexists(path)


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not _is_there(path)


def _suffix_of(path: Path) -> str:
    """What tells how a file is read; a `.gz` is passed over, except after `.parquet`."""
    name = Path(path.name.lower())
    packed = name.suffix == ".gz"
    suffix = name.with_suffix("").suffix if packed else name.suffix
    return f"{suffix}.gz" if packed and suffix == ".parquet" else suffix


def _files_of(config: TextConfig, path: Path) -> list[Path]:
    """One file, whatever is in its name, or all that a pattern fits; `UserError` if one is not read."""
    place = f"data.source: {config.source!r}"
    try:
        matches = _fitting(path) if _is_pattern(path) else [path]
    except ValueError as error:
        raise UserError(f"{place}: no pattern of files: {error}") from None
    files = [file for file in matches if _is_there(file) and not file.is_dir()]
    if not files:
        raise UserError(f"{place} {'is a folder' if path.is_dir() else 'matches no file'}")
    for file in files:
        which = "" if file == path else f": {file}"
        if not file.is_file():
            what = "a link that leads nowhere" if file.is_symlink() else "a pipe, socket or device"
            raise UserError(f"{place}{which}: is {what}; a file or a folder is needed")
    if _suffix_of(path) in NOT_READ:
        raise UserError(f"{place}: files of that kind are not read; give {READ}")
    if _is_pattern(path) and config.kind is None:
        raise UserError(f"{place}: what a pattern ends in says how its files are read; give {READ}")
    return files


def _fitting(pattern: Path) -> list[Path]:
    """What a pattern fits, in order. A part of it that is there by its very name, as a folder with
    brackets, stands for itself."""
    found = [Path(pattern.anchor)]
    for part in pattern.parts[len(found[0].parts) :]:
        found = [
            match
            for folder in found
            for match in ([folder / part] if _is_there(folder / part) else folder.glob(part))
        ]
    return sorted(set(found))


def _load_files(config: TextConfig, path: Path) -> datasets.Dataset:
    """Of one file, or of all that a pattern fits."""
    files = _files_of(config, path)
    if config.kind in ("text", None):
        try:
            config.check_is_whole()
            config.check_is_text()
        except ValueError as error:
            raise UserError(f"data: {error}") from None
        texts = map(_read_text, files)
        documents = (text.split(config.separator) if config.separator else [text] for text in texts)
        whole = [text for some in documents for text in some if text.strip()]
        return datasets.Dataset.from_dict({"text": whole})
    try:
        loaded = datasets.load_dataset(
            config.kind, data_files=[glob.escape(str(file)) for file in files], split="train"
        )
    except StopIteration:
        raise UserError(f"data.source: {config.source!r} is empty") from None
    except (DatasetGenerationError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"data.source: {config.source!r}: cannot be read: {reason}") from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _read_text(path: Path) -> str:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path}: cannot be read as text: {error}") from None


def _load_dataset(config: TextConfig, split: str) -> Documents:
    """A data set of the hub, or a directory laid out as the hub lays them out."""
    local = Path(config.source).expanduser()
    if local.is_dir():
        if glob.has_magic(str(local)):
            raise UserError(
                f"data.source: {config.source!r}: a folder with '*', '?' or '[' in its name cannot be read"
                " as a data set; rename it, or name the files in it"
            )
        name, revision = str(local), None
    else:
        name = config.source
        revision = hub_commit(name, "dataset", config.revision, "data.source") or config.revision
    try:
        loaded = datasets.load_dataset(
            name, config.subset, split=split, revision=revision, streaming=config.streaming
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        raise unreachable(name, "data.source", error) from None
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"data: {name!r}, subset {config.subset!r}, split {split!r}: {reason}"
        ) from None
    assert isinstance(loaded, datasets.Dataset | datasets.IterableDataset)
    return loaded


def _check_column(documents: Documents, config: TextConfig) -> None:
    """`UserError` unless there is such a column, and the first thing in it is what is needed."""
    rows: Iterator[dict[str, Any]] = iter(documents)
    n_nulls = 0
    for first in islice(rows, MAX_NULLS):
        if config.column not in first:
            raise UserError(
                f"data.column: {config.source!r} has no column {config.column!r}"
                f" (columns: {', '.join(first)})"
            )
        if first[config.column] is not None:
            check_value(first[config.column], config)
            return
        n_nulls += 1
    found = f"only nulls in its first {counted(n_nulls, 'row')}" if n_nulls else "no documents"
    raise UserError(f"data.source: {config.source!r} has {found}")


def check_value(value: Any, config: TextConfig) -> None:
    """`UserError` unless that is a document as the configuration says."""
    shown = f"{type(value).__name__} {str(value)[:40]!r}"
    if config.tokenized and not (isinstance(value, list) and all(type(i) is int for i in value)):
        raise UserError(
            f"data.column: {config.column!r} of {config.source!r} holds {shown}, but tokenized: true"
            " needs lists of token ids"
        )
    if config.tokenized and value and not 0 <= min(value) <= max(value) < 2**31:
        wrong = next(i for i in value if not 0 <= i < 2**31)
        raise UserError(
            f"data.column: {config.column!r} of {config.source!r} holds {wrong}, which is no token id"
        )
    if not config.tokenized and not isinstance(value, str):
        raise UserError(
            f"data.column: {config.column!r} of {config.source!r} holds {shown}, but text is needed"
            " (tokenized: true for lists of token ids)"
        )
