"""Damage to a study, or to a run of one, is one message; what is whole of it is shown all the same."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd.evals import run_evals
from spd.run_files import sha256_of
from spd.sweeps import sweep
from tests.evals import many_runs
from tests.run_fixtures import listing
from tests.runs.little_run import status_of
from tests.sweeps.many_trials import ended_study

pytestmark = pytest.mark.undrawn

Damage = Callable[[Path], object]


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four trials and a study of four seeds."""
    root = tmp_path_factory.mktemp("made")
    ended_study(root, 4)
    many_runs.ended_study(root, 4)
    for run in root.glob("tms_5-2/many-seed*"):
        digests = {"result.json": sha256_of(run / "result.json")}
        meta = {"entry": {}, "seconds": 3.0, "status": "finished", "digests": digests}
        (run / "meta.json").write_text(json.dumps(meta, indent=2))
        (run / "config.yaml").write_text("steps: 10\n")
    return root


@pytest.fixture(name="root")
def root_fixture(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(made, tmp_path / "out"))
    monkeypatch.setenv("SPD_OUT_DIR", str(root))
    for path in (*root.rglob("job.json"), *root.rglob("trial*.json")):
        path.write_text(path.read_text().replace(str(made), str(root)))
    return root


def _write(name: str, content: bytes) -> Damage:
    return lambda root: (root / name).write_bytes(content)


def _edit(name: str, **changes: Any) -> Damage:
    def damage(root: Path) -> None:
        found = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps({**found, **changes}))

    return damage


def _without(name: str, key: str) -> Damage:
    def damage(root: Path) -> None:
        found = json.loads((root / name).read_text())
        del found[key]
        (root / name).write_text(json.dumps(found))

    return damage


STUDY, JOB = "evals/many/study.json", "evals/many/jobs/tms_5-2-seed1"
SWEEP, TRIAL = "sweeps/many/study.json", "sweeps/many/trials/trial1.json"
JOURNAL = "sweeps/many/journal.log"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a study that is empty": (_write(STUDY, b""), r"study\.json: not valid JSON"),
    "a study that is a list": (_write(STUDY, b"[]"), r"study\.json: an object is needed"),
    "a study without jobs": (_without(STUDY, "jobs"), r"study\.json: jobs: is missing"),
    "jobs that are numbers": (_edit(STUDY, jobs=[1]), r"study\.json: jobs: names are needed"),
    "experiments in a word": (_edit(STUDY, experiments="a"), r"experiments: of the kind list"),
    "a job that is gone": (lambda root: (root / JOB / "job.json").unlink(), r"seed1/job\.json"),
    "a job that is a number": (_write(f"{JOB}/job.json", b"3"), r"job\.json: an object is needed"),
    "a job without a command": (_without(f"{JOB}/job.json", "command"), "command: is missing"),
    "a job with seeds in words": (_edit(f"{JOB}/job.json", seeds="0"), "seeds: of the kind list"),
    "a job with more": (_edit(f"{JOB}/job.json", more=1), "more: is none of name, directory"),
    "seconds in words": (_edit(f"{JOB}/status.json", seconds="3"), "seconds: of the kind int or"),
    "seconds that are true": (_edit(f"{JOB}/status.json", seconds=True), "seconds: of the kind"),
    "a status of brackets": (_write(f"{JOB}/status.json", b"[" * 10**5), "not valid JSON"),
}
OF_SWEEPS: dict[str, tuple[Damage, str]] = {
    "a sweep that is cut": (_write(SWEEP, b'{"jobs": ['), r"study\.json: not valid JSON"),
    "a sweep without a definition": (_without(SWEEP, "definition"), "definition: is missing"),
    "an odd definition": (_edit(SWEEP, definition={"method": "x"}), "definition: method: "),
    "a trial that is empty": (_write(TRIAL, b""), r"trial1\.json: not valid JSON"),
    "a trial that is a list": (_write(TRIAL, b"[1]"), r"trial1\.json: an object is needed"),
    "a trial without a point": (_without(TRIAL, "point"), r"trial1\.json: point: is missing"),
    "a value in words": (_edit(TRIAL, value="low"), r"trial1\.json: value: of the kind int or"),
    "a journal of words": (_write(JOURNAL, b"x\ny\nz\n"), r"journal\.log: not the journal of a"),
    "a journal of numbers": (_write(JOURNAL, b"1\n2\n3\n"), r"journal\.log: not the journal of a"),
    "a journal of other objects": (_write(JOURNAL, b'{"a": 1}\n' * 3), "not the journal of a"),
}


@pytest.mark.parametrize(
    ("command", "option", "damage", "said"),
    [
        *((run_evals.main, "--collect", *case) for case in DAMAGES.values()),
        *((sweep.main, "--status", *case) for case in OF_SWEEPS.values()),
    ],
    ids=[*DAMAGES, *OF_SWEEPS],
)
def test_damage_to_a_study_is_one_message(
    root: Path,
    command: Callable[..., object],
    option: str,
    damage: Damage,
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    damage(root)
    before = listing(root)
    for words in ((option, "many"), ("--resume", "many")):
        assert status_of(command, *words) == 2
        err = capsys.readouterr().err
        assert err.count("error: ") == 1 and "Traceback" not in err and re.search(said, err), err
    assert [name for name in listing(root) if name not in before] == []


OF_A_RUN: dict[str, tuple[Damage, str]] = {
    "a bit of its result": (
        lambda run: flipped(run / "result.json"),
        r"result\.json: (is not what the run wrote there|not valid JSON|not the result)",
    ),
    "the result of another": (
        lambda run: shutil.copy(run.with_name("many-seed2") / "result.json", run),
        r"result\.json: is not what the run wrote there",
    ),
    "a result of words": (_write("result.json", b"no"), r"result\.json: not valid JSON"),
    "a result of nothing": (_write("result.json", b"{}"), r"result\.json: not the result of a run"),
}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"0.5")] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "said"), OF_A_RUN.values(), ids=OF_A_RUN)
def test_a_damaged_run_is_named_and_the_others_are_shown(
    root: Path, damage: Damage, said: str, capsys: pytest.CaptureFixture[str]
):
    assert status_of(run_evals.main, "--collect", "many") == 0
    assert "4 of 4" in capsys.readouterr().out
    damage(root / "tms_5-2" / "many-seed1")
    assert status_of(run_evals.main, "--collect", "many") == 1
    shown = capsys.readouterr()
    assert "3 of 3" in shown.out and "1 damaged" in shown.out and not shown.err
    assert re.search(f"seed 1 damaged: .*{said}", shown.out)
    assert "damaged" in (root / "evals/many/summary.html").read_text()
    (seeds,) = (row["seeds"] for row in json.loads((root / "evals/many/summary.json").read_text()))
    assert [seed["state"] for seed in seeds] == ["finished", "damaged", "finished", "finished"]


def test_a_record_that_was_written_otherwise_is_read(root: Path):
    record = root / "tms_5-2" / "many-seed1" / "meta.json"
    record.write_text(json.dumps(json.loads(record.read_text()), separators=(",", ":")))
    assert status_of(run_evals.main, "--collect", "many") == 0
