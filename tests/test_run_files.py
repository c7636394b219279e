"""Small files of a run are there whole or not at all."""

from pathlib import Path

import pytest

from spd.config import RunError, UserError
from spd.run_files import (
    atomic_write,
    new_directory,
    read_json,
    refuse_other_files,
    write_json,
)


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


def test_a_folder_is_filled_by_one_process_at_a_time(tmp_path: Path):
    run = tmp_path / "out" / "run"
    with new_directory(run) as partial:
        (partial / "mine").write_text("1")
        with (
            pytest.raises(UserError, match="another process is working on this run"),
            new_directory(run),
        ):
            raise AssertionError("is kept out")
        assert (partial / "mine").read_text() == "1" and not run.exists()
    assert [path.name for path in run.iterdir()] == ["mine"]
    assert list(run.parent.iterdir()) == [run]


def test_a_folder_that_another_process_has_filled_meanwhile_stays_as_it_is(tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(RunError, match="run: cannot be written: "), new_directory(run) as partial:
        (partial / "mine").touch()
        run.mkdir()
        (run / "its").touch()
    assert [path.name for path in run.iterdir()] == ["its"]
    assert list(tmp_path.iterdir()) == [run]


def test_what_a_killed_process_has_left_is_no_part_of_the_new_folder(tmp_path: Path):
    remains = tmp_path / ".run.partial"
    (remains / "target").mkdir(parents=True)
    (remains / "target" / "weights").touch()
    (remains / "config.yaml").touch()
    (remains / ".lock").touch()
    (remains / "link").symlink_to(tmp_path)
    with new_directory(tmp_path / "run") as partial:
        (partial / "mine").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").touch()
    (tmp_path / ".run.partial").symlink_to(tmp_path / "others")
    with new_directory(tmp_path / "run") as partial:
        (partial / "mine").touch()
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["file"]
    assert not (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("wrong"), OSError(28, "full")])
def test_a_folder_that_was_given_up_leaves_nothing(tmp_path: Path, error: BaseException):
    with pytest.raises((type(error), RunError)), new_directory(tmp_path / "run") as partial:
        (partial / "mine").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_run_below_a_file_is_refused_before_anything_is_trained(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        refuse_other_files(tmp_path / "file" / "a" / "run")
    refuse_other_files(tmp_path / "new" / "folders" / "run")
