"""What a user is told of a mistake, and the exit statuses."""

import sys
from enum import IntEnum


class Exit(IntEnum):
    """The exit statuses of all commands."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    """of the user, in a configuration or on a command line"""
    UNREACHABLE = 3
    """data or a model cannot be had from here"""
    INTERRUPTED = 130
    """by Ctrl-C: 128 and the number of the signal, as of any other signal"""
    TERMINATED = 143


class UserError(ValueError):
    """A mistake in what the user gave: shown as one message, without a traceback."""

    status = Exit.MISTAKE


class Unreachable(UserError):  # noqa: N818 - it is a condition of the surroundings
    """Data or a model that cannot be had from here, as without a network or a key."""

    status = Exit.UNREACHABLE


class RunError(RuntimeError):
    """Work that was done in vain, for a reason that one message tells."""

    status = Exit.FAILED


def report_error(error: UserError | RunError) -> Exit:
    """Print the message of an error on stderr; the exit status that belongs to it."""
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return error.status


def printable(text: str) -> str:
    """The same, with what no terminal shows (and would obey) written as Python writes it in a string."""
    kept = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "".join(kept)


def counted(n: float, noun: str, plural: str | None = None) -> str:
    """`1 error`, `2 errors`, `1,000 errors`; `plural` where an s does not make it."""
    return f"{n:,g} {noun}" if n == 1 else f"{n:,.0f} {plural or f'{noun}s'}"


def shown(value: object) -> str:
    """The `repr` of a value, for a message: one that is long is cut."""
    return cut(repr(value), 200)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
