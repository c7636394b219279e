"""How a sweep stands: a table of the best runs, and `sweep.html` beside it. Reads files alone."""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd.launch.job import Status
from spd.launch.study import Study
from spd.reports.figures import png_bytes, read_png
from spd.reports.page import render_page
from spd.sweeps.definition import Definition, Metric
from spd.sweeps.figures import against_each, parallel_coordinates
from spd.sweeps.trials import (
    Trial,
    by_value,
    definition_of,
    shown,
    trials_of,
)

PAGE = "sweep.html"
N_LISTED = 20
"""runs in the table on the terminal; the page lists all"""


def write_page(
    study: Study, agents: Mapping[str, Status], n_waiting: int | None
) -> tuple[str, Path, bool]:
    """The table as text, the page, and whether all points were run and none failed."""
    definition = definition_of(study)
    trials = by_value(trials_of(study), definition)
    keys = [key for key, parameter in definition.parameters.items() if parameter.kind != "constant"]
    keys = keys or list(definition.parameters)
    counts = _counts(trials, n_waiting)
    contents = {
        "study": study.id,
        "record": study.record,
        "definition": definition,
        "keys": keys,
        "trials": [(trial, _report(study, trial)) for trial in trials],
        "figures": _figures(trials, keys, definition.metric),
        "counts": counts,
        "agents": agents,
        "shown": shown,
    }
    path = render_page(study.directory / PAGE, f"{PAGE}.j2", contents, folder=Path(__file__).parent)
    unwell = [f"{name}: {s.state}: {s.reason}" for name, s in agents.items() if s.state == "failed"]
    text = "\n".join([format_trials(trials, keys, definition), counts, *unwell])
    good = not unwell and not n_waiting and bool(trials)
    good = good and all(trial.state in ("finished", "pruned") for trial in trials)
    return text, path, good


def format_trials(trials: Sequence[Trial], keys: Sequence[str], definition: Definition) -> str:
    """One line per trial, the best first."""
    table = [("trial", *keys, definition.metric.name, "state")]
    for trial in trials[:N_LISTED]:
        value = "–" if trial.value is None else f"{trial.value:.6g}"
        reason = f": {trial.reason.splitlines()[0]}" if trial.reason else ""
        table.append(
            (trial.name, *(shown(trial.point[key]) for key in keys), value, trial.state + reason)
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    more = len(trials) - N_LISTED
    return "\n".join(lines + ([f"… and {more} more on the page"] if more > 0 else []))


def _counts(trials: Sequence[Trial], n_waiting: int | None) -> str:
    states = [trial.state for trial in trials]
    parts = [f"{states.count(state)} {state}" for state in sorted(set(states))]
    parts += [f"{n_waiting} to go on with or to begin"] if n_waiting else []
    return ", ".join(parts) or "nothing begun"


def _figures(trials: Sequence[Trial], keys: Sequence[str], metric: Metric) -> list[dict[str, Any]]:
    valued = [trial for trial in trials if trial.value is not None]
    if not valued:
        return []
    drawn: list[tuple[str, str, Any]] = [
        (
            "Parallel coordinates",
            "One line per run, through its value on every axis; the best are the darkest.",
            parallel_coordinates(valued, keys, metric),
        ),
        (
            "The metric against each parameter",
            "One point per run; the best are the darkest.",
            against_each(valued, keys, metric),
        ),
    ]
    return [_image(title, text, png_bytes(figure)) for title, text, figure in drawn]


def _image(title: str, text: str, png: bytes) -> dict[str, Any]:
    data = base64.b64encode(png).decode("ascii")
    return {"title": title, "text": text, "data": data, "width": read_png(png)[1][0]}


def _report(study: Study, trial: Trial) -> str | None:
    report = Path(trial.run_dir) / "report.html"
    return os.path.relpath(report, study.directory) if report.is_file() else None
