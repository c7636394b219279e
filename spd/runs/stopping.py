"""Why a run had to stop that nobody asked to: what the disk or the memory did not give, in one message."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spd.config import RunError, UserError
from spd.run_files import META_FILE, read_meta, write_json

SPARE_FILE = ".spare"
SPARE_BYTES = 256 * 1024
"""for meta.json and the last lines of the log"""
NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


@contextmanager
def spare_room(directory: Path) -> Iterator[Callable[[], None]]:
    """Keep some room on the disk while a run writes, so that one that fills it can still say so.

    What is yielded gives it back.
    """
    path = directory / SPARE_FILE

    def give_back() -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)

    try:
        path.write_bytes(bytes(SPARE_BYTES))
        yield give_back
    finally:
        give_back()


def write_end(directory: Path, meta: dict[str, Any]) -> None:
    """Write the record of a run that has not finished, if it is still there and can be written.

    In a directory that was deleted, or holds another run by now, nothing is written. What it would have
    said is said elsewhere.
    """
    with suppress(OSError, UserError):
        if read_meta(directory).get("run_id") == meta["run_id"]:
            write_json(directory / META_FILE, meta)


@contextmanager
def in_one_message(directory: Path, go_on_with: str) -> Iterator[None]:
    """Turn what the disk or the memory refuses into a `RunError`."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        place = directory if error.filename is None else error.filename
        raise RunError(
            f"{place}: {error.strerror}; the run stops here, and goes on once that is mended, with"
            f" {go_on_with}"
        ) from None
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if not isinstance(error, MemoryError) and not any(words in said for words in NO_MEMORY):
            raise
        reason = str(error).partition("\n")[0][:200] or "MemoryError"
        raise RunError(
            f"{directory}: the memory does not suffice: {reason}; a smaller batch_size, fewer"
            " subcomponents, or passes: one_by_one need less"
        ) from None
