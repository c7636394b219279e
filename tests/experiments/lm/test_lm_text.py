"""Documents from every source, what is held out of them, and what is wrong with them in words."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from spd.config import Unreachable, UserError, parse
from spd.experiments.lm.data.text import (
    Documents,
    TextConfig,
    load_text,
    pydoc_documents,
)
from tests.lm_stand_ins import save_data_set

DOCUMENTS = [f"document {i}" for i in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config(source: str | Path, **changes: Any) -> TextConfig:
    raw = {"source": str(source), "context_length": 8, **changes}
    if "eval_split" not in raw:
        raw.setdefault("eval_frac", 0.3)
    return parse(TextConfig, raw, "test")


def texts(documents: Documents, column: str = "text") -> list[str]:
    rows: Any = documents
    return [row[column] for row in rows]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_file(folder: Path) -> Path:
    path = folder / "all.txt"
    path.write_text("<end>".join([*DOCUMENTS, "\n"]), encoding="utf-8")
    return path


def json_file(folder: Path) -> Path:
    return write_jsonl(folder / "all.jsonl", [{"text": text} for text in DOCUMENTS])


def parquet_file(folder: Path) -> Path:
    path = folder / "all.parquet"
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path)
    return path


@pytest.mark.parametrize("write", [text_file, json_file, parquet_file])
def test_files_are_documents_of_which_some_are_held_out(tmp_path: Path, write: Any):
    path = write(tmp_path)
    changes = {"separator": "<end>"} if path.suffix == ".txt" else {}
    train, held_out = load_text(config(path, **changes))
    assert (len(texts(train)), len(texts(held_out))) == (7, 3)
    assert sorted(texts(train) + texts(held_out)) == DOCUMENTS
    again = load_text(config(path, **changes))
    assert texts(again.held_out) == texts(held_out)
    other = load_text(config(path, eval_seed=1, **changes))
    assert texts(other.held_out) != texts(held_out)


def test_several_files_are_read_in_order_and_each_is_a_document(tmp_path: Path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    train, held_out = load_text(config(tmp_path / "*.txt"))
    assert len(texts(held_out)) == 1
    assert texts(train) == [name for name in "abc" if name not in texts(held_out)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_laid_out_as_on_the_hub_has_its_own_splits(tmp_path: Path, streaming: bool):
    splits = {"train": DOCUMENTS[:8], "test": DOCUMENTS[8:]}
    save_data_set(tmp_path / "set", splits, column="story", n_shards=2)
    found = config(tmp_path / "set", eval_split="test", column="story", streaming=streaming)
    train, held_out = load_text(found)
    assert isinstance(train, datasets.IterableDataset) == streaming
    assert texts(train, "story") == DOCUMENTS[:8]
    assert texts(held_out, "story") == DOCUMENTS[8:]


def test_no_paragraph_of_a_held_out_topic_of_pydoc_stands_in_another():
    documents = pydoc_documents()
    assert len(documents) > 70 and sum(map(len, documents)) > 300_000
    paragraphs = [part.strip() for text in documents for part in re.split(r"\n\s*\n", text)]
    assert len(paragraphs) == len(set(paragraphs))
    train, held_out = load_text(config("pydoc", eval_frac=0.15))
    assert set(texts(train)) | set(texts(held_out)) == set(documents)
    assert not set(texts(train)) & set(texts(held_out))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path):
    save_data_set(tmp_path / "set", {"train": DOCUMENTS, "test": DOCUMENTS}, column="story")
    with pytest.raises(UserError, match=r"no column 'text' \(columns: story, topic\)"):
        load_text(config(tmp_path / "set", eval_split="test"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_is_named_with_those_there_are(tmp_path: Path, streaming: bool):
    save_data_set(tmp_path / "set", {"train": DOCUMENTS, "test": DOCUMENTS}, column="text")
    with pytest.raises(UserError, match=r"split 'validation'.*\['train', 'test'\]"):
        load_text(config(tmp_path / "set", eval_split="validation", streaming=streaming))


def test_a_missing_subset_is_named_with_those_there_are(tmp_path: Path):
    save_data_set(tmp_path / "set", {"train": DOCUMENTS, "test": DOCUMENTS}, column="text")
    with pytest.raises(UserError, match=r"subset 'large'.*Available: \['default'\]"):
        load_text(config(tmp_path / "set", eval_split="test", subset="large"))


def test_a_column_of_another_sort_is_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": [1, 2]}, {"text": [3]}])
    with pytest.raises(
        UserError, match=r"holds list '\[1, 2\]', but text is needed \(tokenized: true"
    ):
        load_text(config(path))
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(
        UserError, match="holds str 'a', but tokenized: true needs lists of token ids"
    ):
        load_text(config(path, tokenized=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "matches no file"),
        ("one.txt", "alone", "of which none can be held out"),
        ("bad.jsonl", '{"text": \n', "cannot be read"),
        ("bad.parquet", "not parquet", "cannot be read"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, name: str, content: str | None, message: str):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_text(config(tmp_path / name))


def test_without_the_hub_the_message_names_the_experiment_that_needs_none():
    with pytest.raises(Unreachable, match="'some/data'.*pydoc_emb") as caught:
        load_text(config("some/data", eval_split="test"))
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_said_to_be_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="hub cannot be reached for 'some/data'.*pydoc_emb"):
        load_text(config("some/data", eval_split="test"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split": "test", "eval_frac": 0.1}, "exactly one of eval_split and eval_frac"),
        ({"eval_split": "train"}, "held-out text differs"),
        ({"streaming": True}, "a stream needs an eval_split"),
        ({"tokenized": True, "lowercase": True}, "lowercase has no effect on token ids"),
        ({"source": "a.json", "separator": "<end>"}, "separator goes with text files"),
        ({"tokenized": True, "end_token": "x"}, "end_token has no effect on token ids"),
        ({"source": "pydoc", "eval_split": "test"}, "has no splits"),
        ({"source": "a.jsonl", "subset": "small"}, "no subset or revision"),
        ({"source": "a.txt", "column": "story"}, "one column, text"),
        ({"context_length": 1}, "context_length"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config(**{"source": "some/data", **changes})


@pytest.mark.parametrize(
    "name",
    [
        "data [v2].txt",
        "corpus",
        "notes.text",
        "all.txt.gz",
        "ALL.TXT.GZ",
        "a [1].jsonl",
        "all.jsonl.gz",
        "all.ndjson",
        "all.ndjson.gz",
    ],
)
def test_a_file_that_exists_is_read_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    as_json = ".jsonl" in name or ".ndjson" in name
    data = (rows if as_json else "<end>".join(DOCUMENTS)).encode()
    Path(name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    changes = {} if as_json else {"separator": "<end>"}
    train, held_out = load_text(config(name, **changes))
    assert sorted(texts(train) + texts(held_out)) == DOCUMENTS


@pytest.mark.parametrize("name", ["all.txt.gz", "all.jsonl.gz", "corpus"])
def test_what_is_wrong_with_a_file_is_said_of_the_file(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe no text, and not packed")
    with pytest.raises(UserError, match=f"{re.escape(name)}'?: cannot be read"):
        load_text(config(path))


def test_a_file_of_no_known_name_has_no_splits_either(tmp_path: Path):
    path = tmp_path / "corpus"
    path.write_text("text")
    with pytest.raises(UserError, match="has no splits; give eval_frac"):
        load_text(config(path, eval_split="test"))
    with pytest.raises(UserError, match="separator: goes with text files, and .* is none"):
        load_text(config(tmp_path, separator="<end>"))


def test_the_suffix_may_be_written_in_capitals(tmp_path: Path):
    rows = [{"text": text} for text in DOCUMENTS]
    train, held_out = load_text(config(write_jsonl(tmp_path / "ALL.JSONL", rows)))
    assert sorted(texts(train) + texts(held_out)) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("all.csv", "files of that kind are not read; give"),
        ("all.jsonl.bz2", "files of that kind are not read; give"),
        ("all.csv.gz", "files of that kind are not read; give"),
        ("all.TSV.GZ", "files of that kind are not read; give"),
        ("all.tar.gz", "files of that kind are not read; give"),
        ("all.parquet.gz", "files of that kind are not read; give"),
        ("none.jsonl", "is empty"),
        ("folder.txt", "is a folder"),
    ],
)
def test_what_is_not_read_is_not_taken_for_text(tmp_path: Path, name: str, said: str):
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    else:
        path.write_text("" if name.startswith("none") else "text\nhello\n")
    with pytest.raises(UserError, match=f"{re.escape(name)}'?:? {said}"):
        load_text(config(path))


def test_nulls_do_not_tell_what_a_column_holds(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"text": None}, *({"text": text} for text in DOCUMENTS)]
    train, held_out = load_text(config(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert len(texts(train)) + len(texts(held_out)) == 11
    with pytest.raises(UserError, match="has only nulls in its first 4 rows"):
        load_text(config(write_jsonl(tmp_path / "b.jsonl", [{"text": None}] * 4)))


@pytest.mark.parametrize("name", ["pipe", "pipe.jsonl", "link", "link.txt", "all/*.jsonl"])
def test_what_is_there_but_no_file_is_not_looked_for_on_the_hub(tmp_path: Path, name: str):
    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
        said = f"{re.escape(name)}': is a pipe, socket or device; a file or a folder is needed"
    elif name.startswith("link"):
        path.symlink_to(tmp_path / "gone")
        said = f"{re.escape(name)}': is a link that leads nowhere; a file or a folder is needed"
    else:
        path.parent.mkdir()
        write_jsonl(path.parent / "a.jsonl", [{"text": text} for text in DOCUMENTS])
        (path.parent / "b.jsonl").symlink_to(tmp_path / "gone")
        said = "b.jsonl: is a link that leads nowhere"
    with pytest.raises(UserError, match=said) as caught:
        load_text(config(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["data/*/x.jsonl", "d?ta/**/x.jsonl", "data/a [1]/*.jsonl", "data/[a]*/[x-y].jsonl"]
)
def test_wildcards_and_brackets_may_stand_in_folders(tmp_path: Path, pattern: str):
    for name in ("a [1]", "ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"text": f"{name} {text}"} for text in DOCUMENTS]
        write_jsonl(tmp_path / "data" / name / "x.jsonl", rows)
    train, held_out = load_text(config(tmp_path / pattern))
    expected = ["a [1]"] if "a [1]" in pattern else ["a [1]", "ab"]
    assert sorted(texts(train) + texts(held_out)) == [
        f"{n} {t}" for n in expected for t in DOCUMENTS
    ]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*", "what a pattern ends in says how its files are read; give .txt, .jsonl"),
        ("*.csv", "files of that kind are not read; give .txt, .jsonl"),
        ("none-*", "matches no file"),
        ("**x/*.txt", "no pattern of files"),
    ],
)
def test_a_pattern_that_will_not_do_is_not_looked_for_on_the_hub(
    tmp_path: Path, pattern: str, said: str
):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(UserError, match=f"{re.escape(pattern)}'?:? {said}") as caught:
        load_text(config(tmp_path / pattern))
    assert "\n" not in str(caught.value)


def test_a_data_set_in_a_folder_with_brackets_is_refused_by_name(tmp_path: Path):
    save_data_set(tmp_path / "set [v2]", {"train": DOCUMENTS, "test": DOCUMENTS}, column="text")
    with pytest.raises(UserError, match=r"set \[v2\]': a folder with .* in its name") as caught:
        load_text(config(tmp_path / "set [v2]", eval_split="test"))
    assert "\n" not in str(caught.value)
