"""What every command shares: its log, its signals, its device, its exit status. Knows no run."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spd.config import Exit, RunError, UserError, report_error
from spd.engine.distributed import SaidByLeader, is_leader, own_gpu

ALLOWED_DEVICES = "(allowed: auto, or one that torch has here, as cpu, cuda or cuda:1)"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn exceptions into one message and the exit status of a command, an `Exit`."""
    try:
        yield
    except (UserError, RunError) as error:
        # With several processes, each comes here with an error of the run or of its leader.
        said_elsewhere = isinstance(error, SaidByLeader) or (
            isinstance(error, RunError) and not is_leader()
        )
        raise SystemExit(error.status if said_elsewhere else report_error(error)) from None
    except OSError as error:
        if not isinstance(error.filename, str | bytes | Path):
            raise
        name = os.fsdecode(error.filename)
        shown = name if len(name) <= 300 else f"{name[:300]}…"
        refused = UserError(f"{shown}: {error.strerror}")
        raise SystemExit(report_error(refused)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(Exit.INTERRUPTED) from None


class _AboveTheBar(logging.Handler):
    """Writes to stderr without tearing a progress bar that is shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def console_log() -> Iterator[None]:
    """Log lines as plain text on stderr, for the time of a command."""
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("spd")
    root.setLevel(logging.INFO if is_leader() else logging.WARNING)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


_whose: ContextVar[Path | None] = ContextVar("whose", default=None)


@contextmanager
def lines_of(directory: Path) -> Iterator[None]:
    """What is logged meanwhile is about the run in `directory`, and stands in no other run's log."""
    token = _whose.set(directory)
    try:
        yield
    finally:
        _whose.reset(token)


def _mark(record: logging.LogRecord) -> bool:
    """Note in a line of the log which run it is about, while that can be told."""
    record.__dict__.setdefault("spd_run", _whose.get())
    return True


class _RunLog(logging.FileHandler):
    """The log of one run: its own lines, and those that are about all runs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.addFilter(_mark)
        self.addFilter(lambda record: record.__dict__["spd_run"] in (None, path.parent))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Lines that a full disk does not take are on the terminal; what else it does not take says why."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def kept_log() -> Iterator[MemoryHandler]:
    """Keep the log lines that come before there is a file for them; for `file_log`."""
    kept = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    kept.addFilter(_mark)
    logging.getLogger("spd").addHandler(kept)
    try:
        yield kept
    finally:
        logging.getLogger("spd").removeHandler(kept)


@contextmanager
def file_log(path: Path, earlier: MemoryHandler) -> Iterator[Callable[[str], None]]:
    """Append log lines with their time to `path`, those that were kept first (and are kept on).

    What is yielded writes a line there alone, of what the terminal is told in another way.
    """
    handler = _RunLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for record in earlier.buffer:
        handler.handle(record)
    logging.getLogger("spd").addHandler(handler)
    try:
        yield lambda line: handler.emit(logging.makeLogRecord({"msg": line}))
    finally:
        logging.getLogger("spd").removeHandler(handler)
        handler.close()


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list; the same signal again acts as it always did."""
    noted: list[int] = []
    previous = {}

    def note(signum: int, frame: Any) -> None:
        noted.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield noted
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; any other must be usable, or it is a `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = own_gpu() if name == "cuda" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device: {name!r} cannot be used {ALLOWED_DEVICES}: {reason}") from None
    if device.type == "meta":
        raise UserError(f"device: {name!r} cannot be used {ALLOWED_DEVICES}: it computes nothing")
    return device
