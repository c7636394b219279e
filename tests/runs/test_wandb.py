"""Runs with the real W&B library: offline, without a server, stopped by a signal."""

import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.run_fixtures import (
    Command,
    Stop,
    command_fixture,
    finished_run,
    listing,
    log_lines,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

OFFLINE = {"WANDB_MODE": "offline"}
BLOCK, HEADER = 32 * 1024, 7


def recorded(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protocol buffers, after a header of its own."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the end of a block is padded
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + HEADER])
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def history(run: Path) -> list[dict[str, Any]]:
    """What W&B recorded last, row by row, without what it adds itself."""
    path = max(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    rows = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in recorded(path)
        if record.HasField("history")
    ]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


@pytest.fixture(scope="module", name="offline")
def offline_fixture(tmp_path_factory: pytest.TempPathFactory, tms_target: Path) -> Path:
    command = Command(tmp_path_factory.mktemp("offline"), tms_target)
    command.environment.update(OFFLINE)
    done = finished_run(
        command, "figures={mean_activity: {}}", "metrics={pattern_errors: {}, causes: {}}"
    )
    run = command.only_run()
    sync = next(run.glob("wandb/offline-run-*"))
    assert f"W&B: {sync} (offline; `wandb sync {sync}` sends all of it)\n" in done.err
    assert "wandb: " not in done.err  # it says nothing itself
    return run


@pytest.mark.slow
def test_the_recorded_history_is_that_of_metrics_jsonl(offline: Path):
    rows = history(offline)
    assert [row for row in rows if "mean_activity/_type" not in row] == log_lines(offline)
    (figures,) = [row for row in rows if "mean_activity/_type" in row]
    assert figures["step"] == 6 and figures["mean_activity/_type"] == "image-file"


@pytest.mark.slow
def test_the_recorded_run_bears_name_project_and_settings(offline: Path):
    (path,) = offline.glob("wandb/offline-run-*/*.wandb")
    (run, *_) = [record.run for record in recorded(path) if record.HasField("run")]
    kept = json.loads((offline / "meta.json").read_text())["wandb_id"]
    assert (run.run_id, run.project) == (kept, "spd-tms") and kept.startswith(f"{offline.name}-")
    assert run.display_name == f"tms_5-2-seed0-{offline.name}"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["steps"] == 6 and config["sites"] == {"linear1": 6, "linear2": 6}
    exits = [record.exit.exit_code for record in recorded(path) if record.HasField("exit")]
    assert exits == [0]


def labels(run: Path) -> tuple[str, str, list[str], str]:
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    (record, *_) = [record.run for record in recorded(path) if record.HasField("run")]
    return record.run_group, record.job_type, list(record.tags), record.notes


@pytest.mark.slow
def test_group_job_type_tags_and_notes_are_set_by_themselves(offline: Path):
    group, job_type, tags, notes = labels(offline)
    assert (group, job_type, tags) == ("tms_5-2", "decomposition", ["tms_5-2", "seed0"])
    meta = json.loads((offline / "meta.json").read_text())
    assert notes.startswith(f"{meta['command']}\n{offline} on ") and meta["commit"] in notes


@pytest.mark.slow
def test_labels_are_those_of_the_command_line_or_of_the_study(command: Command):
    given = ("wandb_group=mine", "wandb_job_type=trial", "wandb_tags=[a, b]", "wandb_notes=why")
    in_study = {**OFFLINE, "WANDB_RUN_GROUP": "20261126-a", "WANDB_JOB_TYPE": "evals"}
    assert command.tms(*given, env=in_study).status == 0
    run = command.only_run()
    assert labels(run) == ("mine", "trial", ["a", "b"], "why")
    study = command.out / "study"
    done = command.tms("--run_dir", str(study), env=in_study)
    assert done.status == 0 and labels(study)[:2] == ("20261126-a", "evals")
    refused = command.tms("wandb_tags=['']", env=OFFLINE)
    assert refused.status == 2 and "wandb_tags.0: " in refused.err


@pytest.mark.slow
def test_the_summary_holds_the_verdict_the_last_figures_and_the_best_losses(offline: Path):
    (path,) = offline.glob("wandb/offline-run-*/*.wandb")
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in recorded(path)
        if record.HasField("summary")
        for item in record.summary.update
    }
    result = json.loads((offline / "result.json").read_text())
    assert summary["verdict/solved"] is result["solved"] is False
    conclusion = result["conclusion"]
    assert summary["verdict/text"].startswith(conclusion["headline"]) and conclusion["headline"]
    evaluations = [line for line in log_lines(offline) if "eval/loss/total" in line]
    assert len(evaluations) > 1
    for key, value in evaluations[-1].items():
        if key.startswith("eval/"):
            assert summary[key] == value
    lowest = min(line["eval/loss/total"] for line in evaluations)
    assert summary["best/eval/loss/total"] == lowest


@pytest.mark.slow
def test_the_run_directory_is_as_without_wandb_but_for_its_folder(offline: Path):
    ours = {name for name in listing(offline) if not name.startswith("wandb/")}
    assert {"config.yaml", "metrics.jsonl", "result.json", "report.html"} <= ours
    assert (offline / "config.yaml").read_text(encoding="utf-8").startswith("sites:")
    meta = json.loads((offline / "meta.json").read_text())
    assert Path(meta["tracker"]).is_dir() and Path(meta["tracker"]).parent == offline / "wandb"
    links = [path for path in offline.rglob("*") if path.is_symlink() and path.is_file()]
    sent = {str(path.relative_to(path.parents[-1])).rpartition("/files/")[2] for path in links}
    assert {f"{offline.name}/{name}" for name in ours - {".lock"}} <= sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals_are_heard_beside_wandb(command: Command, signum: int, status: int):
    done = command.tms(env=OFFLINE, stop=Stop(signum, "open *.00000004.partial"))
    run = command.only_run()
    assert done.status == status and "Traceback" not in done.err
    assert f"stopped before step 5 of 6; continue with --resume {run}\n" in done.err
    assert json.loads((run / "meta.json").read_text())["status"] == "interrupted"
    assert history(run) == log_lines(run)
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    exits = [record.exit.exit_code for record in recorded(path) if record.HasField("exit")]
    assert exits == [1]


@pytest.mark.slow
def test_the_newest_folder_of_a_resumed_offline_run_holds_all_of_it(command: Command):
    stop = Stop(signal.SIGKILL, "open *.00000004.partial")
    command.tms("figures={mean_activity: {}}", "figures_every=1", env=OFFLINE, stop=stop)
    run = command.only_run()
    done = command.resume(run, env=OFFLINE)
    assert done.status == 0, done.err
    folders = sorted(run.glob("wandb/offline-run-*"))
    names = {folder.name.partition("-run-")[2].partition("-")[2] for folder in folders}
    assert len(folders) == 2 and names == {json.loads((run / "meta.json").read_text())["wandb_id"]}
    newest = json.loads((run / "meta.json").read_text())["tracker"]
    assert f"W&B: {newest} (offline; `wandb sync {newest}` sends all of it)" in done.err
    rows = history(run)
    assert [row for row in rows if "mean_activity/_type" not in row] == log_lines(run)
    drawn = [row["step"] for row in rows if "mean_activity/_type" in row]
    files = {int(path.stem) for path in run.glob("figures/mean_activity/*.png")}
    assert sorted(drawn) == sorted(files) and len(drawn) > 1


@pytest.mark.slow
def test_a_server_that_does_not_answer_does_not_stop_the_run(command: Command):
    env = {
        **{"WANDB_MODE": None, "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"},
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    done = command.tms(env=env)
    assert done.status == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "W&B could not be started" in line]
    assert "logging locally only" in line
    assert len(log_lines(command.only_run())) == 9


def test_a_project_that_wandb_refuses_does_not_stop_the_run(command: Command):
    done = command.tms("wandb_project=a/b", env=OFFLINE)
    assert done.status == 0 and done.err.count("W&B could not be started") == 1
    assert "Invalid project name" in done.err and len(log_lines(command.only_run())) == 9
