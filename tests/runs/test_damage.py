"""Damage of any kind to a run is one message that names the place; nothing is lost over it."""

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spd.config import UserError
from spd.experiments.tms import plots
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.runs import cli
from spd.runs.run import load_run
from tests.run_fixtures import Command, command_fixture, listing, target_fixture
from tests.runs.little_run import edit_meta, original_fixture, status_of
from tests.test_bad_input import assert_one_message

__all__ = ["command_fixture", "original_fixture", "target_fixture"]

pytestmark = pytest.mark.undrawn

NEWEST = "checkpoints/00000006"
LONG = 300 * "x"
Damage = Callable[[Path], object]


def resume(argv: list[str]) -> None:
    cli.cli(TMSConfig, build, ["--resume", *argv])


def _line(content: bytes) -> Damage:
    """In the middle of metrics.jsonl."""

    def damage(run: Path) -> None:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        lines.insert(2, content + b"\n")
        (run / "metrics.jsonl").write_bytes(b"".join(lines))

    return damage


def _meta(**changes: Any) -> Damage:
    return lambda run: edit_meta(run, lambda meta: meta.update(changes))


def _entry(**changes: Any) -> Damage:
    return lambda run: edit_meta(run, lambda meta: meta["entry"].update(changes))


def _write(name: str, content: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(content)


def _folder_for(name: str) -> Damage:
    def damage(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return damage


def _file_for(name: str) -> Damage:
    def damage(run: Path) -> None:
        shutil.rmtree(run / name)
        (run / name).write_text("x")

    return damage


class _Call:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _pickle(run: Path) -> None:
    torch.save({"step": 6, "data": _Call(run / "ran")}, run / NEWEST / "training_state")


def _bare_pickle(run: Path) -> None:
    (run / NEWEST / "training_state").write_bytes(pickle.dumps(_Call(run / "ran")))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a line that is a number": (_line(b"3"), r"metrics\.jsonl: a line is .* but 3 \(line 3\)"),
    "a line that is a list": (_line(b"[1]"), r"metrics\.jsonl: a line is"),
    "a line without a step": (_line(b'{"a": 1}'), r"metrics\.jsonl: a line is"),
    "a line of words": (_line(b'{"step": "1"}'), r"metrics\.jsonl: a line is not of numbers"),
    "a line that is no UTF-8": (_line(b'{"step": 1, "\xff": 1}'), "a line is not UTF-8"),
    "a line that is no JSON": (_line(b'{"step": 1'), "a line is not valid JSON"),
    "a line of many brackets": (_line(b"[" * 100_000), r"metrics\.jsonl: a line is"),
    "seconds in words": (_meta(seconds="long"), r"meta\.json: seconds: .*'long'"),
    "negative seconds": (_meta(seconds=-1.0), r"meta\.json: seconds"),
    "no thread": (_meta(num_threads=0), r"meta\.json: num_threads: .* 0"),
    "threads in words": (_meta(num_threads="1"), r"meta\.json: num_threads"),
    "half a thread": (_meta(num_threads=0.5), r"meta\.json: num_threads"),
    "a status that is a list": (_meta(status=["finished"]), r"meta\.json: status"),
    "a format in words": (_meta(format="1"), r"meta\.json: format"),
    "digests that are a list": (_meta(digests=[1]), r"meta\.json: digests"),
    "siblings that are numbers": (_meta(side_by_side={"page": 1, "runs": [2]}), "side_by_side"),
    "an entry that is a name": (_meta(entry="spd.experiments"), r"meta\.json: entry"),
    "an entry that is a list": (_meta(entry=["a", "b", "c"]), r"meta\.json: entry"),
    "an entry that is nothing": (_meta(entry=None), r"meta\.json: entry"),
    "an empty entry": (_meta(entry={}), r"meta\.json: entry: module"),
    "a module that is a number": (_entry(module=5), r"entry: module: a name is needed, got 5"),
    "a module that is nothing": (_entry(module=""), "entry: module"),
    "a module of dots": (_entry(module="..."), "entry: module"),
    "a module with a line break": (_entry(module="spd\nx"), "entry: module"),
    "a module with a long name": (_entry(module=f"spd.{LONG}"), "xxx"),
    "a file with a long name": (
        _entry(module=f"/{LONG}.py"),
        "the file of this experiment is gone",
    ),
    "a class that is none": (_entry(config="build"), "entry: config: 'build' is no subclass"),
    "a class with a long name": (_entry(config=LONG), "entry: config"),
    "a build that is a class": (_entry(build=["build"]), "entry: build"),
    "checkpoints that are a file": (_file_for("checkpoints"), "checkpoints: a folder of the run"),
    "figures that are a file": (_file_for("figures"), "figures: a folder of the run"),
    "a target that is a file": (_file_for("target"), "target: a folder of the run"),
    "a log that is a folder": (_folder_for("log.txt"), r"log\.txt: a file of the run"),
    "a record that is a folder": (_folder_for("metrics.jsonl"), r"metrics\.jsonl: a file of"),
    "a page that is a folder": (_folder_for("report.html"), r"report\.html: a file of the run"),
    "digests that are no JSON": (_write(f"{NEWEST}/digests.json", b"{"), r"digests\.json"),
    "digests that are a number": (_write(f"{NEWEST}/digests.json", b"3"), r"digests\.json"),
    "meta.json of brackets": (_write("meta.json", b"[" * 100_000), r"meta\.json: not valid JSON"),
    "meta.json that is no UTF-8": (_write("meta.json", b"\xff"), r"meta\.json: not valid JSON"),
    "a configuration that is a list": (_write("config.yaml", b"- 1\n"), r"config\.yaml"),
    "a configuration that is no UTF-8": (_write("config.yaml", b"a: \xff\n"), r"config\.yaml"),
    "a state that would run code": (
        _pickle,
        r"training_state: (the checkpoint is damaged|is not what)",
    ),
    "a pickle that would run code": (
        _bare_pickle,
        r"training_state: (the checkpoint is damaged|is not what)",
    ),
}
BAD_ADVICE = ("weights_only", "trusted source", "delete", "remove", "rm -")


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_message(
    original: Path,
    tmp_path: Path,
    damage: Damage,
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    run = Path(shutil.copytree(original, tmp_path / "a-run"))
    damage(run)
    before = listing(run)
    concerns_state = "training_state" in said
    with pytest.raises(UserError, match=said) as caught:
        load_run(run)
    messages = [str(caught.value)]
    for command in (cli.report, plots.main, resume):
        if command is resume and ("entry" in said or "gone" in said or "xxx" in said):
            continue  # a script that is named says itself what made the run
        assert status_of(command, run) == 2
        err = capsys.readouterr().err
        assert err.count("error: ") == 1 and "Traceback" not in err
        messages.append(err)
    assert not any(advice in message for advice in BAD_ADVICE for message in messages), messages
    if concerns_state:
        assert "from the checkpoint of step 4" in messages[-1]
    assert listing(run) == before and not (run / "ran").exists()


HARMLESS: dict[str, Damage] = {
    "a folder with an odd digit": lambda run: (run / "checkpoints/²").mkdir(),
    "a folder of Arabic digits": lambda run: (run / "checkpoints/٠٠٠٠٠٠٠٩").mkdir(),
    "a folder with a short number": lambda run: (run / "checkpoints/9").mkdir(),
    "a folder with a long number": lambda run: (run / "checkpoints" / ("9" * 200)).mkdir(),
    "a file with a number": lambda run: (run / "checkpoints/00000009").write_text("x"),
    "a figure without a number": lambda run: (run / "figures/loss_curves/²").mkdir(),
}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_what_is_no_checkpoint_is_passed_over(original: Path, tmp_path: Path, damage: Damage):
    run = Path(shutil.copytree(original, tmp_path / "a-run"))
    damage(run)
    assert load_run(run).step == 6
    assert status_of(resume, run) == 0


OF_THE_PAGE: dict[str, tuple[Damage, str]] = {
    "a figure": (_write("figures/loss/00000006.png", b"x"), "not a readable picture"),
    "timings": (_write("timings.jsonl", b"3\n"), r"timings\.jsonl: a line is"),
    "the configuration": (_write("config.yaml", b"sites: 3\n"), r"config\.yaml: sites"),
    "losses": (_write("config.yaml", b"losses: {a: 1}\n"), r"config\.yaml: losses"),
    "steps": (_write("config.yaml", b"steps: many\n"), r"config\.yaml: steps"),
    "the result": (_write("result.json", b"[]"), r"result\.json: not the result"),
    "the training": (_write("target/training.json", b"[]"), r"training\.json: an object"),
    "its seeds": (
        _write("target/training.json", b'{"seeds": [1]}'),
        "not the record of a training",
    ),
    "a loss of a seed": (
        _write(
            "target/training.json",
            b'{"seeds": [{"seed": 0, "n_represented": 5, "final_loss": []}]}',
        ),
        r"not the record of a training: seeds\.0\.final_loss",
    ),
    "a seed without a number": (
        _write("target/training.json", b'{"seeds": [{"n_represented": 5}]}'),
        r"not the record of a training: seeds\.0\.seed",
    ),
}


@pytest.mark.parametrize(("damage", "said"), OF_THE_PAGE.values(), ids=OF_THE_PAGE)
def test_damage_to_what_the_page_of_a_strangers_run_is_made_of(
    original: Path, tmp_path: Path, damage: Damage, said: str, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(original, tmp_path / "a-run"))
    (run / "figures/loss").mkdir()
    damage(run)
    edit_meta(run, lambda meta: [meta.pop("format"), meta.pop("digests"), meta.pop("config")])
    edit_meta(run, lambda meta: meta["entry"].update(module="nobody.knows"))
    page = (run / "report.html").read_bytes()
    assert status_of(cli.report, run) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert re.search(said, err)
    assert (run / "report.html").read_bytes() == page


@pytest.mark.parametrize("place", ["--resume", "--run_dir", "target="])
def test_names_of_300_letters(command: Command, place: str):
    arguments = [f"target={LONG}"] if place == "target=" else [place, LONG]
    done = command.resume(Path(LONG)) if place == "--resume" else command.tms(*arguments)
    assert_one_message(done, ["xxx", "too long"])


def test_a_run_with_a_long_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="too long"):
        load_run(tmp_path / LONG)
    for command in (cli.report, plots.main, resume):
        assert status_of(command, tmp_path / LONG) == 2
        assert "too long" in capsys.readouterr().err
