"""Command lines: fire takes them apart, pydantic says whether they are right, and nothing runs before.

fire calls a function first and complains afterwards. The function that it is given here only hands
back what it was given, as text; work begins when `read_arguments` has returned.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import fire
from fire.decorators import SetParseFn

from spd.config import BaseConfig, UserError, report_error
from spd.settings import load_env

TRUTH = ("true", "false", "yes", "no", "on", "off", "1", "0")


class Arguments:
    """What stands on a command line, as text. Nothing that fire could call or look into."""

    __slots__ = ("options", "positional")

    def __init__(self, positional: list[str], options: dict[str, str]) -> None:
        self.positional, self.options = positional, options


class Command(NamedTuple):
    """A command as its user meets it."""

    name: str
    usage: str
    about: str
    options: type[BaseConfig]


def read_arguments(command: Command, argv: Sequence[str] | None = None) -> Arguments:
    """The positional arguments and the options of a command line, or a `UserError`.

    `--help` prints what there is and ends the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(help_text(command))
        raise SystemExit(0)
    taken: list[Arguments] = []

    @SetParseFn(str)
    def hand_back(*positional: str, **options: str) -> None:
        taken.append(Arguments(list(positional), options))

    fire.Fire(hand_back, _with_values(command, words), name=command.name)
    (arguments,) = taken
    return arguments


def run_command(
    command: Command, run: Callable[[Arguments], int], argv: Sequence[str] | None
) -> NoReturn:
    """Exit with the status that `run` returns for the command line, or with that of a `UserError`."""
    try:
        load_env()
        status = run(read_arguments(command, argv))
    except UserError as error:
        status = report_error(error)
    raise SystemExit(status)


def help_text(command: Command) -> str:
    """Usage, and every option with its meaning and default."""
    lines = [f"usage: {command.name} {command.usage}", "", command.about, "", "options:"]
    for name, field in command.options.model_fields.items():
        default = "" if field.default in (None, False, ()) else f" (default: {field.default})"
        lines.append(f"  --{name:<14} {field.description or ''}{default}")
    return "\n".join(lines)


def _with_values(command: Command, words: list[str]) -> list[str]:
    """Every option in the form `--name=value`: a switch does not swallow the word after it."""
    fields = command.options.model_fields
    switches = {name for name, field in fields.items() if field.annotation is bool}
    result, seen, index = [], set(), 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("-") or _is_number(word):
            result.append(word)
            continue
        if word.strip("-") == "":
            raise UserError(f"{command.name}: {word!r} has no meaning here; see --help")
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        follows = words[index] if index < len(words) else None
        if not equals and name in switches:
            value = "true"
            if follows is not None and follows.lower() in TRUTH:
                value, index = follows, index + 1
        elif not equals:
            if follows is None or (follows.startswith("-") and not _is_number(follows)):
                if name in fields:
                    raise UserError(f"{command.name}: --{name}: a value is required")
                value = "true"
            else:
                value, index = follows, index + 1
        if name in seen:
            raise UserError(f"{command.name}: --{name}: given more than once")
        seen.add(name)
        result.append(f"--{name}={value}")
    return result


def _is_number(word: str) -> bool:
    """Whether a word is a number or a list of them: `-1,2` is a value, not an option."""
    try:
        float(word.partition(",")[0])
    except ValueError:
        return False
    return True


def split_list(value: Any) -> Any:
    """`a,b` or `[a, b]` as a list of words; anything else as it is."""
    if not isinstance(value, str):
        return value
    words = value.strip().removeprefix("[").removesuffix("]").split(",")
    return [word.strip() for word in words if word.strip()]


def unused(given: Mapping[str, Any], names: Sequence[str]) -> str:
    """The options among `names` that were given, for a message."""
    return ", ".join(f"--{name}" for name in names if given.get(name) is not None)
