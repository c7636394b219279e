"""Every setting has a reader; what it changes: `test_knobs_change_something.py`."""

import ast
from collections.abc import Iterator

import pytest

from spd.settings import PACKAGE_DIR

TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE_DIR.rglob("*.py"))]
CLASSES = [node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def names_of_bases(node: ast.ClassDef) -> set[str]:
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return {base.id for base in bases if isinstance(base, ast.Name)}


def configs() -> Iterator[ast.ClassDef]:
    """All classes that derive from `BaseConfig`."""
    known = {"BaseConfig"}
    while True:
        more = {node.name for node in CLASSES if names_of_bases(node) & known} - known
        if not more:
            return iter([node for node in CLASSES if node.name in known - {"BaseConfig"}])
        known |= more


def fields(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id


def read_names(tree: ast.AST) -> Iterator[str]:
    """Attributes that are read, those in patterns of `match`, and texts, as `getattr` takes them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.MatchClass):
            yield from node.kwd_attrs
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


READ = {name for tree in TREES for name in read_names(tree)}


READ_ELSEWHERE = {
    "Parameter": {"mu", "sigma"},  # by W&B, which is sent the whole definition of a sweep
}


@pytest.mark.parametrize("node", configs(), ids=lambda node: node.name)
def test_every_field_of_a_configuration_is_read(node: ast.ClassDef):
    """`type` selects the class itself."""
    unread = {name for name in fields(node) if name not in READ} - {"type"}
    assert unread == READ_ELSEWHERE.get(node.name, set())


def test_the_search_finds_configurations_and_what_nobody_reads():
    found = {node.name: list(fields(node)) for node in configs()}
    assert len(found) > 30 and "lr_schedule" in found["SPDConfig"], "with those of base classes"
    assert "no_such_setting" + "_anywhere" not in READ and "lr_schedule" in READ
