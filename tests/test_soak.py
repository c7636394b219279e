"""The soak: it finds what differs, says what it was told wrongly, and finds nothing in a few kills."""

import shutil
import subprocess
import sys

import pytest

from scripts.soak_runs import differences
from spd.settings import REPO_DIR
from tests.run_fixtures import Command, command_fixture, finished_run, target_fixture

__all__ = ["command_fixture", "target_fixture"]


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO_DIR / "scripts" / "soak.py"), *arguments]
    return subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True)


def test_a_run_that_differs_or_lacks_something_is_found(command: Command):
    finished_run(command)
    run = command.only_run()
    copy = command.folder / "copy"
    place = copy / run.relative_to(command.folder)
    shutil.copytree(command.out, copy / "out")
    assert not list(differences(copy, command.folder))
    log = place / "metrics.jsonl"
    log.write_text(log.read_text()[:-2] + "\n")
    (place / "checkpoints/00000006/model.safetensors").unlink()
    (place / "result.json").write_text("{}")
    found = [
        line.removeprefix(f"{place}: ").split()[0] for line in differences(copy, command.folder)
    ]
    assert found == ["checkpoints/00000006/model.safetensors", "metrics.jsonl", "result.json"]
    shutil.rmtree(place)
    assert list(differences(copy, command.folder)) == ["0 runs instead of 1"]


@pytest.mark.slow
def test_a_mistake_is_one_line():
    done = soak("--kinds", "plain,wax")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --kinds: 'wax' (allowed: plain, "
    )
    assert soak("--kills", "0").returncode == 2


@pytest.mark.slow
def test_a_short_soak_loses_nothing():
    done = soak("--kills", "10", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills of " in done.stdout and ": 0 lost, 0 unequal" in done.stdout
    kinds = ("plain", "compiled", "side by side", "two processes", "language model")
    assert all(f" {kind}: " in done.stdout for kind in kinds)
