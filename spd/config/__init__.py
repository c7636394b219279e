"""Configuration: frozen pydantic models, read from YAML, changed by dotted overrides.

Everything a user can get wrong in a configuration ends here as one `UserError` that names the value,
its place and what is allowed. Numbers and truth values are those of YAML 1.2 (`spd.config.yaml_file`).
"""

import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spd.config.errors import (
    Exit,
    RunError,
    Unreachable,
    UserError,
    counted,
    cut,
    printable,
    report_error,
    shown,
)
from spd.config.yaml_file import MAX_BYTES, MAX_DEPTH, dump_yaml, parse_yaml

__all__ = [
    "Exit",
    "RunError",
    "Unreachable",
    "UserError",
    "counted",
    "printable",
    "report_error",
    "shown",
]

Config = TypeVar("Config", bound="BaseConfig")


NAMED_SPECS = ("losses", "metrics", "figures")
"""the groups of which the override `group.name=null` takes an entry out"""
SITES = "sites"
"""the group whose keys are names of modules, with dots in them"""
OVERRIDE = re.compile(r"""((?:"[^"]*"|'[^']*'|[^="'])*)=(.*)""", re.DOTALL)
"""key and value; a part of the key may stand in quotes"""
NO_NUMBER = "no_number"
MAX_LISTED = 20
"""problems in one message"""
UNSPOKEN = ("(a number)", "(a schedule)")
"""tags of what is told apart without a name, which messages leave out"""
QUOTED = re.compile(r"""(["'])(.*?)\1(?:\.(.+))?""", re.DOTALL)


class BaseConfig(BaseModel):
    """Frozen, and unknown keys are errors. A number may be given as text, as options are."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    open_group: ClassVar[str | None] = None
    """A field that is a group of settings whose keys an override may name without it."""

    if not TYPE_CHECKING:  # which knows the fields

        def __init__(self, /, **given: Any) -> None:
            """`UserError` in the words of `parse` where something given cannot be."""
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise _user_error(type(self), error, type(self).__name__) from None

        # to pydantic it is its own, which `model_validate` does without
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _numbers_only(cls, raw: Any) -> Any:
        """A truth value is no number, and neither is `010`, which some read as 8."""
        for name, value in raw.items() if isinstance(raw, Mapping) else ():
            field = cls.model_fields.get(name) if isinstance(name, str) else None
            for place, found in _no_numbers(field.annotation, value) if field else ():
                where = ".".join([str(name), *place])
                raise PydanticCustomError(
                    NO_NUMBER, "a number is needed", {"where": where, "found": shown(found)}
                )
        return raw


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
        with path.open("rb") as file:  # no more of it than is read, as of a device that has no end
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a YAML configuration is expected") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"{path}: a mapping of settings is expected, found {found}")
    return raw


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with every `dotted.key=value` applied; values are YAML (`null`, `[0, 1]`).

    Keys may contain dots themselves (`sites.hidden_layers.0=50`): at every level the longest
    existing key that fits is taken, and what stands in quotes is one key. `losses.name=null` takes
    the entry out, as it does in `metrics` and `figures`.
    """
    result = _copy(raw)
    for override in overrides:
        found = OVERRIDE.fullmatch(override)
        path, text = (found[1].strip(), found[2]) if found else ("", "")
        if not path:
            raise UserError(
                f"override {shown(override)}: expected key=value, for example steps=1000"
            )
        if path.count(".") >= MAX_DEPTH:
            raise UserError(f"override {shown(override)}: a key of more than {MAX_DEPTH} parts")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise UserError(
                f"override {shown(override)}: the value is not valid YAML: {error}"
            ) from None
        group, _, name = path.partition(".")
        if value is None and text.strip() and name and group in NAMED_SPECS:
            name = _unquoted(name)
            entries = result.get(group) or {}
            if isinstance(entries, dict) and (name in entries or "." not in name):
                _take_out(result, group, name, override)
                continue
        _set(result, path, value, override)
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
        raise _user_error(cls, error, source) from None


def _user_error(cls: type[BaseConfig], error: ValidationError, source: str) -> UserError:
    found = error.errors()
    lines = [_describe(cls, details) for details in found[:MAX_LISTED]]
    if len(found) > MAX_LISTED:
        lines.append(f"and {len(found) - MAX_LISTED} more")
    return UserError(f"{source}: " + "\n  ".join(lines))


def load_config(cls: type[Config], path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, override and validate one configuration file."""
    overrides = list(overrides)
    source = f"{path} with {cut(' '.join(overrides), 400)}" if overrides else str(path)
    return parse(cls, apply_overrides(read_yaml(path), _in_full(cls, overrides)), source)


def to_yaml(config: BaseConfig) -> str:
    """The fully resolved configuration as YAML that `load_config` reads back to an equal object."""
    return dump_yaml(config.model_dump(mode="json"))


def differences(first: BaseConfig, second: BaseConfig) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations differ: the dotted key and both values (None: no such key)."""
    yield from _differences("", first.model_dump(mode="json"), second.model_dump(mode="json"))


def value_differences(first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """The same of what two files hold."""
    yield from _differences("", first, second)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the nearest known name, or nothing."""
    matches = difflib.get_close_matches(str(name)[:100], list(known), n=1)
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


def _take_out(raw: dict[str, Any], group: str, name: str, override: str) -> None:
    entries = raw.get(group)
    if not isinstance(entries, dict) or name not in entries:
        known = list(entries) if isinstance(entries, dict) else []
        there = f"there: {', '.join(map(str, known))}" if known else "there is none"
        raise UserError(
            f"override {shown(override)}: {group} has no {name!r}{nearest(name, known)} ({there})"
        )
    del entries[name]


def _unquoted(path: str) -> str:
    found = QUOTED.fullmatch(path)
    return found[2] if found and found[3] is None else path


def _set(node: dict[str, Any], path: str, value: Any, override: str, group: str = "") -> None:
    quoted = QUOTED.fullmatch(path)
    if quoted:
        head, rest = quoted[2], quoted[3] or ""
    elif path in node or "." not in path:
        head, rest = path, ""
    else:
        heads = [key for key in node if isinstance(key, str) and path.startswith(f"{key}.")]
        head = max(heads, key=len) if heads else path.split(".", 1)[0]
        head = path if group == SITES and not heads else head
        rest = path[len(head) + 1 :]
    if not rest:
        node[head] = value
        return
    child = node.setdefault(head, {})
    if child is None:
        child = node[head] = {}
    if not isinstance(child, dict):
        raise UserError(
            f"override {shown(override)}: {head!r} is {shown(child)}, it has no keys below it"
        )
    _set(child, rest, value, override, head)


def _no_numbers(annotation: Any, value: Any) -> Iterator[tuple[list[str], Any]]:
    """The place below and the value of what stands where only a number can, and is none."""
    members = _members(annotation)
    if isinstance(value, bool | str):
        numbers = any(member in (int, float) for member in members)
        others = bool if isinstance(value, bool) else str
        odd = isinstance(value, bool) or re.fullmatch(r"\s*[-+]?0[0-9_]+\s*", value)
        if numbers and odd and others not in members:
            yield [], value
        return
    for member in members:
        kind, args = typing.get_origin(member), typing.get_args(member)
        if kind in (dict, Mapping) and isinstance(value, Mapping):
            below = [(str(key), args[1], item) for key, item in value.items()]
        elif kind in (list, tuple) and isinstance(value, list | tuple):
            alike = kind is list or Ellipsis in args
            inner = itertools.repeat(args[0]) if alike else args
            below = [(str(i), *pair) for i, pair in enumerate(zip(inner, value, strict=False))]
        else:
            continue
        for key, inner, item in below:
            yield from (([key, *place], found) for place, found in _no_numbers(inner, item))


def _describe(cls: type[BaseConfig], details: Any) -> str:
    """One validation problem in words: place, value, what is allowed."""
    loc = [cut(str(part), 100) for part in details["loc"] if part not in UNSPOKEN]
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
            tag = cut(str(details["ctx"]["tag"]), 100)
            hint = nearest(tag, [name.strip().strip("'") for name in known.split(",")])
            return f"{place}: unknown name {tag!r}{hint} (allowed: {known})"
        case "literal_error" if isinstance(details["input"], str):
            known = details["ctx"]["expected"]
            hint = nearest(details["input"], re.findall(r"'([^']*)'", known))
            return f"{place}: unknown name {shown(details['input'])}{hint} (allowed: {known})"
        case "value_error":
            return f"{place}: {cut(str(details['ctx']['error']), 1000)}"
        case problem if problem == NO_NUMBER:
            where, found = details["ctx"]["where"], details["ctx"]["found"]
            place = ".".join([*named_once, where])
            return f"{place}: {details['msg']}, got {found}"
        case "string_type" if isinstance(details["input"], bool | int | float):
            return f"{place}: text is needed, got {shown(details['input'])}; put it in quotes"
        case _:
            message = details["msg"][0].lower() + details["msg"][1:]
            return f"{place}: {message}, got {shown(details['input'])}"


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
        elif typing.get_origin(member) in (list, tuple) and part.isdecimal():
            return typing.get_args(member)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if _is_union(annotation):
        return [leaf for arg in typing.get_args(annotation) for leaf in _members(arg)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
