"""Jobs on SLURM, through submitit: submit, look after, cancel. Knows no experiment."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from itertools import groupby
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from spd.config import UserError
from spd.launch.job import (
    ENDED,
    Job,
    Status,
    assist,
    exit_status,
    read_status,
    run_job,
    write_status,
)
from spd.launch.resources import LaunchOptions

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")
RUNNING = ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
FOLDER = "slurm"
"""of a study, with the scripts and logs of its jobs"""


class Work:
    """What submitit runs on a node: the job in one folder."""

    def __call__(self, directory: Path) -> None:
        """Run the job; where SLURM asked for its end by SIGUSR2 (a time limit, or preemption), requeue it.

        The run has then written its checkpoint. After SIGTERM it is for SLURM to decide: it is sent
        for a cancelled job as well as for one that `scontrol requeue` names. Of several machines the
        first does so, and the others assist.
        """
        machine = submitit.JobEnvironment()
        if machine.num_nodes > 1:
            os.environ |= meeting_place(machine.hostnames[0], os.environ["SLURM_JOB_ID"])
        if machine.global_rank > 0:
            assist(directory, machine.global_rank)
            return
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        ended = run_job(directory)
        if ended.state == "interrupted" and ended.signum == signal.SIGUSR2:
            try:
                requeue(signal.SIGUSR2, None)
            except UncompletedJobError as error:
                status = read_status(directory)
                write_status(directory, status._replace(state="failed", reason=str(error)))
                raise
        if exit_status(ended):
            raise SystemExit(exit_status(ended))

    def checkpoint(self, directory: Path) -> DelayedSubmission:
        """What is run when the job comes back: the same, as the run finds its own checkpoint."""
        return DelayedSubmission(self, directory)


def meeting_place(first_host: str, job_id: str) -> dict[str, str]:
    """Where the machines of a job find each other, as torchrun reads it from the environment."""
    port = 20_000 + int(job_id) % 20_000
    return {"PET_RDZV_ENDPOINT": f"{first_host}:{port}", "PET_RDZV_ID": job_id}


def submit(study: Path, jobs: Sequence[Job], options: LaunchOptions) -> dict[str, str]:
    """Submit the jobs, those of one name as an array, or several of SLURM's size; job → its number.

    If SLURM refuses one, those before it are cancelled and a `UserError` says what SLURM says.
    """
    numbers: dict[str, str] = {}
    for members, executor in list(_arrays(study, jobs, options)):
        name = members[0].slurm_name
        try:
            with redirect_stderr(io.StringIO()):
                submitted = executor.map_array(Work(), [job.directory for job in members])
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            cancel(numbers.values())
            advice = _advice(options) + (_of_array(len(members)) if len(members) > 1 else "")
            raise UserError(f"SLURM refuses {name}: {_said(error)}{advice}") from None
        numbers |= {job.name: done.job_id for job, done in zip(members, submitted, strict=True)}
    return numbers


def scripts(study: Path, jobs: Sequence[Job], options: LaunchOptions) -> Iterable[str]:
    """What would be submitted."""
    for members, executor in list(_arrays(study, jobs, options)):
        if len(members) > 1:
            executor.parameters["map_count"] = len(members)
        yield executor._make_submission_file_text(executor._submitit_command_str, "")


def max_array_size() -> int | None:
    """How many jobs may be submitted as one on this cluster: `MaxArraySize`, or 1 where it is 0, as there
    are no arrays then. None: not known.
    """
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    return max(1, int(found[1])) if found else None


def job_states() -> dict[str, str]:
    """The state of every job of this user that SLURM still knows, by its number."""
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer: {error}") from None
    if done.returncode != 0:
        raise UserError(f"squeue does not answer: {done.stderr.strip()}")
    pairs = [line.split() for line in done.stdout.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def merged(status: Status, number: str | None, states: Mapping[str, str]) -> Status:
    """What a job wrote about itself, with what SLURM says of it."""
    if status.state in ENDED or number is None:
        return status
    state = states.get(number, "")
    if state in WAITING:
        return status._replace(state="waiting", reason="requeued" if status.attempts else None)
    if state in RUNNING:
        return status._replace(state="running")
    if status.state == "running":
        return status._replace(
            state="failed", reason=f"killed (SLURM: {state or 'no longer known'})"
        )
    if status.state == "interrupted" and state != "CANCELLED":
        return status
    reason = None if state in ("", "CANCELLED") else f"SLURM: {state}"
    return status._replace(state="cancelled", reason=reason)


def cancel(numbers: Iterable[str]) -> None:
    numbers = list(numbers)
    if numbers:
        subprocess.run(["scancel", *numbers], capture_output=True)


def _arrays(
    study: Path, jobs: Sequence[Job], options: LaunchOptions
) -> Iterator[tuple[list[Job], submitit.SlurmExecutor]]:
    """The jobs that are submitted together. Where those of one name are more than an array holds, the
    arrays have about as many each, and share what `max_parallel` allows.
    """
    names = Counter(job.slurm_name for job in jobs)
    limit = max_array_size() if max(names.values(), default=0) > 1 else None
    for name, group in groupby(jobs, key=lambda job: job.slurm_name):
        members = list(group)
        n_arrays = -(-len(members) // (limit or len(members)))
        parallel = options.max_parallel
        if parallel is not None and n_arrays > parallel:
            raise UserError(
                f"{name}: {len(members)} jobs are {n_arrays} arrays of at most {limit}, as many as"
                f" SLURM's MaxArraySize allows: max_parallel {parallel} is fewer"
            )
        for index in range(n_arrays):
            share = slice(index * len(members) // n_arrays, (index + 1) * len(members) // n_arrays)
            at_a_time = None if parallel is None else parallel // n_arrays
            yield members[share], _executor(study, name, members[share], options, at_a_time)


def _executor(
    study: Path, name: str, jobs: Sequence[Job], options: LaunchOptions, at_a_time: int | None
) -> submitit.SlurmExecutor:
    """With the settings of one submission. `-P` and PYTHONPATH: the study's copy of the code runs."""
    for what, text in (("the job's name", name), ("the study's folder", str(study))):
        if not text.isprintable():  # each is a line of the script
            raise UserError(
                f"SLURM: {what} {text!r}: letters that can be printed alone are allowed"
            )
    expected = max(job.minutes for job in jobs)
    executor = submitit.SlurmExecutor(
        folder=study / FOLDER,
        max_num_timeout=options.max_timeouts,
        python=f"{shlex.quote(sys.executable)} -P",
    )
    given = {key: getattr(options, key) for key in ("partition", "account", "qos", "constraint")}
    if options.n_gpus:
        given["gpus_per_node"] = options.n_gpus
    executor.update_parameters(
        job_name=name,
        time=options.time or max(60, round(3 * expected)),
        nodes=options.nodes,
        ntasks_per_node=1,
        cpus_per_task=options.n_cpus,
        mem=f"{round(options.n_gb * 1024)}MB",
        array_parallelism=at_a_time or len(jobs),
        signal_delay_s=options.grace,
        stderr_to_stdout=True,
        setup=[f"export {key}={shlex.quote(value)}" for key, value in jobs[0].env.items()],
        srun_args=["--cpus-per-task", str(options.n_cpus)],
        wckey="spd",
        additional_parameters={"requeue": True},
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def _said(error: Exception) -> str:
    text = str(error.stderr if isinstance(error, subprocess.CalledProcessError) else error)
    lines = [line.split("error:")[-1].strip() for line in text.splitlines() if "error:" in line]
    return "; ".join(dict.fromkeys(lines)) or text.strip()


def _advice(options: LaunchOptions) -> str:
    return "; --cpu asks for no GPU" if options.n_gpus else ""


def _of_array(n_jobs: int) -> str:
    """What may be wrong with an array of so many jobs, and what to do."""
    limit = max_array_size()
    known = "is not known here (scontrol show config)" if limit is None else f"is {limit}"
    return (
        f"; it is an array of {n_jobs} jobs, and SLURM's MaxArraySize {known}: where that or the number of"
        " jobs of a user is the limit, ask for fewer agents or seeds at a time"
    )
