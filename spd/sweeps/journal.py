"""The file in which an Optuna study is kept, line by line, for several processes at a time."""

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from spd.config import UserError, shown

_STORAGES: dict[Path, "tuple[Journal, JournalStorage]"] = {}
"""of this process: what was read once is not read again"""


class Journal(JournalFileBackend):
    """Drops a last line that was cut short, as by a full disk, before another is written after it.

    Its lock is one that the system takes from a process that is killed, so that nobody waits for it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._own_lock = path, FileLock(f"{path}.mend")
        self._in_one_go = False

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """`UserError` where a line is none of a journal's."""
        try:
            for log in super().read_logs(log_number_from):
                if not isinstance(log, dict) or not isinstance(log.get("op_code"), int):
                    raise ValueError(f"a line is {shown(log)}")
                yield log
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._path}: not the journal of a sweep: {error}") from None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._own_lock, self._path.open("rb+") as file:
            self._drop_torn_line(file)
            file.write(lines.encode())
            file.flush()
            if not self._in_one_go:
                os.fsync(file.fileno())

    @contextmanager
    def in_one_go(self) -> Iterator[None]:
        """Many lines, which are sure to be on the disk when all have been written."""
        self._in_one_go = True
        try:
            yield
        finally:
            self._in_one_go = False
            with self._path.open("rb+") as file:
                os.fsync(file.fileno())

    def lost_lines(self) -> bool:
        """Whether the file has less than was read of it."""
        return self._path.stat().st_size < max(self._log_number_offset.values())

    def _drop_torn_line(self, file: BinaryIO) -> None:
        """Leave the file at its end, which is that of a whole line."""
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        file.truncate(file.seek(file.read().rfind(b"\n") + 1))
        print(f"{self._path}: its last line was cut short and is left out", file=sys.stderr)


def open_journal(path: Path) -> tuple[Journal, JournalStorage]:
    """The journal there, made if there is none, and what Optuna keeps in it.

    A process reads every line once: a trial costs the last agent no more than the first.
    """
    path = path.absolute()
    known = _STORAGES.get(path)
    if known is None or not path.exists() or known[0].lost_lines():
        journal = Journal(path)
        known = _STORAGES[path] = (journal, JournalStorage(journal))
    return known
