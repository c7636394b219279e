"""How jobs are doing: a live table on a terminal, plain lines elsewhere. Only reads.

rich is imported where it draws: it asks for random numbers when it is imported.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from spd.config.yaml_file import parse_yaml
from spd.launch.job import NOW_FILE, Job, Status
from spd.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    STARTS,
    TIMINGS_FILE,
    read_json,
)

PLAIN_LINE_SECONDS = 30
TAIL_BYTES = 64 * 1024
COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "skipped": "yellow"}


class Progress(NamedTuple):
    """How far the run of a job is."""

    label: str = ""
    """which of its runs it is at, if it makes several"""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None


def progress_of(job: Job) -> Progress:
    """From what the run writes anyway."""
    label, run_dir = "", next(iter(job.run_dirs), None)
    if (job.directory / NOW_FILE).is_file():
        now = read_json(job.directory / NOW_FILE)
        if isinstance(now, dict) and {"label", "run_dir"} <= now.keys():
            label, run_dir = str(now["label"]), Path(str(now["run_dir"]))
    if run_dir is None or not (run_dir / CONFIG_FILE).is_file():
        return Progress(label)
    steps = _steps(run_dir)
    place = _where_it_logs(run_dir)
    losses = [line for line in _tail(place / METRICS_FILE) if {"step", "loss/total"} <= line.keys()]
    timings = [line for line in _tail(place / TIMINGS_FILE) if "steps_per_second" in line]
    if not losses:
        return Progress(label, 0, steps)
    step = int(losses[-1]["step"]) + 1
    pace = timings[-1]["steps_per_second"] if timings else None
    left = (steps - step) / pace if pace and steps is not None else None
    return Progress(label, step, steps, losses[-1]["loss/total"], left)


def _where_it_logs(run_dir: Path) -> Path:
    """The run itself, or the first of its starts that are left, as long as none is chosen."""
    if (run_dir / METRICS_FILE).is_file():
        return run_dir
    left = [path.parent for path in (run_dir / STARTS).glob(f"[0-9]*/{CHECKPOINTS}")]
    return min(left, key=lambda start: (len(start.name), start.name), default=run_dir)


class Display:
    """Shows the jobs as long as it is entered."""

    def __init__(self, jobs: Sequence[Job], title: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self.jobs, self.title = jobs, title
        console = Console(stderr=True)
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.states: dict[str, str] = {}
        self.last_lines = time.monotonic()

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, statuses: Mapping[str, Status]) -> None:
        if self.live is not None:
            self.live.update(job_table(self.jobs, statuses, self.title), refresh=True)
            return
        now = time.monotonic()
        periodic = now - self.last_lines > PLAIN_LINE_SECONDS
        for job in self.jobs:
            status = statuses[job.name]
            changed = self.states.get(job.name, "waiting") != status.state
            if changed or (periodic and status.state == "running"):
                print(_line(job, status), file=sys.stderr, flush=True)
            self.states[job.name] = status.state
        if periodic:
            self.last_lines = now


def job_table(jobs: Sequence[Job], statuses: Mapping[str, Status], title: str) -> Any:
    """One line per job: step, loss, time left; a table for rich's console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("job", "state", "at", "step", "loss", "left"):
        right = column in ("step", "loss", "left")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "state")
    for job in jobs:
        status = statuses[job.name]
        progress = progress_of(job) if status.state != "waiting" else Progress()
        reason = f": {status.reason.splitlines()[0]}" if status.reason else ""
        style = COLOURS.get(status.state, "dim")
        cells = map(escape, _cells(progress, status))
        table.add_row(job.name, f"[{style}]{status.state}[/]{escape(reason)}", *cells)
    return table


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `1 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cells(progress: Progress, status: Status) -> tuple[str, str, str, str]:
    step = "" if progress.step is None else f"{progress.step:,}"
    if progress.step is not None and progress.steps is not None:
        step += f"/{progress.steps:,}"
    loss = "" if progress.loss is None else f"{progress.loss:.3e}"
    running = status.state == "running" and progress.seconds_left is not None
    left = duration(progress.seconds_left or 0.0) if running else ""
    return progress.label, step, loss, left


def _line(job: Job, status: Status) -> str:
    label, step, loss, left = _cells(progress_of(job), status)
    parts = [f"{job.name}: {status.state}"]
    parts += [f"({status.reason})"] if status.reason else []
    parts += [label] if label else []
    parts += [f"step {step}"] if step else []
    parts += [f"loss {loss}"] if loss else []
    parts += [f"{left} left"] if left else []
    return "  ".join(parts)


def _steps(run_dir: Path) -> int | None:
    try:
        text = (run_dir / CONFIG_FILE).read_text(encoding="utf-8")
        steps = parse_yaml(text).get("steps")
    except (OSError, ValueError, AttributeError):
        return None
    return steps if isinstance(steps, int) else None


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a JSON-lines file that may be growing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            found = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            continue  # the first one was cut
        if isinstance(found, dict) and all(isinstance(v, int | float) for v in found.values()):
            lines.append(found)
    return lines
