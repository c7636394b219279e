"""What lies where in a run directory, and its small records. Knows no model and starts nothing."""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from spd.config import RunError, UserError

CONFIG_FILE, META_FILE, RESULT_FILE, LOG_FILE = "config.yaml", "meta.json", "result.json", "log.txt"
CHECKPOINTS, TARGET, LOCK_FILE = "checkpoints", "target", ".lock"
METRICS_FILE, TIMINGS_FILE, FIGURES = "metrics.jsonl", "timings.jsonl", "figures"
EVALUATION_FILE = "evaluation.json"
"""of a run that has not finished: its figures of merit at the checkpoint that its page shows"""
REPORT_FILE, DIGESTS_FILE = "report.html", "digests.json"
STARTS, STARTS_FILE, STARTS_PAGE = "starts", "starts.json", "starts.html"
"""of a run with several starts: a folder with one for each of them, what became of them, and its page"""
META_KEYS = ("entry", "seconds")
FILES = (
    *(CONFIG_FILE, META_FILE, RESULT_FILE, LOG_FILE, LOCK_FILE),
    *(METRICS_FILE, TIMINGS_FILE, EVALUATION_FILE, REPORT_FILE, STARTS_FILE, STARTS_PAGE),
)
FOLDERS = (CHECKPOINTS, TARGET, FIGURES, STARTS)
FORMAT = 1
"""of run directories, as meta.json says it; runs that say none are older, and carry no digests"""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} cannot name a folder: up to 100 letters, digits, '.', '_' and '-' are"
            " allowed, beginning with a letter or digit"
        )
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


class _Record(BaseModel):
    """What meta.json holds, as far as it is there."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: Annotated[int, Field(ge=0)] = 0
    entry: dict[str, Any] = {}
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    num_threads: Annotated[int, Field(ge=1)] = 1
    n_processes: Annotated[int, Field(ge=1)] = 1
    status: str = ""
    run_id: str = ""
    wandb_id: str = "none"
    config: dict[str, Any] = {}
    digests: dict[str, str] = {}
    matrices: str = ""
    side_by_side: "_Beside | None" = None
    versions: dict[str, str] | None = None
    reason: str | None = None
    tracker: str | None = None
    command: str | None = None
    commit: str | None = None
    host: str | None = None
    device: str | None = None
    started: str | None = None


class _Beside(BaseModel):
    page: str
    runs: list[str]


def cut_lines(path: Path, step: int) -> None:
    """Drop lines at or after `step`, and what is no whole line of a step, from a JSON-lines file."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    atomic_write(path, "".join(kept))


def read_meta(directory: Path) -> dict[str, Any]:
    """What is recorded about a run, or a `UserError` if `directory` does not hold one that can be read."""
    for name in (CONFIG_FILE, META_FILE):
        try:
            there = (directory / name).is_file()
        except PermissionError:
            raise _denied(directory / name) from None
        except OSError as error:  # a name that is too long
            raise UserError(f"{directory}: {error.strerror}; a run directory is expected") from None
        if not there:
            raise UserError(f"{directory}: no {name} there; a run directory is expected")
    _check_layout(directory)
    meta = read_json(directory / META_FILE)
    missing = [key for key in META_KEYS if not isinstance(meta, dict) or key not in meta]
    if missing:
        raise UserError(
            f"{directory / META_FILE}: not the record of a run, {missing[0]!r} is missing"
        )
    check_record(meta, directory / META_FILE)
    return meta


def check_record(meta: Any, path: Path) -> None:
    """`UserError` unless what meta.json holds is of the right kinds, and of a format that is known here."""
    if not isinstance(meta, dict):
        raise UserError(f"{path}: not the record of a run, but {_short(meta)}")
    found = meta.get("format", 0)
    if isinstance(found, int) and found > FORMAT:
        made_by = (meta.get("versions") or {}).get("spd", "a newer release")
        raise UserError(
            f"{path}: format: {found} of run directories is that of spd {made_by}, which reads it; this"
            f" release reads up to {FORMAT}"
        )
    try:
        _Record.model_validate(meta)
    except ValidationError as error:
        wrong = error.errors()[0]
        place, said = ".".join(map(str, wrong["loc"])), wrong["msg"]
        said = said[0].lower() + said[1:]
        raise UserError(f"{path}: {place}: {said}, got {_short(wrong['input'])}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_layout(directory: Path) -> None:
    """`UserError` if a folder lies where a file of a run is to be, or the other way round."""
    for name in FILES:
        if (directory / name).exists() and not (directory / name).is_file():
            raise UserError(f"{directory / name}: a file of the run is to be there, and is none")
    for name in FOLDERS:
        if (directory / name).exists() and not (directory / name).is_dir():
            raise UserError(f"{directory / name}: a folder of the run is to be there, and is none")


def sha256_of(path: Path) -> str:
    """The digest of a file of any size, or a `UserError` if it may not be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise _denied(path) from None


def is_run(directory: Path) -> bool:
    """Whether a run lies there, whatever its state."""
    return all((directory / name).is_file() for name in (CONFIG_FILE, META_FILE))


def has_finished(directory: Path) -> bool:
    """Whether there is a run that came to its end."""
    return (directory / META_FILE).is_file() and read_meta(directory).get("status") == "finished"


def read_json(path: Path) -> Any:
    """The value in a JSON file, or a `UserError` if it is damaged."""
    try:
        with open(path, "rb") as file:  # a third of the time that `path.read_text` takes
            return json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    with _removed_if_cut_short(partial):
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors, whole or not at all, into a file with the mode that the umask gives."""
    # imported here: it imports torch, which not all readers of runs need
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    with _removed_if_cut_short(partial):
        try:
            save_file(dict(tensors), partial, metadata=metadata)
        except SafetensorError as error:
            raise _as_os_error(error, path) from None
        give_usual_mode(partial)
    partial.replace(path)


@contextmanager
def _removed_if_cut_short(partial: Path) -> Iterator[None]:
    """A disk that is full gets back what was written of a file before it was."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _as_os_error(error: Exception, path: Path) -> Exception:
    """What safetensors says of a file that cannot be written, with the number that it has hidden there."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else error


def give_usual_mode(path: Path) -> None:
    """Give a file the mode that the umask gives to new ones; safetensors writes for the owner alone."""
    new = path.with_name(f".{path.name}.mode")
    new.touch()
    path.chmod(stat.S_IMODE(new.stat().st_mode))
    new.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def new_name(folder: Path) -> str:
    """A name for a run or a study that nothing in `folder` bears, or a part of: the time and a number.

    The time is for the reader. Where a clock goes backwards, no name comes a second time.
    """
    there = os.listdir(folder) if folder.is_dir() else []
    while True:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        if not any(name in other for other in there):
            return name


def seed_directory(directory: Path, seed: int) -> Path:
    """Where the run of one seed lies if runs of several have been given `directory`."""
    return directory.with_name(f"{directory.name}-seed{seed}")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `directory` when that is done, which is there whole or not at all.

    One process at a time fills it: a second one gets a `UserError`, whatever it was about to write.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if partial.is_symlink():
            partial.unlink()
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory.parent}: the output root cannot be written ({error.strerror});"
            " set SPD_OUT_DIR to a writable folder"
        ) from None
    with sole_use(partial, name=directory):
        try:
            _empty(partial)  # of what a process left that was killed here
            yield partial
            partial.rename(directory)
            (directory / LOCK_FILE).unlink(missing_ok=True)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise RunError(f"{directory}: cannot be written: {reason}") from None
            raise


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def refuse_other_files(directory: Path) -> None:
    """`UserError` if something else than a run lies where a run is wanted, or below a file."""
    there = next(parent for parent in directory.absolute().parents if os.path.lexists(parent))
    if not there.is_dir():
        raise UserError(
            f"--run_dir {directory}: {there} is no folder; set SPD_OUT_DIR to a writable folder, or name"
            " another one"
        )
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise UserError(
            f"--run_dir {directory}: holds something else than a run; a new or an empty folder is"
            " allowed, or a run, which is then continued"
        )


@contextmanager
def sole_use(directory: Path, *, patience: float = 0.0, name: Path | None = None) -> Iterator[None]:
    """Keep other processes away from a run, or raise a `UserError` if one is working on it.

    It is given `patience` seconds to end. The message calls the run by `name`.
    """
    lock = FileLock(directory / LOCK_FILE)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{name or directory}: another process is working on this run") from None
    try:
        yield
    finally:
        lock.release()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The logged lines of a run, in order, without a last one that was cut short."""
    path = directory / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run directory is expected")
    return read_lines(path)


def read_lines(path: Path) -> list[dict[str, float]]:
    """The objects of numbers in a file of a run, one a line, without a last one that was cut short."""
    try:
        return parsed_lines(path, path.read_bytes())
    except PermissionError:
        raise _denied(path) from None


def parsed_lines(path: Path, content: bytes) -> list[dict[str, float]]:
    """The same of what has been read of it."""
    lines = content.splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            found.append(_numbers(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: a line is {error} (line {number})") from None
    return found


def _numbers(line: bytes) -> dict[str, float]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict) or "step" not in values:
        raise ValueError(f"no object with a 'step', but {_short(values)}")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"not of numbers: {_short(key)} is {_short(value)}")
    return values
