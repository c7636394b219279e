"""A job: a folder that says what to run, the process that runs it, and what became of it.

Knows no scheduler. `python -m spd.launch.job FOLDER` runs one, here or on a node of a cluster; given again
after it was stopped or killed, it goes on, as the command itself does.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from spd.config import Exit
from spd.launch.records import read_record
from spd.run_files import (
    LOCK_FILE,
    seed_directory,
    sole_use,
    write_json,
)

JOB_FILE, STATUS_FILE, OUTPUT_FILE, NOW_FILE = "job.json", "status.json", "output.txt", "now.json"
State = Literal["waiting", "running", "finished", "failed", "skipped", "interrupted", "cancelled"]
ENDED: tuple[State, ...] = ("finished", "failed", "skipped")
"""there is nothing left to do"""
STATES: dict[int, State] = {
    Exit.DONE: "finished",
    Exit.UNREACHABLE: "skipped",
    **dict.fromkeys((Exit.INTERRUPTED, -signal.SIGINT, -signal.SIGTERM), "interrupted"),
    Exit.TERMINATED: "interrupted",
}
"""what an exit status means; any other is a failure"""
ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
POLL_SECONDS = 0.1
PATIENCE = 120.0
WORKER_STATUS = re.compile(r"^\s*exitcode\s*: (-?\d+)", re.MULTILINE)
"""how a process that torchrun started ended; of several, that which ended first comes last"""
TORCHRUN_LINE = re.compile(r"[EWI]\d{4} ")
LAST_WORDS = 2000
"""characters of an error message that are kept"""


class Job(NamedTuple):
    """What to run. It is kept in its folder as JSON."""

    name: str
    directory: Path
    command: list[str]
    env: dict[str, str]
    """beside the environment that is there anyway"""
    minutes: float
    """expected"""
    run_dir: Path | None = None
    """the run that the command makes, if it makes one"""
    seeds: tuple[int, ...] = ()
    """where it makes several side by side: `run_dir` is then what each `seed_directory` is made of"""
    slurm_name: str = "spd"
    retries: int = 0
    """how often the command is started again after it failed: it goes on in the run that it began"""

    @property
    def run_dirs(self) -> list[Path]:
        """Of all runs that the command makes."""
        if self.run_dir is None or not self.seeds:
            return [] if self.run_dir is None else [self.run_dir]
        return [seed_directory(self.run_dir, seed) for seed in self.seeds]

    def save(self) -> None:
        """Write it into its folder, where nothing remains of what became of it before."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / STATUS_FILE).unlink(missing_ok=True)
        record = self._asdict() | {"directory": str(self.directory)}
        record["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        write_json(self.directory / JOB_FILE, record)


class Status(NamedTuple):
    """What became of a job so far."""

    state: State = "waiting"
    reason: str | None = None
    """in a sentence, where it did not simply finish"""
    attempts: int = 0
    seconds: float = 0.0
    """worked on it, all attempts together"""
    host: str | None = None
    slurm_id: str | None = None
    updated: str | None = None


class Ended(NamedTuple):
    """How a supervised command ended."""

    state: State
    reason: str | None
    signum: int | None
    """the signal that asked this process to stop, if one did"""
    mistake: bool = False
    """in what it was given: the same command fails again"""

    @property
    def worth_another_try(self) -> bool:
        return self.state == "failed" and self.signum is None and not self.mistake


def load_job(directory: Path) -> Job:
    record = read_record(directory / JOB_FILE, Job)
    run_dir = record["run_dir"]
    paths = {"directory": directory, "run_dir": None if run_dir is None else Path(run_dir)}
    return Job(**{**record, **paths, "seeds": tuple(record.get("seeds", ()))})


def read_status(directory: Path) -> Status:
    path = directory / STATUS_FILE
    if not path.is_file():
        return Status()
    return Status(**read_record(path, Status))


def write_status(directory: Path, status: Status) -> None:
    stamp = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(directory / STATUS_FILE, status._replace(updated=stamp)._asdict())


def is_worked_on(directory: Path) -> bool:
    """Whether a process of this machine runs the job (or, where locks are shared, of another)."""
    if not (directory / LOCK_FILE).exists():
        return False
    lock = FileLock(directory / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def run_job(directory: Path, *, patience: float = PATIENCE) -> Ended:
    """Run the job in `directory` to its end, and keep its status there.

    A process that is still at it, as after a requeue, gets `patience` seconds to end; a `UserError`
    if it does not.
    """
    job = load_job(directory)
    with sole_use(directory, patience=patience):
        before, started = read_status(directory), time.monotonic()
        status = before._replace(
            state="running",
            reason=None,
            attempts=before.attempts + 1,
            host=os.uname().nodename,
            slurm_id=os.environ.get("SLURM_JOB_ID"),
        )
        write_status(directory, status)
        for run_dir in job.run_dirs:
            wait_until_free(run_dir)
        env = {**os.environ, **job.env}
        ended = supervise(job.command, directory / OUTPUT_FILE, env)
        for _ in range(job.retries):
            if not ended.worth_another_try:
                break
            reason = f"failed once: {ended.reason}"
            status = status._replace(attempts=status.attempts + 1, reason=reason)
            write_status(directory, status)
            ended = supervise(job.command, directory / OUTPUT_FILE, env)
        seconds = before.seconds + time.monotonic() - started
        status = status._replace(state=ended.state, reason=ended.reason, seconds=seconds)
        write_status(directory, status)
    return ended


def assist(directory: Path, number: int) -> None:
    """Run the same command on the machine of that number; what became of the job, machine 0 says."""
    job = load_job(directory)
    output = directory / f"output-{number}.txt"
    supervise(job.command, output, {**os.environ, **job.env})


def supervise(
    command: Sequence[str],
    output: Path,
    env: Mapping[str, str],
    *,
    hopeless: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a command, its output appended to a file; a request to stop is handed on as one SIGINT.

    SLURM signals every process of a job, and a run takes a second SIGTERM as "at once": SIGINT is
    what it has not heard yet, writes its checkpoint for, and never gets twice. `hopeless` is asked
    now and then whether the command should be stopped.
    """
    noted: list[int] = []
    previous = {
        signum: signal.signal(signum, lambda signum, frame: noted.append(signum))
        for signum in ASKED_TO_STOP
    }
    try:
        with output.open("ab") as log:
            begin = log.tell()
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                preexec_fn=_in_the_child,
            )
            told = given_up = False
            while child.poll() is None:
                if not noted and not given_up:
                    given_up = hopeless()
                if (noted or given_up) and not told:
                    child.send_signal(signal.SIGINT)
                    told = True
                time.sleep(POLL_SECONDS)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    text = _read_from(output, begin)
    state, reason = outcome(child.returncode, text)
    stopped = any(name in text[-LAST_WORDS:] for name in ("KeyboardInterrupt", "SignalException"))
    if (noted or given_up) and state == "failed" and stopped:
        state, reason = "interrupted", None  # it ended before it heeded signals, or by torchrun
    mistake = state == "failed" and _own_status(child.returncode, text) == Exit.MISTAKE
    return Ended(state, reason, noted[0] if noted else None, mistake)


def outcome(status: int, output: str) -> tuple[State, str | None]:
    """What an exit status of an experiment means, and why, from the last words of its output."""
    status = _own_status(status, output)
    state = STATES.get(status, "failed")
    if state in ("finished", "interrupted"):
        return state, None
    reason = _last_words(output)
    if status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
    return state, reason or f"exit status {status}"


def _own_status(status: int, output: str) -> int:
    """Of the command itself, where torchrun started it."""
    if status == 1 and (of_workers := WORKER_STATUS.findall(output)):
        return int(of_workers[-1])
    return status


def _last_words(output: str) -> str:
    lines = output.rstrip().splitlines()
    for index in reversed(range(len(lines))):
        if lines[index].startswith("error: "):
            message = takewhile(lambda line: not TORCHRUN_LINE.match(line), lines[index:])
            return "\n".join(message).removeprefix("error: ")[:LAST_WORDS]
    return lines[-1][:LAST_WORDS] if lines else ""


def _read_from(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", errors="replace")


def _in_the_child() -> None:
    """SIGUSR2 is for the supervisor alone, and the child does not outlive it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def wait_until_free(run_dir: Path, seconds: float = PATIENCE) -> None:
    """A run whose supervisor was killed may still be writing its checkpoint."""
    if not (run_dir / LOCK_FILE).exists():
        return
    lock = FileLock(run_dir / LOCK_FILE)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return  # the command says what is wrong
    lock.release()


def exit_status(ended: Ended) -> int:
    """Of the process that ran the job: the inverse of `STATES`."""
    return {state: status for status, state in STATES.items()}.get(ended.state, Exit.FAILED)


if __name__ == "__main__":
    raise SystemExit(exit_status(run_job(Path(sys.argv[1]))))
