"""Packing, the cache on disk, epochs, streams, and positions that can be saved."""

import io
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spd.config import RunError, UserError, parse
from spd.experiments.lm.data import tokens
from spd.experiments.lm.data.streaming import StreamedBatches
from spd.experiments.lm.data.text import TextConfig
from spd.experiments.lm.data.tokens import (
    PackedBatches,
    begin_token,
    check_ids,
    copied_to,
    end_token_id,
    make_encode,
    packed_sequences,
    tokenizer_hash,
)
from spd.problem import Resumable
from tests.lm_stand_ins import make_tokenizer

LENGTH = 4


def config(**changes: Any) -> TextConfig:
    raw = {"source": "some/text", "eval_split": "test", "context_length": LENGTH}
    return parse(TextConfig, {**raw, **changes}, "test")


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    ids, pinned, there = torch.arange(3), torch.arange(3), torch.arange(3)
    assert copied_to(ids, "cpu") is ids
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned)
    to = mock.Mock(return_value=there)
    monkeypatch.setattr(Tensor, "to", to)
    assert copied_to(ids, torch.device("cuda", 1)) is there
    to.assert_called_once_with(torch.device("cuda", 1), non_blocking=True)


def ids_of(n: int) -> datasets.Dataset:
    """Document i is the number i, i % 3 + 1 times."""
    return datasets.Dataset.from_dict({"text": [[i] * (i % 3 + 1) for i in range(n)]})


@pytest.fixture(autouse=True)
def _own_output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def pack(documents: datasets.Dataset, text: TextConfig, tokenizer: Any = None) -> np.ndarray:
    encode = make_encode(text, tokenizer)
    return packed_sequences(documents, encode, text, tokenizer=tokenizer, label="train")


def test_every_document_is_tokenised_alone_and_ends_with_the_end_token():
    tokenizer = make_tokenizer()
    end = end_token_id(tokenizer)
    texts = ["the cat sat", "", "a big dog ran"]
    documents = datasets.Dataset.from_dict({"text": texts})
    words = [[tokenizer.get_vocab()[word] for word in text.split()] for text in texts]
    joined = [*words[0], end, *words[2], end]
    assert pack(documents, config(), tokenizer).tolist() == [joined[:4], joined[4:8]]


def test_nulls_are_left_out_wherever_they_stand(caplog: pytest.LogCaptureFixture):
    tokenizer, texts = make_tokenizer(), ["the cat sat", "a big dog ran"]
    expected = pack(datasets.Dataset.from_dict({"text": texts}), config(), tokenizer)
    with_nulls = datasets.Dataset.from_dict({"text": [None, texts[0], None, texts[1], None]})
    with caplog.at_level("INFO", logger="spd"):
        assert np.array_equal(pack(with_nulls, config(), tokenizer), expected)
    assert "3 empty rows of some/text left out" in caplog.text
    ids = datasets.Dataset.from_dict({"text": [None, [0, 1, 2], None, [3, 4]]})
    assert pack(ids, config(tokenized=True)).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("tokenized", "row", "said"),
    [
        (False, 3, "holds int '3', but text is needed"),
        (False, [1], r"holds list '\[1\]', but text is needed"),
        (True, "word", "holds str 'word', but tokenized: true needs lists of token ids"),
        (True, [1, None], r"holds list '\[1, None\]', but tokenized: true needs"),
        (True, [True], r"holds list '\[True\]', but tokenized: true needs"),
        (True, [1, 2**31], "holds 2147483648, which is no token id"),
        (True, [-1], "holds -1, which is no token id"),
    ],
)
def test_a_row_of_another_sort_is_refused_by_its_value(tokenized: bool, row: Any, said: str):
    encode = make_encode(config(tokenized=tokenized), make_tokenizer())
    good: Any = [1] if tokenized else "the cat"
    with pytest.raises(UserError, match=f"data.column: 'text' of 'some/text' {said}"):
        encode([good, None, row])


def beginning(tokenizer: PreTrainedTokenizerFast, token: str = "the") -> PreTrainedTokenizerFast:
    """The tokenizer with a BOS that it puts first itself."""
    number = tokenizer.get_vocab()[token]
    tokenizer.add_special_tokens({"bos_token": token})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, number)]
    )
    return tokenizer


def test_every_sequence_begins_with_what_the_tokenizer_adds():
    plain, tokenizer = make_tokenizer(), beginning(make_tokenizer())
    bos = tokenizer.get_vocab()["the"]
    documents = datasets.Dataset.from_dict({"text": ["a big dog ran", "the cat sat"]})
    without = pack(documents, config(bos=False), tokenizer)
    assert np.array_equal(without, pack(documents, config(), plain))
    assert begin_token(config(), plain) is None and begin_token(config(), tokenizer) == bos
    joined = np.concatenate(make_encode(config(), tokenizer)(documents["text"]))
    for setting in ("auto", True):
        packed = pack(documents, config(bos=setting), tokenizer)
        assert packed.shape == (3, LENGTH) and (packed[:, 0] == bos).all()
        assert np.array_equal(packed[:, 1:].flatten(), joined[:9])
    with pytest.raises(UserError, match="bos: true, but .* has no such token"):
        begin_token(config(bos=True), plain)
    with pytest.raises(UserError, match="bos: true needs a tokenizer"):
        begin_token(config(bos=True, tokenized=True), None)
    assert begin_token(config(tokenized=True), tokenizer) is None


def test_documents_end_with_the_token_that_is_named():
    tokenizer = make_tokenizer()
    (words,) = make_encode(config(end_token=""), tokenizer)(["the cat"])
    assert words == [tokenizer.get_vocab()[word] for word in ("the", "cat")]
    named = make_encode(config(end_token="dog"), tokenizer)(["the cat"])
    assert named == [[*words, tokenizer.get_vocab()["dog"]]]
    with pytest.raises(
        UserError, match="data.end_token: .* has no token 'dogg'; did you mean 'dog'"
    ):
        make_encode(config(end_token="dogg"), tokenizer)
    endless = make_tokenizer()
    endless.eos_token = endless.sep_token = None
    with pytest.raises(UserError, match="has no end token .*; name one .* data.end_token"):
        make_encode(config(), endless)
    assert make_encode(config(end_token=""), endless)(["the cat"]) == [words]


def test_lower_casing_comes_before_the_tokenizer():
    tokenizer = make_tokenizer()
    assert make_encode(config(lowercase=True), tokenizer)(["The Cat"]) == make_encode(
        config(), tokenizer
    )(["the cat"])
    assert tokenizer.unk_token_id in make_encode(config(), tokenizer)(["The Cat"])[0]


def test_rows_of_token_ids_are_joined_as_they_are():
    packed = pack(ids_of(5), config(tokenized=True))
    assert packed.tolist() == [[0, 1, 1, 2], [2, 2, 3, 4]]


def test_tokens_are_made_once_and_anew_for_other_settings(monkeypatch: pytest.MonkeyPatch):
    tokenizer = make_tokenizer()
    documents = datasets.Dataset.from_dict({"text": ["the cat sat", "a big dog ran"] * 4})
    first = pack(documents, config(), tokenizer)
    written: list[Path] = []
    write = tokens._write_tokens
    monkeypatch.setattr(
        tokens,
        "_write_tokens",
        lambda folder, *args: (written.append(folder), write(folder, *args)),
    )
    assert np.array_equal(pack(documents, config(), tokenizer), first) and not written
    other = make_tokenizer(end="[SEP]")
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)
    pack(documents, config(), other)
    pack(documents, config(context_length=5), tokenizer)
    pack(documents, config(lowercase=True), tokenizer)
    pack(documents.select(range(5)), config(), tokenizer)
    assert len(set(written)) == 4


def test_a_tokenisation_that_fails_leaves_nothing(tmp_path: Path):
    def fail(rows: Any) -> Any:
        raise ValueError

    with pytest.raises(ValueError):
        packed_sequences(ids_of(9), fail, config(tokenized=True), tokenizer=None, label="train")
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] in ([], [_lock(tmp_path)])
    assert len(pack(ids_of(9), config(tokenized=True))) == 4


def _lock(tmp_path: Path) -> str:
    (path,) = (tmp_path / "out" / "data").iterdir()
    assert path.name.endswith(".lock")
    return path.name


def test_too_little_text_is_an_error():
    with pytest.raises(UserError, match="1 token, which is less than one sequence of 4"):
        pack(ids_of(1), config(tokenized=True))


def test_text_needs_a_tokenizer_with_an_end_token():
    with pytest.raises(UserError, match="tokenizer: text needs one"):
        make_encode(config(), None)
    with pytest.raises(UserError, match="has no end token"):
        make_encode(config(), make_tokenizer(end=None))


@pytest.mark.parametrize("ids", [[[0, 8]], [[-1, 2]]])
def test_tokens_that_the_target_does_not_know_are_refused(ids: list[list[int]]):
    check_ids(torch.tensor([[0, 7]]), 8)
    with pytest.raises(UserError, match="but the target knows 0 to 7"):
        check_ids(torch.tensor(ids), 8)


# --- batches ---------------------------------------------------------------------------------------


def packed_batches(n: int = 10, **changes: Any) -> PackedBatches:
    sequences = np.arange(n * LENGTH, dtype=np.int32).reshape(n, LENGTH)
    settings: dict[str, Any] = {"batch_size": 3, "seed": 0, "stream": "train"}
    return PackedBatches(sequences, **{**settings, **changes})


def streamed_batches(epochs: int | None = None, **changes: Any) -> StreamedBatches:
    """24 documents in two shards, 48 tokens or 12 sequences an epoch."""
    documents = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": [0, 1]})
    settings: dict[str, Any] = {
        **{"column": "text", "length": LENGTH, "n_vocab": 24, "batch_size": 3, "buffer_size": 5},
        **{"seed": 0, "stream": "train", "epochs": epochs},
    }
    encode = make_encode(config(tokenized=True), None)
    return StreamedBatches(documents, encode, **{**settings, **changes})


def _rows(shards: list[int]) -> Any:
    for shard in shards:
        yield from ids_of(24).select(range(12 * shard, 12 * shard + 12))


def first_tokens(batches: Any, n_batches: int) -> list[int]:
    return [int(row[0]) // LENGTH for _ in range(n_batches) for row in next(batches)]


def test_every_epoch_sees_every_sequence_once_in_an_order_of_its_own():
    rows = first_tokens(packed_batches(), 10)
    epochs = [rows[:10], rows[10:20], rows[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows == first_tokens(packed_batches(), 10)
    assert rows != first_tokens(packed_batches(seed=1), 10)
    assert rows != first_tokens(packed_batches(stream="eval"), 10)


def test_a_stream_gives_every_token_of_an_epoch_and_mixes():
    ids = torch.cat([batch.flatten() for batch in streamed_batches(epochs=1, batch_size=1)])
    assert sorted(ids.tolist()) == [i for i in range(24) for _ in range(i % 3 + 1)]
    assert ids.tolist() != sorted(ids.tolist())
    several = [batch for batch, _ in zip(streamed_batches(), range(12), strict=False)]
    assert len(several) == 12 and all(batch.shape == (3, LENGTH) for batch in several)


@pytest.mark.parametrize("make", [packed_batches, streamed_batches])
@pytest.mark.parametrize("position", [0, 1, 4, 11])
def test_a_restored_position_goes_on_with_the_same_batches(
    make: Any, position: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("spd.experiments.lm.data.streaming.DOCUMENTS_AT_ONCE", 4)
    batches: PackedBatches | StreamedBatches = make()
    assert isinstance(make(), Resumable)
    for _ in range(position):
        next(batches)
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    file.seek(0)
    restored = make()
    restored.load_state_dict(torch.load(file, weights_only=True))
    expected: list[Tensor] = [next(batches) for _ in range(10)]
    assert all(torch.equal(next(restored), batch) for batch in expected)


def test_a_stream_without_tokens_ends_the_run():
    empty = datasets.Dataset.from_dict({"text": [[], []]}).to_iterable_dataset()
    batches = streamed_batches()
    batches.documents = empty
    with pytest.raises(RunError, match="no tokens"):
        next(batches)


def test_a_stream_refuses_tokens_that_the_target_does_not_know():
    with pytest.raises(UserError, match="the target knows 0 to 5"):
        list(streamed_batches(epochs=1, n_vocab=6))
