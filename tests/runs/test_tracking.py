"""What a run writes while it goes on, and that nothing about W&B can stop it."""

import json
import logging
import re
from pathlib import Path

import pytest
from PIL import Image

from spd.config import UserError
from spd.run_files import read_metrics
from spd.runs.run import load_run
from spd.runs.tracking import RunTracker
from spd.runs.wandb_run import Labels, WandbRun, download_run, new_run_id, start_wandb
from tests.run_fixtures import (
    Command,
    command_fixture,
    finished_run,
    listing,
    target_fixture,
)
from tests.wandb_stand_ins import FakeApi, FakeRun

__all__ = ["command_fixture", "target_fixture"]

TERMS = {"loss/total": 0.5, "loss/recon": 0.25, "l0/a": 1.0, "l0/b": 2.0}


@pytest.fixture(autouse=True)
def _no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_ENTITY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))


def track(directory: Path, run: FakeRun | None, step: int = 0) -> RunTracker:
    wandb_run = None if run is None else WandbRun(run)
    tracker = RunTracker(directory, eval_every=3, draw=lambda step: {}, wandb_run=wandb_run)
    tracker.started(step, 3)
    for later in range(step, 3):
        tracker.stepped(later, {**TERMS, "lr": 0.1})
    tracker.evaluated(3, {"eval/loss/total": 0.125})
    tracker.ended()
    return tracker


def test_every_step_is_one_line_and_times_lie_elsewhere(tmp_path: Path):
    track(tmp_path, None)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        *({"step": step, **TERMS, "lr": 0.1} for step in range(3)),
        {"step": 3, "eval/loss/total": 0.125},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]
    timings = (tmp_path / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in timings] == [0, 1, 2]
    assert all(json.loads(line)["steps_per_second"] > 0 for line in timings)


def test_a_resumed_run_cuts_off_what_comes_after_its_checkpoint(tmp_path: Path):
    track(tmp_path, None)
    first = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(first + b'{"step": 1, "torn')
    track(tmp_path, None, step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_a_line_cut_short_is_not_read(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "lo', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, \n{"step": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics.jsonl: a line is not valid JSON"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"no such file; a run directory is expected"):
        read_metrics(tmp_path / "elsewhere")


# --- W&B -----------------------------------------------------------------------------------------


def test_wandb_is_told_what_the_file_is_told(tmp_path: Path):
    run = FakeRun()
    track(tmp_path, run)
    assert [row for row in run.history if len(row) > 1] == read_metrics(tmp_path)


@pytest.mark.parametrize("fails", ["log", "save", "finish 0"])
def test_a_tracker_that_fails_is_left_out_with_one_line(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
):
    run = FakeRun(fails)
    tracker = track(tmp_path, run)
    assert tracker.wandb_run is not None
    tracker.wandb_run.upload(tmp_path)
    tracker.wandb_run.finish(exit_code=0)
    assert len(read_metrics(tmp_path)) == 4
    (line,) = [line for line in caplog.messages if "W&B" in line]
    assert line == f"W&B failed and is left out from here on: {fails} does not work"
    assert run.calls.count(fails) == 1 and run.calls[-1] == fails
    assert tracker.wandb_run.place is None


def test_two_runs_never_share_an_id_whatever_their_folders_are_called():
    folders = [Path("A/run1"), Path("B/run1"), Path("a:;,#?/x'y / z"), Path("é")]
    ids = [new_run_id(folder) for folder in (*folders, *folders)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) for name in ids)


def test_an_offline_run_that_goes_on_is_told_all_of_it_again(tmp_path: Path):
    track(tmp_path, None)
    run = FakeRun()
    run.offline = True
    figure = tmp_path / "figures" / "loss"
    figure.mkdir(parents=True)
    for step in (1, 3):
        Image.new("1", (1, 1)).save(figure / f"{step}.png")
    tracker = RunTracker(tmp_path, eval_every=2, wandb_run=WandbRun(run))
    tracker.started(2, 6)
    tracker.ended()
    lines = read_metrics(tmp_path)
    assert run.history[: len(lines)] == lines and lines[-1]["step"] < 2
    (images,) = run.history[len(lines) :]
    assert images["step"] == 1 and set(images) == {"step", "loss"}


def test_the_place_of_a_run_is_its_page(tmp_path: Path):
    assert WandbRun(FakeRun()).place == "https://wandb.example/me/project/runs/1"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "no W&B key or login found: logging locally only (project p)"),
        ({"WANDB_API_KEY": ""}, "no W&B key or login found: logging locally only (project p)"),
        (
            {"WANDB_MODE": "disabled", "WANDB_API_KEY": "0" * 40},
            "W&B is switched off by WANDB_MODE=disabled: logging locally only",
        ),
    ],
)
def test_without_a_key_or_switched_off_it_is_one_line(
    tmp_path: Path,
    environment: dict[str, str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = {"name": "n", "directory": tmp_path, "config": {}, "run_id": "i"}
    settings["labels"] = Labels("group", "job type", (), "notes")
    assert start_wandb("p", **settings) is None
    assert caplog.messages == [line] and list(tmp_path.iterdir()) == []
    assert start_wandb(None, **settings) is None  # no project: nobody asked for it
    assert len(caplog.messages) == 1


# --- upload and download -------------------------------------------------------------------------


def test_an_uploaded_run_is_downloaded_and_loaded(command: Command, tmp_path: Path):
    finished_run(command)
    directory = command.only_run()
    for name in ("wandb/run/files/config.yaml", "checkpoints/.00000002.old.partial/x"):
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_bytes(b"not ours")
    run = FakeRun()
    WandbRun(run).upload(directory)
    assert all(name.startswith(f"{directory.name}/") for name in run.files)  # beside W&B's own
    of_wandb = tmp_path / "of_wandb.yaml"
    of_wandb.write_text("wandb_version: 1\n", encoding="utf-8")
    api = FakeApi({**run.files, "config.yaml": of_wandb}, f"me/project/{directory.name}")
    reference = f"wandb:me/project/{directory.name}"
    found = download_run(reference, api)
    assert found == command.out / "downloads" / "me" / "project" / directory.name
    kept = {name for name in listing(found)}
    assert kept == {n for n in listing(directory) if not n.startswith((".", "wandb/"))} - {
        "checkpoints/.00000002.old.partial/x"
    }
    assert download_run(reference) == found  # from here on without asking
    loaded, original = load_run(found), load_run(directory)
    assert loaded.step == 6 and loaded.metrics == original.metrics
    mine = loaded.model.subcomponent_parameters()
    assert all(
        value.equal(mine[name]) for name, value in original.model.subcomponent_parameters().items()
    )


@pytest.mark.parametrize(
    "reference",
    ["wandb:", "wandb:run", "wandb:me/run", "wandb:me/p/r/x", "wandb:me//r", "wandb:../../r"],
)
def test_a_malformed_reference_is_refused(reference: str, tmp_path: Path):
    with pytest.raises(UserError, match="expected wandb:entity/project/run-id") as caught:
        download_run(reference, FakeApi({}))
    assert str(caught.value).startswith(reference) and list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_fetched_is_named_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="wandb:me/p/gone: .*fetched.*: could not find") as caught:
        download_run("wandb:me/p/gone", FakeApi({}))
    assert "\n" not in str(caught.value)
    lost = {"run-1/config.yaml": tmp_path / "nowhere", "run-1/meta.json": tmp_path / "nowhere"}
    with pytest.raises(UserError, match="wandb:me/project/run-1: cannot be fetched"):
        download_run("wandb:me/project/run-1", FakeApi(lost))
    with pytest.raises(UserError, match="holds no run directory"):
        download_run("wandb:me/project/run-1", FakeApi({"config.yaml": Path(__file__)}))
    assert list(tmp_path.iterdir()) == []


def test_without_a_login_nothing_is_asked(tmp_path: Path):
    with pytest.raises(UserError, match="wandb:me/project/run-1: W&B needs a key: WANDB_API_KEY"):
        download_run("wandb:me/project/run-1")
    assert list(tmp_path.iterdir()) == []
