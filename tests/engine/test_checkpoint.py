"""Checkpoints are there whole or not at all, and the newest are kept."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd.config import UserError
from spd.engine import checkpoint
from tests.run_fixtures import SERVER


def parameters(value: float) -> dict[str, Tensor]:
    return {"a.V": torch.full((2, 3), value), "a.U": torch.full((3,), value).expand(2, 3)}


def save(directory: Path, step: int, keep: int = 2) -> Path:
    state = {"optimizer": {"lr": 0.5}, "rng": torch.arange(3)}
    return checkpoint.save(directory, step, parameters=parameters(step), state=state, keep=keep)


def test_what_is_saved_is_loaded(tmp_path: Path):
    path = save(tmp_path / "new" / "checkpoints", 7)
    assert path.name == "00000007" and checkpoint.latest(path.parent) == path
    loaded = checkpoint.load_parameters(path)
    assert loaded.keys() == parameters(7).keys()
    assert all(torch.equal(loaded[name], value) for name, value in parameters(7).items())
    state = checkpoint.load_state(path)
    assert state["step"] == 7 and state["optimizer"] == {"lr": 0.5}
    assert torch.equal(state["rng"], torch.arange(3))


def test_the_newest_are_kept(tmp_path: Path):
    for step in (2, 4, 10, 100):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [10, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000100"]
    save(tmp_path, 101, keep=1)
    assert checkpoint.steps(tmp_path) == [101]


def test_a_step_may_be_saved_again(tmp_path: Path):
    save(tmp_path, 3)
    checkpoint.save(tmp_path, 3, parameters=parameters(9), state={}, keep=2)
    assert checkpoint.load_parameters(tmp_path / "00000003")["a.V"][0, 0] == 9
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "x") is None
    (tmp_path / ".00000005.partial").mkdir()
    (tmp_path / "00000005.copy").mkdir()
    assert checkpoint.steps(tmp_path) == []


def test_remains_of_a_killed_process_are_cleared_away_and_other_files_are_not(tmp_path: Path):
    (tmp_path / ".00000001.partial").mkdir()
    (tmp_path / ".DS_Store").touch()
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".DS_Store", "00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "training_state"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "directory"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str):
    path = save(tmp_path, 5)
    file = path / name
    whole = file.read_bytes()
    file.unlink()
    match damage:
        case "empty":
            file.touch()
        case "cut":
            file.write_bytes(whole[: len(whole) // 2])
        case "noise":
            file.write_bytes(bytes(range(256)) * 20)
        case "directory":
            file.mkdir()
    load = checkpoint.load_parameters if name == "model.safetensors" else checkpoint.load_state
    with pytest.raises(UserError, match=f"{file}: the checkpoint is damaged") as caught:
        load(path)
    assert "without the folder 00000005" in str(caught.value)
    assert ("no such file" in str(caught.value)) == (damage == "missing")


def _save_and_die(directory: Path, events: int, step: int) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.startswith(("os.", "open")) and str(args[0]).startswith(str(directory)):
            seen += 1
            if seen > events:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(directory, step, keep=1)


@pytest.mark.slow
def test_every_checkpoint_there_is_can_be_loaded_wherever_saving_was_killed(tmp_path: Path):
    """Saving step 2 over an older 2 and a 1, killed before each of its file operations."""
    for events in range(40):
        directory = tmp_path / str(events)
        for step in (1, 2):
            save(directory, step)
        process = SERVER.Process(target=_save_and_die, args=(directory, events, 2))
        process.start()
        process.join()
        status = process.exitcode
        process.close()
        found = checkpoint.steps(directory)
        assert found and set(found) <= {1, 2}
        for step in found:
            path = directory / f"{step:08d}"
            assert checkpoint.load_parameters(path)["a.V"][0, 0] == step
            assert checkpoint.load_state(path)["step"] == step
        if status == 0:
            assert found == [2] and len(list(directory.iterdir())) == 1
            return
        assert status == -signal.SIGKILL
    pytest.fail("saving takes more file operations than were tried")
