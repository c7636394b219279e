"""Small records in JSON, read back as what they were written from; what is damaged is one message."""

import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from spd.config import UserError, shown
from spd.run_files import read_json

Kinds = Mapping[str, tuple[type, ...]]


def read_record(path: Path, cls: type) -> dict[str, Any]:
    """The fields of a `NamedTuple` in a JSON file, or a `UserError` if they are none of it.

    Values are checked as JSON has them: a path is text, a tuple a list. That is quick, as there are
    studies with thousands of them.
    """
    kinds, needed = _fields(cls)
    return checked_record(read_json(path), path, kinds, needed)


def checked_record(
    found: Any, path: Path, kinds: Kinds, needed: frozenset[str], *, others: bool = False
) -> dict[str, Any]:
    """The same of a value; with `others` it may have more keys."""
    if not isinstance(found, dict):
        raise UserError(f"{path}: an object is needed, got {shown(found)}")
    for name in needed:
        if name not in found:
            raise UserError(f"{path}: {name}: is missing")
    for name, value in found.items():
        if name not in kinds:
            if others:
                continue
            raise UserError(f"{path}: {name}: is none of {', '.join(kinds)}")
        kind = kinds[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            words = " or ".join(one.__name__ for one in kind)
            raise UserError(f"{path}: {name}: of the kind {words}, got {shown(value)}")
    return found


@cache
def _fields(cls: Any) -> tuple[Kinds, frozenset[str]]:
    hints = typing.get_type_hints(cls)
    kinds = {name: _kinds(hints[name]) for name in cls._fields}
    return kinds, frozenset(cls._fields).difference(cls._field_defaults)


def _kinds(annotation: Any) -> tuple[type, ...]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(annotation) for kind in _kinds(part))
    if annotation is float:
        return (int, float)
    if annotation is Path or origin is Literal:
        return (str,)
    if origin is tuple:
        return (list,)
    return (origin or annotation,)
