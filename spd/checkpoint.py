"""Atomic checkpoints: parameters, optimizer, data position and random state at one step.

`checkpoints/<step>/` holds the state *before* anything of that step was logged or trained.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd.config import UserError

MODEL_FILE = "model.safetensors"
STATE_FILE = "training_state"


def save(
    directory: Path, step: int, *, parameters: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `directory/<step>` so that it is there whole or not at all; keep the newest `keep`."""
    final = directory / f"{step:08d}"
    partial = directory / f".{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    save_file(tensors, partial / MODEL_FILE, metadata={"step": str(step)})
    torch.save({**state, "step": step}, partial / STATE_FILE)
    for path in partial.iterdir():
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(directory)
    for old in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"{old:08d}")
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
    """The parameters of one checkpoint, on the CPU; `UserError` if the file is missing or damaged."""
    path = checkpoint / MODEL_FILE
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the checkpoint is damaged ({error})") from None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer, data position and random state of one checkpoint."""
    path = checkpoint / STATE_FILE
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the checkpoint") from None
    except Exception as error:  # a damaged pickle raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: the checkpoint is damaged ({reason})") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
