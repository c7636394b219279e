"""YAML in, frozen configuration out: overrides, unknown keys, tags, round trip."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from spd.config import (
    BY_TYPE,
    NAME_IS_TYPE,
    BaseConfig,
    UserError,
    apply_overrides,
    differences,
    full_key,
    load_config,
    nearest,
    parse,
    read_yaml,
    to_yaml,
)


class Circle(BaseConfig):
    type: Literal["circle"] = "circle"
    radius: float = Field(default=1.0, gt=0.0)


class Box(BaseConfig):
    type: Literal["box"] = "box"
    sides: tuple[float, float]


class Style(BaseConfig):
    colour: str | None = None


Shapes = Annotated[dict[str, Annotated[Circle | Box, BY_TYPE]], NAME_IS_TYPE]


class Drawing(BaseConfig):
    name: str
    scale: float = 1.0
    sizes: dict[str, int] = Field(default={})
    shapes: Shapes = Field(default={})
    style: Style = Style()

    open_group: ClassVar = "style"


RAW = {"name": "one", "shapes": {"circle": {"radius": 2.0}, "box": {"sides": [1, 2]}}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("scale=2", {"scale": 2}),
        ("scale=1e-3", {"scale": "1e-3"}),  # YAML 1.1; the field makes a float of it
        ("scale=null", {"scale": None}),
        ("scale=", {"scale": None}),
        ("name=a=b", {"name": "a=b"}),
        (" name = x ", {"name": "x"}),
        ("list=[1, [a, 2.5]]", {"list": [1, ["a", 2.5]]}),
        ("map={a: {b: 1}}", {"map": {"a": {"b": 1}}}),
        ("yes=true", {"yes": True}),
        ("style.colour=red", {"style": {"colour": "red"}}),
        ("new.branch.leaf=1", {"new": {"branch": {"leaf": 1}}}),
        ("sizes.layers.0.in=7", {"sizes": {"layers.0.in": 7, "layers": 2}}),
        ("sizes.layers=8", {"sizes": {"layers.0.in": 1, "layers": 8}}),
        ("nothing.x=1", {"nothing": {"x": 1}}),
    ],
)
def test_overrides(override: str, expected: dict[str, object]):
    raw = {"name": "n", "sizes": {"layers.0.in": 1, "layers": 2}, "nothing": None}
    assert apply_overrides(raw, [override]) == {**raw, **expected}


def test_overrides_leave_what_they_are_given_alone_and_the_last_one_counts():
    raw = {"style": {"colour": "red"}, "list": [1]}
    changed = apply_overrides(raw, ["style.colour=blue", "style.colour=green", "list=[2]"])
    assert changed == {"style": {"colour": "green"}, "list": [2]}
    assert raw == {"style": {"colour": "red"}, "list": [1]}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scale", "expected key=value"),
        ("=1", "expected key=value"),
        ("scale=[", "not valid YAML"),
        ("name.first=x", "'name' is 'n', it has no keys below it"),
        ("sizes.layers.x=1", "'layers' is 2, it has no keys below it"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, said: str):
    with pytest.raises(UserError, match="override") as caught:
        apply_overrides({"name": "n", "sizes": {"layers": 2}}, [override])
    assert repr(override) in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("key", ["colour", " style.colour "])
def test_the_keys_of_the_open_group_are_overridden_without_its_name_too(tmp_path: Path, key: str):
    path = tmp_path / "drawing.yaml"
    path.write_text("name: one\n", encoding="utf-8")
    assert load_config(Drawing, path, [f"{key}=red"]).style == Style(colour="red")
    path.write_text("name: one\nstyle: {colour: blue}\n", encoding="utf-8")
    assert load_config(Drawing, path, [f"{key}=red"]).style == Style(colour="red")
    assert full_key(Drawing, key.strip()) == "style.colour"


def test_in_a_file_they_stand_in_the_group(tmp_path: Path):
    path = tmp_path / "drawing.yaml"
    path.write_text("name: one\ncolour: red\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"colour: stands in the group style, as style\.colour"):
        load_config(Drawing, path)
    with pytest.raises(UserError, match=r"color: unknown key; did you mean 'colour'"):
        load_config(Drawing, path, ["color=red"])


def test_a_field_of_the_class_itself_comes_before_the_group():
    class Coloured(Drawing):
        colour: str = "grey"

    assert full_key(Coloured, "colour") == "colour"
    assert full_key(Drawing, "scale") == "scale" and full_key(Style, "colour") == "colour"


def test_powers_of_ten_and_numbers_in_quotes_are_floats():
    assert parse(Drawing, {**RAW, "scale": "1e-3"}, "here").scale == 1e-3
    assert parse(Drawing, {**RAW, "scale": 3}, "here").scale == 3.0


def test_what_is_written_is_read_back_equal(tmp_path: Path):
    config = parse(Drawing, {**RAW, "sizes": {"a.b": 3}, "style": {"colour": "grün"}}, "here")
    path = tmp_path / "drawing.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(Drawing, path) == config
    assert load_config(Drawing, path, ["scale=5"]).scale == 5.0
    assert read_yaml(path)["shapes"]["box"] == {"type": "box", "sides": [1.0, 2.0]}


def test_the_name_of_an_entry_is_its_type_unless_it_says_another():
    shapes = parse(Drawing, RAW, "here").shapes
    assert shapes == {"circle": Circle(radius=2.0), "box": Box(sides=(1.0, 2.0))}
    two = {"name": "two", "shapes": {"circle": None, "small": {"type": "circle", "radius": 0.1}}}
    assert parse(Drawing, two, "here").shapes == {"circle": Circle(), "small": Circle(radius=0.1)}


def test_configurations_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Circle().radius = 2.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"nmae": 1},
            "nmae: unknown key; did you mean 'name'? (allowed: name, scale, shapes, sizes, style)",
        ),
        (
            {"style": {"color": "red"}},
            "style.color: unknown key; did you mean 'colour'? (allowed: colour)",
        ),
        (
            {"shapes": {"circle": {"radus": 1}}},
            "shapes.circle.radus: unknown key; did you mean 'radius'? (allowed: radius, type)",
        ),
        (
            {"shapes": {"cirkle": {}}},
            "shapes.cirkle: unknown name 'cirkle'; did you mean 'circle'? (allowed: 'circle', 'box')",
        ),
        (
            {"shapes": {"mine": {"type": "bix"}}},
            "shapes.mine: unknown name 'bix'; did you mean 'box'? (allowed: 'circle', 'box')",
        ),
        ({"shapes": {"box": {}}}, "shapes.box.sides: a value is required"),
        (
            {"shapes": {"circle": {"radius": -1}}},
            "shapes.circle.radius: input should be greater than 0, got -1",
        ),
        ({"shapes": {"circle": 5}}, "shapes.circle"),
        ({"shapes": [1]}, "shapes: input should be a valid dictionary, got [1]"),
        ({"scale": "wide"}, "scale: input should be a valid number"),
        ({"name": None}, "name: input should be a valid string, got None"),
    ],
)
def test_a_problem_names_its_place_its_value_and_what_is_allowed(
    change: dict[str, object], said: str
):
    with pytest.raises(UserError) as caught:
        parse(Drawing, {**RAW, **change}, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ") and said in str(caught.value)


def test_all_problems_are_listed():
    with pytest.raises(UserError) as caught:
        parse(Drawing, {"scale": "wide", "stile": {}}, "my.yaml")
    assert len(str(caught.value).splitlines()) == 3


def test_differences_name_the_key_and_both_values():
    one = parse(Drawing, RAW, "here")
    other = parse(Drawing, {**RAW, "scale": 2, "shapes": {"circle": {"radius": 3}}}, "here")
    assert list(differences(one, one)) == []
    assert list(differences(one, other)) == [
        ("scale", 1.0, 2.0),
        ("shapes.circle.radius", 2.0, 3.0),
        ("shapes.box", {"type": "box", "sides": [1.0, 2.0]}, None),
    ]


def test_the_nearest_name():
    assert nearest("linaer1", ["linear1", "linear2"]) == "; did you mean 'linear1'?"
    assert nearest("xyz", ["linear1"]) == ""
