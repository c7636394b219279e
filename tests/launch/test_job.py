"""A job: what becomes of a command, also when it is stopped, killed, or started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spd.config import UserError
from spd.launch.job import (
    Ended,
    Job,
    State,
    Status,
    exit_status,
    is_worked_on,
    load_job,
    outcome,
    read_status,
    run_job,
)
from spd.settings import REPO_DIR

PATIENCE = 240.0
"""seconds after which a test gives up: many times what anything takes, also on a busy machine"""
HEEDS = """
import os, signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append("INT"))
signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
print("ready", flush=True)
for _ in range(6000):
    time.sleep(0.05)
    if heard:
        time.sleep(0.15)
        print(heard, flush=True)
        sys.exit(143)
"""
"""a command that writes down what it heard, as a run writes its checkpoint"""


def make_job(folder: Path, code: str, **env: str) -> Job:
    job = Job("a-job", folder / "a-job", [sys.executable, "-c", code], env, minutes=1)
    job.save()
    return job


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for what happens in its own time; `seconds` only ends the wait for what never happens."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def supervisor(job: Job) -> subprocess.Popen[bytes]:
    """The process that SLURM or the launcher starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "spd.launch.job", str(job.directory)],
        env={**os.environ, "PYTHONPATH": str(REPO_DIR)},
        start_new_session=True,
    )
    until(lambda: "ready" in output(job))
    return process


def output(job: Job) -> str:
    path = job.directory / "output.txt"
    return path.read_text() if path.is_file() else ""


FROM_TORCHRUN = """error: batch_size: 3
  too odd
E1124 15:00:00.000000 140 torch/distributed/elastic/multiprocessing/api.py:1001] failed (exitcode: 1)
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  exitcode  : {} (pid: 2)
Root Cause (first observed failure):
[0]:
  exitcode  : {} (pid: 1)
"""
"""how torchrun reports its processes, shortened"""


def test_a_job_is_kept_in_its_folder(tmp_path: Path):
    job = make_job(tmp_path, "pass", A="1")._replace(run_dir=tmp_path / "run")
    job.save()
    assert load_job(job.directory) == job
    assert read_status(job.directory) == Status()


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (0, "error: not meant", ("finished", None)),
        (1, "step 1\nerror: loss/x = nan", ("failed", "loss/x = nan")),
        (2, "error: a: unknown key\n  b: too", ("failed", "a: unknown key\n  b: too")),
        (3, "x\nerror: the hub is away", ("skipped", "the hub is away")),
        (1, "Traceback\n  File\nKeyError: 'x'\n", ("failed", "KeyError: 'x'")),
        (130, "", ("interrupted", None)),
        (143, "stopped", ("interrupted", None)),
        (-15, "", ("interrupted", None)),
        (-9, "step 5", ("failed", "killed by SIGKILL")),
        (7, "", ("failed", "exit status 7")),
        (1, f"step 1\n{FROM_TORCHRUN.format(2, 2)}", ("failed", "batch_size: 3\n  too odd")),
        (1, f"step 1\n{FROM_TORCHRUN.format(1, 3)}", ("skipped", "batch_size: 3\n  too odd")),
        (1, FROM_TORCHRUN.format(1, 143), ("interrupted", None)),
        (1, FROM_TORCHRUN.format(143, -9), ("failed", "killed by SIGKILL")),
    ],
)
def test_what_an_exit_status_means(status: int, text: str, expected: tuple):
    assert outcome(status, text) == expected


@pytest.mark.parametrize(
    ("state", "status"), [("finished", 0), ("failed", 1), ("skipped", 3), ("interrupted", 143)]
)
def test_the_process_of_a_job_ends_with_a_status_that_means_the_same(state: State, status: int):
    assert exit_status(Ended(state, None, None)) == status
    assert outcome(status, "error: x")[0] == state


def test_a_job_that_ends_leaves_its_status_and_output(tmp_path: Path):
    job = make_job(tmp_path, "import os; print(os.environ['A'])", A="given")
    assert run_job(job.directory).state == "finished" and output(job) == "given\n"
    status = read_status(job.directory)
    assert (status.state, status.attempts, status.reason) == ("finished", 1, None)
    assert status.seconds > 0 and status.host == os.uname().nodename
    code = "import sys; sys.exit('error: no good')"
    failing = make_job(tmp_path / "other", code)
    run_job(failing.directory)
    run_job(failing.directory)
    status = read_status(failing.directory)
    assert (status.state, status.attempts, status.reason) == ("failed", 2, "no good")


FAILS_ONCE = """
import pathlib, sys
begun = pathlib.Path("{}")
if not begun.exists():
    begun.touch()
    sys.exit("error: out of memory")
print("goes on")
"""


def test_a_job_that_failed_goes_on_and_counts_once(tmp_path: Path):
    job = make_job(tmp_path, FAILS_ONCE.format(tmp_path / "begun"))._replace(retries=1)
    job.save()
    assert load_job(job.directory).retries == 1
    assert run_job(job.directory).state == "finished"
    status = read_status(job.directory)
    assert (status.state, status.attempts, status.reason) == ("finished", 2, None)
    assert output(job) == "error: out of memory\ngoes on\n"


@pytest.mark.parametrize(
    ("code", "attempts", "state"),
    [
        ("raise SystemExit(1)", 3, "failed"),
        ("import os; os.kill(os.getpid(), 9)", 3, "failed"),
        ("raise SystemExit(2)", 1, "failed"),  # a mistake stays one
        ("raise SystemExit(3)", 1, "skipped"),
        ("raise SystemExit(143)", 1, "interrupted"),
    ],
)
def test_what_is_tried_again_and_how_often(tmp_path: Path, code: str, attempts: int, state: State):
    job = make_job(tmp_path, f"print('begun', flush=True); {code}")._replace(retries=2)
    job.save()
    assert run_job(job.directory).state == state
    assert read_status(job.directory).attempts == attempts
    assert output(job).count("begun") == attempts


def test_the_mistake_of_a_process_that_torchrun_started_is_not_tried_again(tmp_path: Path):
    said = FROM_TORCHRUN.format(2, 2)
    job = make_job(tmp_path, f"print({said!r}); raise SystemExit(1)")._replace(retries=1)
    job.save()
    assert run_job(job.directory).mistake and read_status(job.directory).attempts == 1


@pytest.mark.parametrize("signals", [["USR2"], ["TERM", "TERM", "USR2"]])
def test_a_request_to_stop_is_handed_on_once(tmp_path: Path, signals: list[str]):
    """Whatever comes, and however often: the second one of a kind would end a run at once."""
    job = make_job(tmp_path, HEEDS)
    process = supervisor(job)
    for name in signals:
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.05)
    assert process.wait(timeout=PATIENCE) == 143
    assert output(job) == "ready\n['INT']\n"
    assert read_status(job.directory).state == "interrupted"


def test_signals_to_all_processes_of_a_job_end_it_no_sooner(tmp_path: Path):
    """As SLURM sends them: SIGUSR2 is for the supervisor alone, SIGTERM is heard once by each."""
    job = make_job(tmp_path, HEEDS)
    process = supervisor(job)
    os.killpg(process.pid, signal.SIGUSR2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 143
    heard = output(job).splitlines()[1]
    assert heard in ("['TERM', 'INT']", "['INT', 'TERM']", "['TERM']")
    assert read_status(job.directory).state == "interrupted"


def test_a_command_does_not_outlive_its_supervisor(tmp_path: Path):
    job = make_job(tmp_path, HEEDS)
    process = supervisor(job)
    assert is_worked_on(job.directory)
    with pytest.raises(UserError, match="another process is working on"):
        run_job(job.directory, patience=0)
    process.kill()
    process.wait()
    until(lambda: "TERM" in output(job))
    assert not is_worked_on(job.directory)
    assert read_status(job.directory).state == "running"  # who looks at it knows better


def test_a_job_that_was_given_up_starts_anew(tmp_path: Path):
    job = make_job(tmp_path, "raise SystemExit(1)")
    run_job(job.directory)
    job.save()
    assert read_status(job.directory) == Status()
    assert json.loads((job.directory / "job.json").read_text())["name"] == "a-job"
