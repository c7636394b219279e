"""Small files of a run are there whole or not at all."""

from pathlib import Path

import pytest

from spd.run_files import atomic_write, read_json, write_json


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path):
    atomic_write(tmp_path / "text", "ä\r\nb\n")
    atomic_write(tmp_path / "bytes", b"\xff\x00")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa4\r\nb\n"
    assert (tmp_path / "bytes").read_bytes() == b"\xff\x00"
    write_json(tmp_path / "json", {"a": [1.5, None]})
    assert read_json(tmp_path / "json") == {"a": [1.5, None]}
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bytes", "json"}


def test_a_file_that_cannot_be_written_to_its_end_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "page.html"
    atomic_write(path, "old")

    def disk_full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
