"""YAML in, frozen configuration out: overrides, unknown keys, tags, round trip."""

import math
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
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
from spd.config.yaml_file import MAX_BYTES, MAX_DEPTH, dump_yaml, parse_yaml


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
        ("scale=1e-3", {"scale": 0.001}),  # YAML 1.1 takes it as a word
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
        ('sizes."layers.1.in"=7', {"sizes": {"layers.0.in": 1, "layers": 2, "layers.1.in": 7}}),
        ("sizes.'a=b.c'=7", {"sizes": {"layers.0.in": 1, "layers": 2, "a=b.c": 7}}),
        ('new."a.b".c=1', {"new": {"a.b": {"c": 1}}}),
        ("sites.layers.0.mlp_in=50", {"sites": {"layers.0.mlp_in": 50}}),
    ],
)
def test_overrides(override: str, expected: dict[str, object]):
    raw = {"name": "n", "sizes": {"layers.0.in": 1, "layers": 2}, "nothing": None}
    assert apply_overrides(raw, [override]) == {**raw, **expected}


@pytest.mark.parametrize("key", ['sites."layers.0.mlp_in"', "sites.layers.0.mlp_in"])
def test_a_site_is_named_by_its_dotted_path_on_the_command_line(key: str):
    """With quotes, as a shell leaves them inside of others, and without them."""
    from spd.components import resolve_sites
    from spd.experiments.resid_mlp.model import ResidMLPModelConfig, empty_model
    from spd.runs.cli import checked_config

    model = empty_model(ResidMLPModelConfig(n_features=4, d_embed=6, d_mlp=3, n_layers=2))
    rest = "sites={layers.*.mlp_out: 7, layers.1.mlp_in: 8}"
    config = checked_config("resid_mlp2", [rest, f"{key}=50"])
    assert resolve_sites(model, config.sites) == {
        **{"layers.0.mlp_in": 50, "layers.0.mlp_out": 7},
        **{"layers.1.mlp_in": 8, "layers.1.mlp_out": 7},
    }
    config = checked_config("resid_mlp2", [f"{key}=50"])  # beside the pattern of the file
    said = "sites: 'layers.0.mlp_in' is matched by both 'layers.*.mlp_in' and 'layers.0.mlp_in'"
    with pytest.raises(UserError, match=re.escape(said)):
        resolve_sites(model, config.sites)
    with pytest.raises(UserError, match=r"sites.layers.0.mlp_in: .*integer.*'few'"):
        checked_config("resid_mlp2", [f"{key}=few"])


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


def test_null_is_the_name_of_a_setting_at_the_top_and_nothing_elsewhere():
    """YAML itself takes the key `null` for None."""
    assert parse_yaml("null: true\na: {null: 1}") == {"null": True, "a": {None: 1}}
    assert parse_yaml(dump_yaml({"null": True})) == {"null": True}
    assert apply_overrides({"a": 1}, ["null=true"]) == {"a": 1, "null": True}
    assert parse_yaml("null") is None
    with pytest.raises(ValueError, match="line 2: the key 'null' stands twice"):
        parse_yaml("null: true\n'null': false")


def test_null_takes_an_entry_out():
    raw = {"losses": {"a": {"coeff": 1.0}, "b": {"coeff": 1.0}}, "metrics": {"m.1": {}}, "x": {}}
    assert apply_overrides(raw, ["losses.a=null", 'metrics."m.1"=null', "x.y=null"]) == {
        "losses": {"b": {"coeff": 1.0}},
        "metrics": {},
        "x": {"y": None},
    }
    assert apply_overrides(raw, ["metrics.m.1=null", "losses.a.coeff=null"]) == {
        **raw,
        "metrics": {},
        "losses": {**raw["losses"], "a": {"coeff": None}},
    }
    with pytest.raises(UserError, match=r"losses has no 'aa'; did you mean 'a'\? \(there: a, b\)"):
        apply_overrides(raw, ["losses.aa=null"])
    with pytest.raises(UserError, match=r"figures has no 'a' \(there is none\)"):
        apply_overrides(raw, ["figures.a=null"])
    for group in ("losses", "metrics", "figures"):
        for value in ("5", "[1]", "some"):
            with pytest.raises(UserError, match=rf"{group}.a=null'?: '{group}' is .*no keys below"):
                apply_overrides(raw, [f"{group}={value}", f"{group}.a=null"])


class Numbers(BaseConfig):
    steps: int = 1
    lr: float = 1.0
    clip: float | None = None
    counts: dict[str, int] = {}
    seeds: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    switch: Literal["auto"] | bool = "auto"
    word: str | None = None


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("steps=yes", "'yes'"),
        ("steps=true", "True"),
        ("lr=on", "'on'"),
        ("lr=true", "True"),
        ("clip=false", "False"),
        ("clip=yes", "'yes'"),
        ("steps=010", "'010'"),
        ("lr=010", "'010'"),
        ("steps=1:30", "'1:30'"),
        ("lr=1:30", "'1:30'"),
        ("steps=0x10", "'0x10'"),
        ("steps=1.5", "1.5"),
        ("counts.a=true", "True"),
        ("counts={a: 010}", "'010'"),
        ("seeds=[0, true]", "True"),
        ("pair=[a, true]", "True"),
        ("switch=1:30", "'1:30'"),
        ("word=1e3", "1000.0; put it in quotes"),
        ("word=12", "12; put it in quotes"),
    ],
)
def test_what_is_no_number_is_refused_as_one(tmp_path: Path, override: str, found: str):
    key, _, value = override.partition("=")
    path = tmp_path / "numbers.yaml"
    path.write_text("{}")
    with pytest.raises(UserError) as caught:
        load_config(Numbers, path, [override])
    assert key.partition(".")[0] in str(caught.value) and f"got {found}" in str(caught.value)
    if "." not in key:
        path.write_text(f"{key}: {value}\n")
        with pytest.raises(UserError, match=re.escape(f"got {found}")):
            load_config(Numbers, path)


def test_numbers_as_they_may_be_written():
    raw = apply_overrides({}, ["steps=1e3", "lr=1e-3", "clip=.5", "switch=yes", "word=010"])
    assert parse(Numbers, raw, "here") == Numbers(
        steps=1000, lr=0.001, clip=0.5, switch=True, word="010"
    )
    as_options = {"steps": "1000", "lr": "1e-3", "clip": "0.5", "switch": "false"}
    assert parse(Numbers, as_options, "here") == Numbers(
        steps=1000, lr=0.001, clip=0.5, switch=False
    )


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


TEXT = {
    "yes": "yes",
    "on": "on",
    "n": "n",
    "010": "010",
    "1:30": "1:30",
    "12:00:00": "12:00:00",
    "2026-01-31": "2026-01-31",
    "0x10": "0x10",
    "1_000": 1000,
    "1e3": 1000.0,
    "-1.5E-3": -0.0015,
    ".5": 0.5,
    "0": 0,
    "-.inf": -math.inf,
    "true": True,
    "False": False,
    "~": None,
    "": None,
    "{on: 1, yes: 2}": {"on": 1, "yes": 2},
    "{a: &x {b: 1, c: 2}, d: {<<: *x, b: 3}}": {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}},
}


@pytest.mark.parametrize("text", TEXT)
def test_what_a_word_means(text: str):
    found = parse_yaml(text)
    assert found == TEXT[text] and type(found) is type(TEXT[text])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nsteps: 2\nlr: 3\n", "line 3: the key 'lr' stands twice (first in line 1)"),
        ("a:\n  b: 1\n  c: {}\n  b: 2\n", "line 4: the key 'b' stands twice (first in line 2)"),
        ("a: 1\n'a': 2\n", "line 2: the key 'a' stands twice (first in line 1)"),
        ("a: &x\n  b: *x\n", "line 2: *x stands inside of what it stands for"),
        ("[" * (MAX_DEPTH + 1), f"line 1: nested more than {MAX_DEPTH} deep"),
        ("- " * 10_000 + "1", f"line 1: nested more than {MAX_DEPTH} deep"),
        ("a: [1, 2\n", "expected ',' or ']'"),
        ("1" * 5000, "line 1: a number of 5000 digits, at most 100"),
        ("a: !!timestamp 2026-13-45\n", "the tag 'tag:yaml.org,2002:timestamp' is not read here"),
        ("a: !!python/name:os.system x\n", "python/name:os.system' is not read here"),
        ("!!bool x", "line 1: 'x' is no bool"),
        ("!!int", "line 1: '' is no int"),
        ("a: *b", "found undefined alias 'b'"),
        ("&a x: &a y", "found duplicate anchor 'a'"),
        ("? [a]\n: b", "found unhashable key"),
        ("a: \x01", "control characters are not allowed"),
        ("\udcff", "surrogates not allowed"),
        ("a" * (MAX_BYTES + 1), f"{MAX_BYTES + 1} characters, more than the {MAX_BYTES}"),
    ],
)
def test_what_is_refused_in_one_line(text: str, said: str):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        parse_yaml(text)
    assert said in str(caught.value)


def test_an_alias_counts_as_what_it_stands_for():
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert len(parse_yaml("\n".join(rows[:4]))) == 4
    with pytest.raises(ValueError, match="line 6: more than 200000 values, aliases followed"):
        parse_yaml("\n".join(rows))


@pytest.mark.parametrize(
    "value",
    ["1e3", "1E5", "yes", "010", "1:30", "2026-01-31", "null", "<<", "a: b", "é", 1e-5, 1e300],
)
def test_what_is_written_is_read_back_equal_by_either_yaml(value: object):
    written = dump_yaml({"key": value})
    assert parse_yaml(written) == yaml.safe_load(written) == {"key": value}
