"""Configuration: frozen pydantic models, read from YAML, changed by dotted overrides.

Everything a user can get wrong in a configuration ends here as one `UserError` that names the
value, its place and what is allowed.
"""

import difflib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Config = TypeVar("Config", bound="BaseConfig")


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
    print(f"error: {error}", file=sys.stderr)
    return error.status


class BaseConfig(BaseModel):
    """Frozen, and unknown keys are errors. Floats stay lax: YAML 1.1 reads `1e-3` as a string."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    open_group: ClassVar[str | None] = None
    """A field that is a group of settings whose keys an override may name without it."""


def _add_types(raw: Any) -> Any:
    if not isinstance(raw, Mapping):
        return raw
    tagged = {}
    for name, spec in raw.items():
        spec = {} if spec is None else spec
        tagged[name] = {"type": name, **spec} if isinstance(spec, Mapping) else spec
    return tagged


NAME_IS_TYPE = BeforeValidator(_add_types)
"""Marks a mapping `name → spec` in which the name selects the spec's class by its field `type`.

`{faithfulness: {coeff: 1}}` reads as `{faithfulness: {type: faithfulness, coeff: 1}}`; an explicit `type`
lets two entries of one type stand side by side under names of their own.
"""
BY_TYPE = Field(discriminator="type")
"""Marks the union of the specs."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a `UserError` that says what is wrong with the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a YAML configuration is expected") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"{path}: a mapping of settings is expected, found {found}")
    return raw


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with every `dotted.key=value` applied; values are YAML (`null`, `[0, 1]`).

    Keys may contain dots themselves (`sites.hidden_layers.0=50`): at every level the longest
    existing key that fits is taken.
    """
    result = _copy(raw)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise UserError(f"override {override!r}: expected key=value, for example steps=1000")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML") from None
        _set(result, path.strip(), value, override)
    return result


def full_key(cls: type[BaseConfig], key: str) -> str:
    """The key that a setting has in a file; an override may leave out the name of `open_group`."""
    head = key.split(".", 1)[0]
    return f"{cls.open_group}.{key}" if head in _open_keys(cls) else key


def parse(cls: type[Config], raw: Mapping[str, Any], source: str) -> Config:
    """Validate `raw` as a `cls`; one `UserError`, beginning with `source`, lists all problems."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(cls, details) for details in error.errors()]
        raise UserError(f"{source}: " + "\n  ".join(lines)) from None


def load_config(cls: type[Config], path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, override and validate one configuration file."""
    overrides = list(overrides)
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    return parse(cls, apply_overrides(read_yaml(path), _in_full(cls, overrides)), source)


def to_yaml(config: BaseConfig) -> str:
    """The fully resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(first: BaseConfig, second: BaseConfig) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations differ: the dotted key and both values (None: no such key)."""
    yield from _differences("", first.model_dump(mode="json"), second.model_dump(mode="json"))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the nearest known name, or nothing."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _open_keys(cls: type[BaseConfig]) -> list[str]:
    """The keys of `open_group` that are no fields of `cls` itself."""
    if cls.open_group is None:
        return []
    return [key for key in _fields_at(cls, [cls.open_group]) if key not in cls.model_fields]


def _in_full(cls: type[BaseConfig], overrides: Iterable[str]) -> Iterator[str]:
    for override in overrides:
        key, separator, value = override.partition("=")
        yield f"{full_key(cls, key.strip())}{separator}{value}"


def _differences(place: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            below = f"{place}.{key}" if place else str(key)
            yield from _differences(below, first.get(key), second.get(key))
    elif first != second:
        yield place, first, second


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _set(node: dict[str, Any], path: str, value: Any, override: str) -> None:
    if path in node or "." not in path:
        node[path] = value
        return
    heads = [key for key in node if isinstance(key, str) and path.startswith(f"{key}.")]
    head = max(heads, key=len) if heads else path.split(".", 1)[0]
    child = node.setdefault(head, {})
    if child is None:
        child = node[head] = {}
    if not isinstance(child, dict):
        raise UserError(f"override {override!r}: {head!r} is {child!r}, it has no keys below it")
    _set(child, path[len(head) + 1 :], value, override)


def _describe(cls: type[BaseConfig], details: Any) -> str:
    """One validation problem in words: place, value, what is allowed."""
    loc = [str(part) for part in details["loc"]]
    named_once = [part for i, part in enumerate(loc) if i == 0 or part != loc[i - 1]]
    place = ".".join(named_once) or "the configuration"
    match details["type"]:
        case "extra_forbidden":
            known = sorted(_fields_at(cls, loc[:-1]))
            open_keys = _open_keys(cls) if len(loc) == 1 else []
            if loc[-1] in open_keys:
                return f"{place}: stands in the group {cls.open_group}, as {full_key(cls, place)}"
            hint = nearest(loc[-1], [*known, *open_keys])
            return f"{place}: unknown key{hint} (allowed: {', '.join(known)})"
        case "missing":
            return f"{place}: a value is required"
        case "union_tag_invalid":
            known = details["ctx"]["expected_tags"]
            tag = details["ctx"]["tag"]
            hint = nearest(tag, [name.strip().strip("'") for name in known.split(",")])
            return f"{place}: unknown name {tag!r}{hint} (allowed: {known})"
        case "value_error":
            return f"{place}: {details['ctx']['error']}"
        case _:
            message = details["msg"][0].lower() + details["msg"][1:]
            return f"{place}: {message}, got {details['input']!r}"


def _fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """Field names of the model that stands at `loc` below `cls`; tags in `loc` are followed."""
    annotation: Any = cls
    for part in loc:
        annotation = _step(annotation, part)
    models = [model for model in _members(annotation) if _is_model(model)]
    return [name for model in models for name in model.model_fields]


def _step(annotation: Any, part: str) -> Any:
    for member in _members(annotation):
        if _is_model(member):
            if part in member.model_fields:
                return member.model_fields[part].annotation
            tag = member.model_fields.get("type")
            if tag is not None and part in typing.get_args(tag.annotation):
                return member
        elif typing.get_origin(member) in (dict, Mapping):
            return typing.get_args(member)[1]
    return annotation


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if _is_union(annotation):
        return [leaf for arg in typing.get_args(annotation) for leaf in _members(arg)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
