"""Every setting has a reader; what it changes: `test_knobs_change_something.py`."""

import ast
import functools
from collections.abc import Iterator

from spd.settings import PACKAGE_DIR


@functools.cache
def nodes() -> list[ast.AST]:
    """Those of every file of the package."""
    files = sorted(PACKAGE_DIR.rglob("*.py"))
    return [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]


def names_of_bases(node: ast.ClassDef) -> set[str]:
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return {base.id for base in bases if isinstance(base, ast.Name)}


def configs() -> Iterator[ast.ClassDef]:
    """All classes that derive from `BaseConfig`."""
    classes = [node for node in nodes() if isinstance(node, ast.ClassDef)]
    known = {"BaseConfig"}
    while True:
        more = {node.name for node in classes if names_of_bases(node) & known} - known
        if not more:
            return iter([node for node in classes if node.name in known - {"BaseConfig"}])
        known |= more


def fields(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id


@functools.cache
def names_read() -> frozenset[str]:
    """Attributes that are read, those in patterns of `match`, and texts, as `getattr` takes them."""
    found: set[str] = set()
    for node in nodes():
        match node:
            case ast.Attribute(ctx=ast.Load()):
                found.add(node.attr)
            case ast.MatchClass():
                found.update(node.kwd_attrs)
            case ast.Constant(value=str(text)):
                found.add(text)
            case _:
                pass
    return frozenset(found)


READ_ELSEWHERE = {
    "Parameter": {"mu", "sigma"},  # by W&B, which is sent the whole definition of a sweep
}


def test_every_field_of_a_configuration_is_read():
    """`type` selects the class itself."""
    unread = {node.name: set(fields(node)) - names_read() - {"type"} for node in configs()}
    assert {name: own for name, own in unread.items() if own} == READ_ELSEWHERE


def test_the_search_finds_configurations_and_what_nobody_reads():
    found = {node.name: list(fields(node)) for node in configs()}
    assert len(found) > 30 and "lr_schedule" in found["SPDConfig"], "with those of base classes"
    assert "no_such_setting" + "_anywhere" not in names_read() and "lr_schedule" in names_read()
