"""Studies: many jobs launched together, on SLURM where there is one and on this machine elsewhere.

A study is a folder that holds what was asked, a copy of the code that its jobs run, and the jobs.
Knows no experiment: what the jobs compute is the business of `evals` and `sweeps`.
"""

import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from spd.config import UserError, counted, nearest, shown
from spd.launch import slurm
from spd.launch.job import (
    ENDED,
    OUTPUT_FILE,
    Job,
    Status,
    is_worked_on,
    load_job,
    read_status,
    write_status,
)
from spd.launch.records import Kinds, checked_record
from spd.launch.resources import LaunchOptions, has_slurm, places
from spd.launch.watch import Display, duration
from spd.run_files import new_name, read_json, write_json
from spd.runs.provenance import RECORD_FILE, CodeState, code_state, package_files
from spd.settings import PACKAGE_DIR, output_root, patient_threads

STUDY_FILE, CODE, JOBS = "study.json", "code", "jobs"
OF_ANY_STUDY: Kinds = {
    **{"argv": (list,), "created": (str,), "overrides": (list,), "jobs": (list,), "slurm": (dict,)},
    **{"commit": (str, type(None)), "dirty": (bool,)},
}
OF_A_STUDY: Mapping[str, Kinds] = {
    "evals": {"experiments": (list,), "seeds": (list,)},
    "sweeps": {"definition": (dict,), "experiment": (str,), "backend": (str,)},
}
"""what study.json has to hold, and of which kind it is"""
SHOW_SECONDS, ASK_SLURM_SECONDS = 0.25, 3.0


class Study(NamedTuple):
    """A folder below the output root."""

    directory: Path
    record: dict[str, Any]
    """what study.json holds: what was asked, and SLURM's numbers of the jobs"""

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def code(self) -> Path:
        return self.directory / CODE

    def save(self) -> None:
        write_json(self.directory / STUDY_FILE, self.record)


def new_id(kind: str) -> str:
    """For a study of this kind."""
    return new_name(output_root().absolute() / kind)


def create_study(kind: str, name: str, asked: Mapping[str, Any]) -> Study:
    """A new folder `<output root>/<kind>/<name>` with a copy of the code as it is now."""
    directory = output_root().absolute() / kind / name
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{directory}: another study has begun there just now; start again"
        ) from None
    except OSError as error:
        raise UserError(
            f"{directory.parent}: the output root cannot be written ({error.strerror});"
            " set SPD_OUT_DIR to a writable folder"
        ) from None
    code = take_snapshot(directory / CODE)
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {"argv": sys.argv, "created": created, **code._asdict(), **asked, "slurm": {}}
    study = Study(directory, record)
    study.save()
    return study


def find_study(kind: str, name: str) -> Study:
    """The study of that ID (or in that folder), or a `UserError` that lists the newest."""
    root = output_root().absolute() / kind
    directory = Path(name).absolute() if "/" in name else root / name
    if not (directory / STUDY_FILE).is_file():
        known = sorted(path.parent.name for path in root.glob(f"*/{STUDY_FILE}"))
        newest = ", ".join(known[-5:]) or "none"
        raise UserError(f"{name!r}: no such ID{nearest(name, known)} (newest in {root}: {newest})")
    path = directory / STUDY_FILE
    needed = {**OF_ANY_STUDY, **OF_A_STUDY[kind]}
    kinds = {"n_agents": (int,), "retries": (int,), **needed}
    found = checked_record(read_json(path), path, kinds, frozenset(needed), others=True)
    if not all(isinstance(job, str) for job in found["jobs"]):
        raise UserError(f"{path}: jobs: names are needed, got {shown(found['jobs'])}")
    return Study(directory, found)


def job_environment(code: Path, options: LaunchOptions) -> dict[str, str]:
    """What every job gets: the study's copy of the code, the output root, how many threads."""
    path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    study = code.parent
    return {
        "PYTHONPATH": path,
        "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or study.name,
        "WANDB_JOB_TYPE": os.environ.get("WANDB_JOB_TYPE") or study.parent.name,
        "SPD_OUT_DIR": str(output_root().absolute()),
        "PYTHONSAFEPATH": "1",  # also for what torchrun starts
        "OMP_NUM_THREADS": str(options.cpus),
        **patient_threads(),
    }


def python(module: str, *args: str) -> list[str]:
    """A command that runs a module of the code on PYTHONPATH, whatever lies in the working directory."""
    return [sys.executable, "-P", "-m", module, *args]


def joined_python(options: LaunchOptions, module: str, *args: str) -> list[str]:
    """The same, by as many processes as are asked for. Of several machines, where they meet is in the
    environment of the job (`spd.launch.slurm`).
    """
    if not options.joined:
        return python(module, *args)
    place = ["--standalone"]
    if options.nodes > 1:
        place = [f"--nnodes={options.nodes}", "--rdzv_backend=c10d"]
    count = f"--nproc_per_node={options.processes}"
    return python("torch.distributed.run", *place, count, "-m", module, *args)


def study_jobs(study: Study) -> list[Job]:
    """In the order in which they were made."""
    return [load_job(study.directory / JOBS / name) for name in study.record["jobs"]]


def statuses(study: Study, jobs: Sequence[Job]) -> dict[str, Status]:
    """How the jobs are, by what they wrote and what SLURM or this machine say of them."""
    numbers = study.record["slurm"]
    own = {job.name: read_status(job.directory) for job in jobs}
    open_ones = [name for name in numbers if name in own and own[name].state not in ENDED]
    states = slurm.job_states() if open_ones and has_slurm() else {}
    result = {}
    for job in jobs:
        status, number = own[job.name], numbers.get(job.name)
        if number is not None:
            status = slurm.merged(status, number, states)
        elif status.state == "running" and not is_worked_on(job.directory):
            status = status._replace(state="interrupted", reason="its process is gone")
        result[job.name] = status
    return result


def on_slurm(options: LaunchOptions) -> bool:
    """Whether jobs go to SLURM. Says so in one line where they do not."""
    if options.local or not has_slurm():
        names = ("partition", "account", "qos", "constraint", "time")
        unused = [name for name in names if getattr(options, name) is not None]
        why = "--local" if options.local else "no SLURM here"
        rest = f"; without meaning here: {', '.join(unused)}" if unused else ""
        print(f"{why}: the jobs run on this machine{rest}")
        return False
    return True


@contextmanager
def no_collector() -> Iterator[None]:
    """For the reading of thousands of records, none of which is garbage: a tenth of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def print_at_once(text: str) -> None:
    """Also into a pipe: what is still to come may take a while."""
    print(text, flush=True)


def preview(study: Path, jobs: Sequence[Job], options: LaunchOptions) -> None:
    """Print what `launch` would do."""
    if on_slurm(options):
        for script in slurm.scripts(study, jobs, options):
            print(script)
    for job in sorted(jobs, key=lambda job: job.minutes):
        print(f"{job.slurm_name}  {job.name}: {shlex.join(job.command)}")


def launch(
    study: Study, jobs: Sequence[Job], options: LaunchOptions, *, wait: bool, expected: float
) -> bool:
    """Run or submit the jobs; True if they have been waited for.

    `expected` minutes are shown first. On this machine, `KeyboardInterrupt` comes when all jobs have
    been stopped and have written their checkpoints; on SLURM it only ends the waiting.
    """
    if not on_slurm(options):
        _run_here(jobs, options, expected)
        return True
    study.record["slurm"] |= slurm.submit(study.directory, jobs, options)
    study.save()
    for job in jobs:
        print(f"submitted {job.slurm_name}: {job.name} is job {study.record['slurm'][job.name]}")
    if wait:
        _wait(study, jobs)
    return wait


def cancel(study: Study) -> str:
    """Cancel what SLURM has of a study; what was done is kept."""
    numbers = study.record["slurm"]
    if not numbers:
        raise UserError(f"{study.id}: runs on a machine without SLURM: press Ctrl-C there")
    jobs = study_jobs(study)
    left = [job.name for job in jobs if read_status(job.directory).state not in ENDED]
    slurm.cancel(numbers[name] for name in left if name in numbers)
    return f"cancelled: {', '.join(left) or 'nothing, all jobs have ended'}"


def _wait(study: Study, jobs: Sequence[Job]) -> None:
    with Display(jobs, f"{study.id} on SLURM") as display:
        while True:
            now = statuses(study, jobs)
            display.show(now)
            if all(status.state not in ("waiting", "running") for status in now.values()):
                return
            time.sleep(ASK_SLURM_SECONDS)


def _run_here(jobs: Sequence[Job], options: LaunchOptions, expected: float) -> None:
    """The shortest first, as many at a time as the machine holds."""
    free = places(options)
    at_once = min(len(free), len(jobs))
    total = duration(60 * max(expected / at_once, max(job.minutes for job in jobs)))
    print(
        f"expected time: {total} for {counted(len(jobs), 'job')}, {at_once} at a time", flush=True
    )
    waiting = sorted(jobs, key=lambda job: job.minutes)
    running: dict[str, tuple[Job, subprocess.Popen[bytes], dict[str, str]]] = {}
    known = {job.name: read_status(job.directory) for job in jobs}
    with Display(jobs, "on this machine") as display:
        try:
            while waiting or running:
                while waiting and free:
                    job, place = waiting.pop(0), free.pop()
                    running[job.name] = (job, _start(job, place), place)
                for name, (job, process, place) in list(running.items()):
                    if process.poll() is not None:
                        _close(job, process.returncode)
                        del running[name]
                        free.append(place)
                    known[name] = read_status(job.directory)
                display.show(known)
                time.sleep(SHOW_SECONDS)
        except KeyboardInterrupt:
            print("\nstopping: every run writes a checkpoint first", file=sys.stderr, flush=True)
            for _, process, _ in running.values():
                process.terminate()
            for job, process, _ in running.values():
                process.wait()
                _close(job, process.returncode)
                known[job.name] = read_status(job.directory)
            display.show(known)
            raise


def _start(job: Job, place: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C is for the launcher, which passes it on once."""
    with (job.directory / OUTPUT_FILE).open("ab") as log:
        return subprocess.Popen(
            python("spd.launch.job", str(job.directory)),
            env={**os.environ, **job.env, **place},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _close(job: Job, returncode: int) -> None:
    """A supervisor that was killed leaves no word itself."""
    status = read_status(job.directory)
    if status.state in ("waiting", "running"):
        stopped = returncode in (-signal.SIGTERM, -signal.SIGINT)
        reason = f"its process ended with status {returncode}"
        state = "interrupted" if stopped else "failed"
        write_status(job.directory, status._replace(state=state, reason=reason))


def take_snapshot(folder: Path) -> CodeState:
    """Copy the package into `folder`, from where `PYTHONPATH` finds it; returns its state.

    With what is not committed: the copy is the code that would run now. What git is told to ignore is
    no part of it, nor is a `.env`, which holds keys.
    """
    state = code_state()
    for file in package_files():
        place = folder / PACKAGE_DIR.name / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PACKAGE_DIR / file, place)
    write_json(folder / RECORD_FILE, state._asdict())
    return state
