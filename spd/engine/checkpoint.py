"""Atomic checkpoints: parameters, optimizer, data position and random state at one step.

`checkpoints/<step>/` holds the state *before* anything of that step was logged or trained.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spd.config import UserError
from spd.run_files import forbidden, write_safetensors

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
    write_safetensors(partial / MODEL_FILE, tensors, {"step": str(step)})
    torch.save({**state, "step": step}, partial / STATE_FILE)
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if final.exists():
        _remove(final)
    partial.rename(final)
    _sync(directory)
    for old in steps(directory)[:-keep]:
        _remove(directory / f"{old:08d}")
    return final


def steps(directory: Path) -> list[int]:
    """The steps with a complete checkpoint, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def latest(directory: Path) -> Path | None:
    found = steps(directory)
    return directory / f"{found[-1]:08d}" if found else None


def load_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """The parameters of one checkpoint, on the CPU; `UserError` if it cannot be read."""
    path = checkpoint / MODEL_FILE
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise (forbidden(path, error) or _damaged(path, error)) from None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer, data position and random state of one checkpoint."""
    path = checkpoint / STATE_FILE
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle raises almost anything
        raise (forbidden(path, error) or _damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> UserError:
    missing = isinstance(error, FileNotFoundError)
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(
        f"{path}: the checkpoint is damaged ({'no such file' if missing else reason}); without the"
        f" folder {path.parent.name} the run goes on from the checkpoint before it"
    )


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
