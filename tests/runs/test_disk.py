"""Disks that are full, runs that are deleted while they run, logs that are a run's own."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spd.analysis import adversary, causes
from spd.config import RunError
from spd.engine import checkpoint
from spd.experiments.tms import plots
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.problem import copy_folder
from spd.runs import cli, stopping
from spd.runs.run import load_run, resume, run_seeds, start
from spd.runs.tracking import RunTracker
from tests.run_fixtures import QUICK, TMS_CONFIG, TMS_SCRIPT, listing, log_lines
from tests.runs.little_run import little_config, original_fixture, status_of
from tests.runs.test_permissions import modes, umask

__all__ = ["original_fixture"]

pytestmark = pytest.mark.undrawn


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "meta.json").read_text(encoding="utf-8"))


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


full = failing(errno.ENOSPC)


WRITERS = {
    "a checkpoint": "spd.engine.checkpoint.write_safetensors",
    "its state": "spd.engine.checkpoint._write_state",
    "its digests": "spd.engine.checkpoint.write_json",
    "the metrics": "spd.runs.tracking.RunTracker._write",
    "a figure": "spd.runs.execution.save_figures",
    "the report": "spd.runs.execution.report_on",
}


DISKS = [
    *((writer, errno.ENOSPC) for writer in WRITERS),
    *(("its state", errno.EROFS), ("the metrics", errno.EROFS)),
    *(("a checkpoint", errno.EDQUOT), ("the report", errno.EIO)),
]
"""of a disk that is full; that has become read-only; that has no room for this user; that is broken"""


@pytest.mark.parametrize(("writer", "number"), DISKS)
def test_a_full_disk_is_one_message_and_the_run_goes_on(
    tmp_path: Path, original: Path, writer: str, number: int, capsys: pytest.CaptureFixture[str]
):
    """Terminal, log, record and page agree; with room the run ends as one that always had it."""
    target = original.parent / "made-target"
    run = tmp_path / "a-run"
    words = [str(TMS_CONFIG), f"target={target}", *QUICK, "compile=false", "device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WRITERS[writer], failing(number))
        with pytest.raises(SystemExit) as end:
            cli.cli(TMSConfig, build, [*words, "--run_dir", str(run)])
    assert end.value.code == 1
    said = capsys.readouterr().err
    message = said.rpartition("error: ")[2].strip()
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert f"{run}: {os.strerror(number)}" in message and f"--resume {run}" in message
    assert (record(run)["status"], record(run)["reason"]) == ("failed", message)
    assert f"failed: {message}\n" in (run / "log.txt").read_text(encoding="utf-8")
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    if checkpoint.latest(run / "checkpoints") is not None:
        assert status_of(cli.report, run) == 0
        assert os.strerror(number) in (run / "report.html").read_text(encoding="utf-8")
    assert resume(TMSConfig, build, run) == run
    assert record(run)["status"] == "finished" and "reason" not in record(run)
    assert log_lines(run) == log_lines(original)
    for name in ("model.safetensors", "training_state"):
        path = Path("checkpoints/00000006") / name
        assert (run / path).read_bytes() == (original / path).read_bytes()


def test_a_disk_that_is_full_from_the_beginning_leaves_nothing(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
):
    config = little_config(original.parent)
    monkeypatch.setattr("spd.run_files.atomic_write", full)
    with pytest.raises(RunError, match="a-run: cannot be written: No space left on device"):
        start(config, build, directory=tmp_path / "a-run")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with room for little."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only the superuser mounts a disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_only_read(
    small_disk: Path, original: Path, capsys: pytest.CaptureFixture[str]
):
    """It can be looked into; what would write is one message, and changes no file."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    remount("size=20m")
    run = Path(shutil.copytree(original, small_disk / "a-run"))
    before = listing(run)
    config = [str(TMS_CONFIG), f"target={original.parent / 'made-target'}", *QUICK, "device=cpu"]
    new = [*config, "compile=false", "--run_dir", str(small_disk / "new")]

    def experiment(words: list[str]) -> None:
        cli.cli(TMSConfig, build, words)

    remount("ro")
    try:
        assert load_run(run).step == 6
        assert status_of(causes.main, run) == 1  # of six steps: not solved
        assert "error: " not in capsys.readouterr().err
        writing: dict[Callable[..., object], list[str]] = {
            cli.report: [str(run)],
            plots.main: [str(run)],
            adversary.main: [str(run), "--steps", "1", "--restarts", "1"],
            experiment: ["--resume", str(run)],
        }
        for command, words in [*writing.items(), (experiment, new)]:
            assert status_of(command, *words) in (1, 2)
            err = capsys.readouterr().err
            assert err.count("error: ") == 1 and "Traceback" not in err, err
            assert "Read-only file system" in err.rpartition("error: ")[2]
        assert listing(run) == before and not (small_disk / "new").exists()
    finally:
        remount("rw")
    assert status_of(experiment, "--resume", str(run)) == 0
    assert status_of(experiment, *new) == 0


@pytest.mark.slow
def test_a_disk_that_is_really_full(small_disk: Path, original: Path):
    """Until the first checkpoint there is room, then none; once it is larger, the run goes on."""
    run = small_disk / "a-run"
    words = [str(TMS_CONFIG), f"target={original.parent / 'made-target'}", *QUICK, "device=cpu"]
    words += ["steps=400", "save_every=1", "keep_checkpoints=400", "compile=false"]
    done = subprocess.run(
        ["python", str(TMS_SCRIPT), *words, "--run_dir", str(run)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr.rpartition("error: ")[2].strip()
    assert "No space left on device" in message and f"--resume {run}" in message
    assert (record(run)["status"], record(run)["reason"]) == ("failed", message)
    assert f"failed: {message}\n" in (run / "log.txt").read_text(encoding="utf-8")
    assert not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    done = subprocess.run(
        ["python", str(TMS_SCRIPT), "--resume", str(run)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert record(run)["status"] == "finished"


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_run_whose_directory_is_gone_stops_at_once(
    tmp_path: Path, original: Path, how: str, monkeypatch: pytest.MonkeyPatch
):
    """It makes no other one, and does not advise to go on with what is not there."""
    config = little_config(original.parent, "log_every=1", "save_every=2", "steps=50")
    run, steps = tmp_path / "a-run", []
    whole = RunTracker.stepped

    def stepped(self: RunTracker, step: int, values: dict[str, float]) -> None:
        steps.append(step)
        if step == 5:
            run.rename(tmp_path / "elsewhere")
            if how == "deleted":
                shutil.rmtree(tmp_path / "elsewhere")
            if how == "replaced":
                shutil.copytree(original, run)
        whole(self, step, values)

    monkeypatch.setattr(RunTracker, "stepped", stepped)
    with pytest.raises(RunError, match="was deleted, moved or replaced") as stopped:
        start(config, build, directory=run)
    assert steps == list(range(6)) and "--resume" not in str(stopped.value)
    if how == "replaced":
        assert listing(run) == listing(original)
    else:
        assert not run.exists()


def test_a_run_that_the_memory_does_not_suffice_for(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
):
    def too_much(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes\nat")

    monkeypatch.setattr("spd.runs.execution.run_side_by_side", too_much)
    with pytest.raises(
        RunError, match="the memory does not suffice: .*8 bytes; a smaller batch_size"
    ):
        start(little_config(original.parent), build, directory=tmp_path / "a-run")
    assert "memory does not suffice" in record(tmp_path / "a-run")["reason"]


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), stopping.in_one_message(Path("x"), "y"):
        raise RuntimeError("shapes differ")
    with pytest.raises(OSError, match="no number"), stopping.in_one_message(Path("x"), "y"):
        raise OSError("no number")


def test_the_log_of_each_run_holds_its_own_lines(tmp_path: Path, original: Path):
    config = little_config(original.parent, "seeds=[0, 1]")
    runs, failures = run_seeds(config, build, base=tmp_path / "runs")
    assert not failures
    logs = [(run / "log.txt").read_text(encoding="utf-8") for run in runs]
    for run, log in zip(runs, logs, strict=True):
        assert log.count("run directory: ") == 1 and f"run directory: {run}\n" in log
        assert log.count("target: ") == 1
        assert "seed 0, first of 2: step 6/6" in log, "what is said of both stands in both"


def test_copies_have_the_modes_that_the_umask_gives(tmp_path: Path, original: Path):
    """Folders too, of a target that its owner alone could read."""
    target = Path(shutil.copytree(original.parent / "made-target", tmp_path / "target"))
    (target / "more").mkdir()
    (target / "more/file").write_text("x")
    for path in (*target.rglob("*"), target):
        path.chmod(0o700 if path.is_dir() else 0o600)
    with umask(0o027):
        copy_folder(target, tmp_path / "copy")
    assert listing(tmp_path / "copy") == listing(target) and modes(tmp_path / "copy") == {"0o640"}
    folders = [tmp_path / "copy", tmp_path / "copy/more"]
    assert {oct(path.stat().st_mode & 0o777) for path in folders} == {"0o750"}


def test_redrawing_keeps_a_problems_own_report(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
):
    written = []
    monkeypatch.setattr(cli, "report_on", lambda run, prepared: written.append(run))
    run = Path(shutil.copytree(original, tmp_path / "a-run"))
    assert status_of(lambda words: cli.redraw_command("plots", words), run) == 0
    assert written == [run]
