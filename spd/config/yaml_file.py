"""YAML as plain values, read with the numbers and truth values of YAML 1.2 and within limits.

`1e-3` is a number; `yes`, `on`, `010`, `1:30` and `2026-01-31` are words, which YAML 1.1 takes as true,
true, 8, 90 and a date.

Knows no configuration. A document of a stranger's may be built to exhaust whoever reads it (nested, cyclic,
aliases of aliases): what is beyond the limits is refused while it is read, before it becomes values.
"""

import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

MAX_BYTES = 2_000_000
MAX_DEPTH = 50
MAX_NODES = 200_000
"""aliases counted as often as what they stand for"""
MAX_DIGITS = 100

_FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
_WORDS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}
"""tag → its words, and what they begin with"""
_TAGS = {*_WORDS, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}


def parse_yaml(text: str) -> Any:
    """What `text` says; a `ValueError` of one line tells what is wrong with it, and where."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} characters, more than the {MAX_BYTES} that are allowed")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        said = [part for part in (error.context, error.problem) if part]
        problem = _short(" ".join(": ".join(said).split()))
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_short(" ".join(str(error).split()))) from None
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"


class _PythonEvents(Reader, Scanner, Parser):
    """The events of a document, where PyYAML was built without libyaml."""

    def __init__(self, stream: str) -> None:
        Reader.__init__(self, stream)
        Scanner.__init__(self)
        Parser.__init__(self)


_Events: Any = (
    getattr(yaml.cyaml, "CParser", _PythonEvents) if yaml.__with_libyaml__ else _PythonEvents
)


class _Loader(Composer, _Events, SafeConstructor, Resolver):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name for a table of the class

    def __init__(self, stream: str) -> None:
        _Events.__init__(self, stream)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self.depth, self.n_nodes = 0, 0
        self.sizes: dict[str, int] = {}
        self.open: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.open:
                self._refuse(f"*{event.anchor} stands inside of what it stands for", event)
            self.n_nodes += self.sizes.get(event.anchor, 0)
        before = self.n_nodes
        self.n_nodes, self.depth = self.n_nodes + 1, self.depth + 1
        if self.depth > MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} deep", event)
        if self.n_nodes > MAX_NODES:
            self._refuse(f"more than {MAX_NODES} values, aliases followed", event)
        self.open.append(event.anchor)
        node: Any = super().compose_node(parent, index)
        if node.tag not in _TAGS:
            self._refuse(f"the tag {node.tag!r} is not read here, plain values alone", event)
        self.open.pop()
        self.depth -= 1
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.sizes[event.anchor] = self.n_nodes - before
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            self._refuse(f"a number of {len(node.value)} digits, at most {MAX_DIGITS}", node)
        words, _ = _WORDS.get(node.tag, (None, ""))
        if words is not None and not re.fullmatch(words, node.value):
            self._refuse(f"{node.value!r} is no {node.tag.rpartition(':')[2]}", node)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value if self.depth == 1 else ():
            if key.tag.endswith(":null") and key.value == "null":
                key.tag = "tag:yaml.org,2002:str"  # a setting of that name, not the key None
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                self._refuse(
                    f"the key {key.value!r} stands twice (first in line {lines[name]})", key
                )
            lines[name] = line
        return node

    def _refuse(self, problem: str, place: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either YAML would take for something else than a word."""


for _tag, (_pattern, _first) in _WORDS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
_tag = "tag:yaml.org,2002:float"
_Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_FLOAT})\Z"), list("-+.0123456789"))
