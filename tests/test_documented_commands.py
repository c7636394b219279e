"""Every command that README and docs show has names and options that exist, every link a file.

`make test-docs` runs them all, shortened; here they are taken apart only.
"""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from scripts.run_docs import (
    DOCUMENTS,
    NAMED_RUNS,
    REPO,
    Command,
    commands,
    snippets,
    written_files,
)
from spd.config import UserError, load_config, parse, read_yaml
from spd.evals import run_evals
from spd.experiments.lm.lm_decomposition import LMConfig
from spd.launch.arguments import read_arguments
from spd.registry import get_experiment
from spd.runs.cli import checked_config
from spd.sweeps import sweep
from spd.sweeps.definition import check, read_definition

COMMANDS = list(commands())


def check_command(command: Command) -> None:
    """Raise or fail where a command names what is not there."""
    program, *words = shlex.split(command.program)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets, words[0]
    elif program == "spd-run":
        checked_config(words[0], [word for word in words[1:] if "=" in word])
    elif program == "spd-evals":
        arguments = read_arguments(run_evals.COMMAND, words)
        options = parse(run_evals.EvalsOptions, arguments.options, "spd-evals")
        for name in options.experiments:
            checked_config(name, arguments.positional)
    elif program == "spd-sweep":
        arguments = read_arguments(sweep.COMMAND, words)
        parse(sweep.SweepOptions, arguments.options, "spd-sweep")
        for name in arguments.positional[:1]:
            get_experiment(name)
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words[1]
    elif program in ("python", "torchrun"):
        for word in words:
            assert "/" not in word or word.startswith("out/") or (REPO / word).is_file(), word
    else:
        assert program in ("source", "spd-report", "spd-import"), program


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.program)
def test_a_command_names_what_there_is(command: Command) -> None:
    check_command(command)
    command.rule()  # that says how it is run by scripts/run_docs.py


@pytest.mark.parametrize(
    "line",
    [
        *("spd-run tms_5-3", "spd-run tms_5-2 sede=1", "make dmeo", "python -m spd.optimise"),
        *("spd-evals --seed 5", "spd-sweep tms_5-2 4 --jobs 3", "python spd/nothing.py"),
    ],
)
def test_a_misspelt_command_is_found(line: str) -> None:
    with pytest.raises((UserError, AssertionError, SystemExit)):
        check_command(Command("README.md", line))


def test_a_command_without_a_rule_is_found() -> None:
    with pytest.raises(LookupError, match="no rule"):
        Command("README.md", "frobnicate out").rule()


def test_what_is_run_is_what_is_shown_but_shorter() -> None:
    shown = Command("README.md", "OMP_NUM_THREADS=1 spd-run tms_5-2 seed=1    # with a comment")
    assert shown.program == "spd-run tms_5-2 seed=1"
    assert shown.shortened().startswith("OMP_NUM_THREADS=1 spd-run tms_5-2 seed=1 steps=3 ")


def test_runs_that_are_named_are_made_first() -> None:
    text = "".join((REPO / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    named = set(re.findall(r"out/[\w-]+/\d{8}-\d{6}-[0-9a-f]{6}", text))
    assert named <= NAMED_RUNS.keys()


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/extending.md", "CHANGELOG.md"])
def test_every_link_leads_somewhere(document: str) -> None:
    path = REPO / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{document}: {target}"


def test_every_document_can_be_found_from_the_readme() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for path in (REPO / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in readme, path.name


def test_the_readme_is_short() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140 and len(text) <= 9000


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/extending.md"])
def test_files_that_are_named_exist(document: str) -> None:
    """Of the repository, in backquotes."""
    text = (REPO / document).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:spd|tests|scripts|benchmarks|docs)/[\w./-]+)`", text):
        assert (REPO / name).exists(), f"{document}: {name}"


def test_what_is_said_to_be_in_a_file_is_there() -> None:
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`(\w+)` in `(spd/[\w/]+\.py)`", text)
    assert len(places) >= 5
    for name, file in places:
        code = (REPO / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", code, re.MULTILINE), f"{file}: no {name}"


def test_few_classes_only_hand_values_on() -> None:
    """Those of the table in docs/architecture.md, which are there."""
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("<!-- carriers -->")[2].partition("<!-- end of carriers -->")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert 0 < len(named) <= 7
    code = "".join(path.read_text(encoding="utf-8") for path in (REPO / "spd").rglob("*.py"))
    for name in named:
        assert re.search(rf"^class {name}\b", code, re.MULTILINE), name


def test_files_of_the_project_name_no_document_that_it_lacks() -> None:
    own = {path.name for path in REPO.glob("*.md")} | {"README.md"}
    own |= {path.name for path in (REPO / "docs").glob("*.md")}
    for folder in ("spd", "tests", "docs", "benchmarks", "scripts"):
        for path in (REPO / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh"):
                named = set(re.findall(r"\b[A-Za-z_]+\.md\b", path.read_text(encoding="utf-8")))
                assert named <= own, f"{path}: {named - own}"


@pytest.mark.parametrize(("document", "code"), snippets(), ids=lambda text: text[:20])
def test_a_snippet_imports_what_there_is(document: str, code: str) -> None:
    for node in ast.walk(ast.parse(code, document)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_configurations_that_are_shown_are_right(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in written_files()}
    for name, text in written_files().items():
        files[name].write_text(text, encoding="utf-8")
    load_config(LMConfig, files["my_model.yaml"])
    check(read_definition(files["my_params.yaml"]), "resid_mlp2", [], "my_params.yaml")
    settings = read_yaml(files["execution.yaml"])["execution"]
    shown = checked_config("tms_5-2").model_dump(mode="json")["execution"]
    assert shown == settings, "the documents show the defaults"
    starts = read_yaml(files["starts.yaml"])
    own = checked_config("tms_5-2", ["starts=8"]).model_dump(mode="json")
    assert starts == {key: own[key] for key in starts}, "and those of several starts"
