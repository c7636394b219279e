"""Atomic checkpoints: parameters, optimizer, data position and random state at one step.

`checkpoints/<step>/` holds the state *before* anything of that step was logged or trained, and digests of
its files, with the step and what the run says of itself (`stamp`).
"""

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from spd.config import UserError
from spd.run_files import (
    DIGESTS_FILE,
    forbidden,
    read_json,
    sha256_of,
    write_json,
    write_safetensors,
)

MODEL_FILE = "model.safetensors"
STATE_FILE = "training_state"
PARTIAL = ".partial"


def save(
    directory: Path,
    step: int,
    *,
    parameters: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int,
    stamp: Mapping[str, Any] | None = None,
) -> Path:
    """Write `directory/<step>` so that it is there whole or not at all; keep the newest `keep`.

    What is to go is renamed before it is removed: a directory named by its step is always whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for remains in directory.glob(f".*{PARTIAL}"):  # of a process that was killed here
        shutil.rmtree(remains)
    final = directory / f"{step:08d}"
    partial = directory / f".{step:08d}{PARTIAL}"
    partial.mkdir()
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    try:
        write_safetensors(partial / MODEL_FILE, tensors, {"step": str(step)})
        _write_state(partial / STATE_FILE, {**state, "step": step})
        digests = {name: sha256_of(partial / name) for name in (MODEL_FILE, STATE_FILE)}
        write_json(partial / DIGESTS_FILE, {"step": step, **(stamp or {}), "files": digests})
        for path in (*partial.iterdir(), partial):
            _sync(path)
    except OSError:  # a disk that is full gets back what was written of it
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():
        _remove(final)
    partial.rename(final)
    _sync(directory)
    for old in steps(directory)[:-keep]:
        _remove(directory / f"{old:08d}")
    return final


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        try:
            torch.save(_plain(state), file)
        except RuntimeError as error:  # torch says where in the file it was, and hides why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def steps(directory: Path) -> list[int]:
    """The steps with a complete checkpoint, in order."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8,18}", name, re.ASCII))


def latest(directory: Path) -> Path | None:
    found = steps(directory)
    return directory / f"{found[-1]:08d}" if found else None


def remove_after(directory: Path, step: int) -> None:
    """Take away the checkpoints of later steps."""
    for later in steps(directory):
        if later > step:
            _remove(directory / f"{later:08d}")


def load_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """The parameters of one checkpoint, on the CPU; `UserError` if it cannot be read."""
    path = checkpoint / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            step = (file.metadata() or {}).get("step")
        parameters = load_file(path)
    except (SafetensorError, OSError) as error:
        raise (forbidden(path, error) or _damaged(path, error)) from None
    _check_step(path, step)
    return parameters


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer, data position and random state of one checkpoint."""
    path = checkpoint / STATE_FILE
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle raises almost anything
        raise (forbidden(path, error) or _damaged(path, error)) from None
    if not isinstance(state, dict) or "step" not in state:
        raise _damaged(path, ValueError("not the state of a run"))
    _check_step(path, state["step"])
    return state


def check_digests(checkpoint: Path, run_id: str | None, *, needed: bool) -> str | None:
    """What of a checkpoint is not as the run wrote it, in a sentence; None: nothing.

    Checkpoints of runs that carry no digests yet have none, unless they are `needed`.
    """
    path = checkpoint / DIGESTS_FILE
    if not path.is_file():
        return f"{path}: is missing{what_works(checkpoint)}" if needed else None
    record = read_json(path)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or set(files) != {MODEL_FILE, STATE_FILE}:
        return f"{path}: does not hold the digests of a checkpoint{what_works(checkpoint)}"
    if record.get("step") != int(checkpoint.name):
        return f"{path}: is of step {record.get('step')}{what_works(checkpoint)}"
    if run_id is not None and record.get("run") != run_id:
        return f"{path}: is of another run{what_works(checkpoint)}"
    for name, digest in files.items():
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name}: is missing{what_works(checkpoint)}"
        if sha256_of(checkpoint / name) != digest:
            return (
                f"{checkpoint / name}: is not what the run wrote there (its SHA-256 differs from that in"
                f" {DIGESTS_FILE}){what_works(checkpoint)}"
            )
    return None


def what_works(checkpoint: Path) -> str:
    """What can be done where one checkpoint is damaged, for the end of a message."""
    earlier = [step for step in steps(checkpoint.parent) if step < int(checkpoint.name)]
    for step in reversed(earlier):
        folder = checkpoint.parent / f"{step:08d}"
        if _is_whole(folder):
            others = [f"{other:08d}" for other in earlier if other > step]
            folders = "folder" if not others else "folders"
            moved = " and ".join([*others, checkpoint.name])
            return (
                f"; without the {folders} {moved}, moved elsewhere, the run goes on from the"
                f" checkpoint of step {step}, which is whole"
            )
    return (
        f"; there is no whole checkpoint before it: without the folder {checkpoint.name} the run would"
        " begin anew"
    )


def _plain(value: Any) -> Any:
    """The same in containers of its own: pickled, equal ones are the same bytes wherever they come from."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_plain(item) for item in value])
    return sys.intern(value) if type(value) is str else value


def _is_whole(checkpoint: Path) -> bool:
    """As far as it can be told from the folder alone."""
    names = (MODEL_FILE, STATE_FILE)
    if not all((checkpoint / name).is_file() for name in names):
        return False
    path = checkpoint / DIGESTS_FILE
    if not path.is_file():
        return True
    try:
        record = json.loads(path.read_bytes())
        right = record["step"] == int(checkpoint.name)
        return right and all(sha256_of(checkpoint / n) == record["files"][n] for n in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_step(path: Path, step: Any) -> None:
    if step is not None and str(step) != str(int(path.parent.name)):
        raise UserError(
            f"{path}: is of step {step}, not of the step that its folder names{what_works(path.parent)}"
        )


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        reason = "no such file"
    elif isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        # what torch says comes with an advice to run what the file holds
        reason = "it holds something else than tensors and plain values, or was cut short"
    else:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path}: the checkpoint is damaged ({reason}){what_works(path.parent)}")


def _remove(directory: Path) -> None:
    doomed = directory.with_name(f".{directory.name}.old{PARTIAL}")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
