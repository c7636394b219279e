"""The back end of W&B: its sweep, its agents, reached through its own command line.

`wandb agent` starts `python -m spd.sweeps.wandb_backend STUDY key=value …` for every run that the
server hands out; that is a trial like those of the local back end.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from spd.config import Exit, RunError, UserError, report_error
from spd.config.yaml_file import dump_yaml, parse_yaml
from spd.launch.job import exit_status, supervise
from spd.launch.study import STUDY_FILE, Study, python
from spd.run_files import read_json
from spd.sweeps.definition import Definition
from spd.sweeps.trials import (
    Trial,
    definition_of,
    run_trial,
    trials_of,
    try_lock,
)

AGENT_VARIABLE = "SPD_SWEEP_AGENT"
RUN_VARIABLES = (
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
)
"""by which W&B's agent tells a run which one it is"""
DEFINITION = "wandb_sweep.yaml"
PROGRAM = "spd/sweeps/wandb_sweep.py"


def check(definition: Definition) -> None:
    """`UserError` if the values cannot go through W&B's command line."""
    for key, parameter in definition.parameters.items():
        for value in parameter.values or [parameter.value]:
            if value is None and (parameter.values or parameter.kind == "constant"):
                raise UserError(f"parameters.{key}: W&B writes null as None, which is a word here")


def sent(study: Study) -> dict[str, Any]:
    """The sweep definition that W&B gets."""
    raw = definition_of(study).model_dump(mode="json", exclude_unset=True)
    command = [*python("spd.sweeps.wandb_backend", str(study.directory)), "${args_no_hyphens}"]
    return {
        "name": study.record["name"],
        **raw,
        "project": study.record["project"],
        "program": PROGRAM,
        "command": command,
    }


def create(study: Study) -> None:
    """Create the sweep on W&B; its path is kept in the study."""
    path = study.directory / DEFINITION
    definition = sent(study)
    path.write_text(dump_yaml(definition), encoding="utf-8")
    place = ["--project", str(definition["project"])]
    if entity := definition.get("entity") or os.environ.get("WANDB_ENTITY"):
        place += ["--entity", entity]
    done = _wandb("sweep", *place, str(path))
    found = re.search(r"wandb agent (\S+)", done.stdout + done.stderr)
    if done.returncode != 0 or found is None:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise UserError(f"W&B does not make the sweep: {lines[-1] if lines else done.returncode}")
    study.record["sweep"] = found[1].strip("'\"")
    study.save()


def extend(study: Study) -> int:
    raise UserError(f"{study.id}: a sweep on W&B is extended there")


def begin_anew(study: Study) -> None:
    raise UserError(f"{study.id}: the metric of a sweep on W&B is set there")


def n_waiting(study: Study) -> int | None:
    """W&B knows; here only what was begun is known."""
    n, trials = definition_of(study).n_points, trials_of(study)
    n_left = sum(trial.state in ("running", "interrupted") for trial in trials)
    return None if n is None else max(0, n - len(trials)) + n_left


def work(study: Study, agent: str) -> int:
    """First what an agent that is gone left unfinished, then one run after the other; the exit status.

    Each comes from a `wandb agent --count 1` of its own: W&B's advice for jobs on a cluster.
    """
    output = study.directory / "jobs" / agent / "wandb_agent.txt"
    env = {**os.environ, AGENT_VARIABLE: agent}
    while True:
        for trial in trials_of(study):
            if trial.state in ("running", "interrupted") and not _go_on(study, trial, agent):
                return Exit.TERMINATED
        before = _begun_by(study, agent)
        command = [sys.executable, "-P", "-m", "wandb", "agent", "--forward-signals"]
        ended = supervise([*command, "--count", "1", study.record["sweep"]], output, env)
        if ended.signum is not None:
            return Exit.TERMINATED
        after = _begun_by(study, agent)
        if ended.state != "finished" and after == before:
            return report_error(RunError(f"wandb agent: {ended.reason}"))
        if after == before:
            return 0  # the sweep is over


def trial(directory: Path, overrides: list[str]) -> int:
    """What W&B's agent starts: one run, under the number that W&B gave it; its exit status."""
    study = Study(directory, read_json(directory / STUDY_FILE))
    env = {name: os.environ[name] for name in RUN_VARIABLES if name in os.environ}
    if path := env.get("WANDB_SWEEP_PARAM_PATH"):
        env["WANDB_SWEEP_PARAM_PATH"] = str(Path(path).absolute())
    name = env.get("WANDB_RUN_ID")
    if name is None:
        raise UserError("WANDB_RUN_ID is not set: this is started by `wandb agent`")
    pairs = [override.partition("=") for override in overrides]
    point = {key: parse_yaml(value) for key, _, value in pairs}
    agent = os.environ.get(AGENT_VARIABLE, "elsewhere")
    if (lock := try_lock(study, name)) is None:
        raise UserError(f"{name}: another process is working on this run")
    try:
        return exit_status(run_trial(study, name, point, agent=agent, env=env)[1])
    finally:
        lock.release()


def _go_on(study: Study, trial: Trial, agent: str) -> bool:
    """Finish a trial unless somebody is at it; False if this agent is asked to stop."""
    if (lock := try_lock(study, trial.name)) is None:
        return True
    try:
        _, ended = run_trial(study, trial.name, trial.point, agent=agent, env=trial.env)
        return ended.signum is None
    finally:
        lock.release()


def _begun_by(study: Study, agent: str) -> set[str]:
    return {trial.name for trial in trials_of(study) if trial.agent == agent}


def _wandb(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "wandb", *args],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    try:
        raise SystemExit(trial(Path(sys.argv[1]), sys.argv[2:]))
    except UserError as error:
        raise SystemExit(report_error(error)) from None
