"""What lies where in a run directory, and its small records. Knows no model and starts nothing."""

import json
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import AfterValidator

from spd.config import UserError

CONFIG_FILE, META_FILE, RESULT_FILE, LOG_FILE = "config.yaml", "meta.json", "result.json", "log.txt"
CHECKPOINTS, TARGET, LOCK_FILE = "checkpoints", "target", ".lock"
METRICS_FILE, TIMINGS_FILE, FIGURES = "metrics.jsonl", "timings.jsonl", "figures"
EVALUATION_FILE = "evaluation.json"
"""of a run that has not finished: its figures of merit at the checkpoint that its page shows"""
META_KEYS = ("entry", "seconds")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} cannot name a folder: up to 100 letters, digits, '.', '_' and '-' are"
            " allowed, beginning with a letter or digit"
        )
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


def cut_lines(path: Path, step: int) -> None:
    """Drop lines at or after `step`, and a last line that was cut short, from a JSON-lines file."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] < step:
                kept.append(line)
        except ValueError:
            continue
    atomic_write(path, "".join(kept))


def read_meta(directory: Path) -> dict[str, Any]:
    """What is recorded about a run, or a `UserError` if `directory` does not hold one."""
    for name in (CONFIG_FILE, META_FILE):
        try:
            there = (directory / name).is_file()
        except PermissionError:
            raise _denied(directory / name) from None
        if not there:
            raise UserError(f"{directory}: no {name} there; a run directory is expected")
    meta = read_json(directory / META_FILE)
    missing = [key for key in META_KEYS if not isinstance(meta, dict) or key not in meta]
    if missing:
        raise UserError(
            f"{directory / META_FILE}: not the record of a run, {missing[0]!r} is missing"
        )
    return meta


def is_run(directory: Path) -> bool:
    """Whether a run lies there, whatever its state."""
    return all((directory / name).is_file() for name in (CONFIG_FILE, META_FILE))


def has_finished(directory: Path) -> bool:
    """Whether there is a run that came to its end."""
    return (directory / META_FILE).is_file() and read_meta(directory).get("status") == "finished"


def read_json(path: Path) -> Any:
    """The value in a JSON file, or a `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = forbidden(path, error) or UserError(f"{path}: not valid JSON: {error}")
        raise found from None


def forbidden(path: Path, error: Exception) -> UserError | None:
    """What to raise if it is a lack of permission that keeps a file from being read, else None.

    The error may hide it: safetensors says of such a file that there is none.
    """
    if not isinstance(error, PermissionError):
        try:
            path.open("rb").close()
        except PermissionError:
            pass
        except OSError:
            return None
        else:
            return None
    return _denied(path)


def _denied(path: Path) -> UserError:
    return UserError(
        f"{path}: may not be read: permission denied; its owner can allow it (chmod -R a+rX, on the folder)"
    )


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed here, or a link to somewhere
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors, whole or not at all, into a file with the mode that the umask gives."""
    # imported here: it imports torch, which not all readers of runs need
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file(dict(tensors), partial, metadata=metadata)
    give_usual_mode(partial)
    partial.replace(path)


def give_usual_mode(path: Path) -> None:
    """Give a file the mode that the umask gives to new ones; safetensors writes for the owner alone."""
    new = path.with_name(f".{path.name}.mode")
    new.touch()
    path.chmod(stat.S_IMODE(new.stat().st_mode))
    new.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def seed_directory(directory: Path, seed: int) -> Path:
    """Where the run of one seed lies if runs of several have been given `directory`."""
    return directory.with_name(f"{directory.name}-seed{seed}")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `directory` when that is done, which is there whole or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if partial.exists():  # of a process that was killed here
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{directory.parent}: the output root cannot be written ({error.strerror});"
            " set SPD_OUT_DIR to a writable folder"
        ) from None
    yield partial
    partial.rename(directory)


def refuse_other_files(directory: Path) -> None:
    """`UserError` if something else than a run lies where a run is wanted."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise UserError(
            f"--run_dir {directory}: holds something else than a run; a new or an empty folder is"
            " allowed, or a run, which is then continued"
        )


@contextmanager
def sole_use(directory: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes away from a run, or raise a `UserError` if one is working on it.

    It is given `patience` seconds to end.
    """
    lock = FileLock(directory / LOCK_FILE)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{directory}: another process is working on this run") from None
    try:
        yield
    finally:
        lock.release()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The logged lines of a run, in order, without a last one that was cut short."""
    path = directory / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run directory is expected")
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except PermissionError:
        raise _denied(path) from None
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path}: a line is not valid JSON: {error}") from None
