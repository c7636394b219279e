"""The trials of a sweep: one run each, and a record of it that every back end shares."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from spd.config import UserError, nearest, parse
from spd.launch.job import (
    NOW_FILE,
    Ended,
    State,
    supervise,
    wait_until_free,
)
from spd.launch.records import read_record
from spd.launch.study import JOBS, STUDY_FILE, Study, python
from spd.registry import get_experiment
from spd.run_files import (
    METRICS_FILE,
    has_finished,
    seed_directory,
    write_json,
)
from spd.settings import output_root
from spd.sweeps.definition import Definition, overrides_of
from spd.sweeps.growing import GrowingLines

TRIALS = "trials"
OUTPUT = "output.txt"
EARLIER = "earlier"
"""trials that ended under another metric, none of which had a value"""
ONLY_AT_END = "metric_only_at_end"
"""in a study's record: whether its runs log the metric in their last evaluation alone"""


class Trial(NamedTuple):
    """One point, and what came of it."""

    name: str
    point: dict[str, Any]
    run_dir: str
    state: State | str
    """as of a job, or pruned"""
    value: float | None = None
    """the metric when the run ended"""
    reason: str | None = None
    agent: str | None = None
    env: dict[str, str] = {}
    """what the back end gave the run, so that it can be continued"""


class Watcher(NamedTuple):
    """What looks after a run while it goes on."""

    heard: Callable[[int, float], None]
    """the metric's n-th value was logged"""
    hopeless: Callable[[], bool]


def ignore() -> Watcher:
    return Watcher(lambda n, value: None, lambda: False)


def log_of(study: Study, trials: Sequence[Trial]) -> Path:
    """What the first of these trials printed that began a process; of seeds side by side one did."""
    logs = [study.directory / TRIALS / f"{trial.name}.{OUTPUT}" for trial in trials]
    return next((log for log in logs if log.is_file()), study.directory / TRIALS)


def set_aside(study: Study, names: Sequence[str]) -> None:
    """These trials stand in no table from now on; their records, logs and runs stay."""
    (study.directory / TRIALS / EARLIER).mkdir(exist_ok=True)
    for name in names:
        path = study.directory / TRIALS / f"{name}.json"
        if path.is_file():
            path.rename(path.parent / EARLIER / path.name)


def definition_of(study: Study) -> Definition:
    return parse(
        Definition, study.record["definition"], f"{study.directory / STUDY_FILE}: definition"
    )


def trials_of(study: Study) -> list[Trial]:
    """Every trial that was begun, in order of name."""
    files = (study.directory / TRIALS).glob("*.json")
    trials = [Trial(**read_record(path, Trial)) for path in files]
    return sorted(trials, key=lambda trial: (len(trial.name), trial.name))


def try_lock(study: Study, name: str) -> FileLock | None:
    """The trial for this process alone, as long as the lock is held; None if another one has it."""
    (study.directory / TRIALS).mkdir(exist_ok=True)
    lock = FileLock(study.directory / TRIALS / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def run_trial(
    study: Study,
    name: str,
    point: Mapping[str, Any],
    *,
    agent: str,
    env: Mapping[str, str] | None = None,
    watcher: Watcher | None = None,
) -> tuple[Trial, Ended]:
    """Run one point to its end, or go on with it; its record is kept in the study.

    The caller holds the trial's lock.
    """
    run_dir = _runs(study) / f"{study.id}-{name}"
    trial = Trial(name, dict(point), str(run_dir), "running", agent=agent, env=dict(env or {}))
    arguments = [*overrides_of(point), "--run_dir", str(run_dir)]
    (trial,), ended = _run(study, [trial], arguments, watcher or ignore())
    return trial, ended


def run_seeds(
    study: Study, points: Mapping[str, Mapping[str, Any]], *, agent: str
) -> tuple[list[Trial], Ended]:
    """The same for points of seeds alone, by name: side by side in one process."""
    base = _runs(study) / study.id
    trials = [
        Trial(name, dict(point), str(seed_directory(base, point["seed"])), "running", agent=agent)
        for name, point in points.items()
    ]
    seeds = json.dumps([point["seed"] for point in points.values()])
    return _run(study, trials, [f"seeds={seeds}", "--run_dir", str(base)], ignore())


def _runs(study: Study) -> Path:
    return output_root().absolute() / get_experiment(study.record["experiment"]).name


def _run(
    study: Study, trials: Sequence[Trial], arguments: Sequence[str], watcher: Watcher
) -> tuple[list[Trial], Ended]:
    """One process for all of them, from the first record to the last."""
    experiment = get_experiment(study.record["experiment"])
    words = [*experiment.command(study.code / "spd"), *study.record["overrides"], *arguments]
    command = python(*words)
    metric, late = definition_of(study).metric.name, study.record.get(ONLY_AT_END, False)
    watched = [_Watched(Path(trial.run_dir), metric, watcher, late=late) for trial in trials]
    for trial in trials:
        _write(study, trial)
        wait_until_free(Path(trial.run_dir))
    first = trials[0]
    label = f"{', '.join(trial.name for trial in trials)}: {' '.join(arguments[:-2])}"
    now = {"label": label, "run_dir": first.run_dir}
    write_json(study.directory / JOBS / str(first.agent) / NOW_FILE, now)
    output = study.directory / TRIALS / f"{first.name}.{OUTPUT}"
    env = {**os.environ, **first.env}

    def hopeless() -> bool:
        return any([own.hopeless() for own in watched])

    ended = supervise(command, output, env, hopeless=hopeless)
    for _ in range(study.record.get("retries", 0)):
        if not ended.worth_another_try or any(own.problem for own in watched):
            break
        ended = supervise(command, output, env, hopeless=hopeless)
    judged = [_judged(*pair, ended, len(trials)) for pair in zip(trials, watched, strict=True)]
    for trial in judged:
        _write(study, trial)
    return judged, ended


class _Watched:
    """The metric of one run, read from what it logs, each line once."""

    def __init__(self, run_dir: Path, metric: str, watcher: Watcher, *, late: bool) -> None:
        self.run_dir, self.metric, self.watcher, self.late = run_dir, metric, watcher, late
        self.log = GrowingLines(run_dir / METRICS_FILE)
        self.found: list[float] = []
        self.keys: set[str] = set()
        self.n_heard, self.pruned = 0, False
        self.problem: str | None = None

    def hopeless(self) -> bool:
        """Whether the run should be stopped: the watcher says so, or it will never have its metric."""
        if not self._read():
            return False
        for n, value in enumerate(self.found[self.n_heard :], start=self.n_heard):
            self.watcher.heard(n, value)
        self.n_heard = max(self.n_heard, len(self.found))
        if self._comparable() and not self.late:
            self.problem = self.problem or self.missing()
        self.pruned = self.problem is None and self.watcher.hopeless()
        return self.pruned or self.problem is not None

    def values(self) -> list[float]:
        self._read()
        return self.found

    def _read(self) -> bool:
        """Whether there is something new."""
        try:
            lines, anew = self.log.new_lines()
        except UserError:
            return False
        if anew:
            self.found, self.keys = [], set()
        for line in lines:
            self.keys |= line.keys()
            if self.metric in line:
                self.found.append(line[self.metric])
        return bool(lines)

    def _comparable(self) -> set[str]:
        """What stands in the lines of the metric's kind: evaluations, or steps of training."""
        evaluated = self.metric.startswith("eval/")
        return {key for key in self.keys if key.startswith("eval/") == evaluated} - {"step"}

    def missing(self) -> str | None:
        """What is wrong if no line that was read holds the metric."""
        keys = sorted(self._comparable())
        if self.metric in keys:
            return None
        hint = nearest(self.metric, keys)
        return f"the metric {self.metric!r} is not logged{hint} (logged: {', '.join(keys) or 'nothing'})"


def _judged(trial: Trial, watched: _Watched, ended: Ended, n_trials: int) -> Trial:
    """Of several in one process, some may have finished where it failed or was stopped."""
    if n_trials > 1 and has_finished(watched.run_dir):
        ended = ended._replace(state="finished", reason=None)
    if watched.problem is not None:
        return trial._replace(state="failed", reason=watched.problem)
    values = watched.values()
    value = values[-1] if values else None
    if watched.pruned and ended.state == "interrupted" and ended.signum is None:
        return trial._replace(state="pruned", value=value)
    if ended.state == "finished" and (value is None or not math.isfinite(value)):
        reason = watched.missing() or f"the metric {watched.metric!r} is {value}"
        return trial._replace(state="failed", value=None, reason=reason)
    return trial._replace(state=ended.state, value=value, reason=ended.reason)


def _write(study: Study, trial: Trial) -> None:
    write_json(study.directory / TRIALS / f"{trial.name}.json", trial._asdict())


def by_value(trials: Sequence[Trial], definition: Definition) -> list[Trial]:
    """The best first; those without a value last, in their own order."""
    sign = 1 if definition.metric.goal == "minimize" else -1
    return sorted(trials, key=lambda trial: math.inf if trial.value is None else sign * trial.value)


def shown(value: Any) -> str:
    """A swept value as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
