"""How a sweep stands: a table of the best runs, and `sweep.html` beside it. Reads files alone."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spd.launch.job import Status
from spd.launch.study import Study
from spd.reports.page import render_page
from spd.run_files import REPORT_FILE
from spd.sweeps.definition import Definition
from spd.sweeps.trials import (
    Trial,
    by_value,
    definition_of,
    log_of,
    shown,
    trials_of,
)

PAGE = "sweep.html"
N_LISTED = 20
"""runs in the table on the terminal; the page lists all"""
LONG_REASON = 80
"""characters from which on a reason stands below the table"""


def write_page(
    study: Study,
    agents: Mapping[str, Status],
    n_waiting: int | None,
    *,
    show: Callable[[str], object] | None = None,
) -> tuple[str, Path, bool]:
    """The table as text, the page, and whether all points were run and none failed.

    `show` is given the table before anything is drawn.
    """
    definition = definition_of(study)
    trials = by_value(trials_of(study), definition)
    keys = [key for key, parameter in definition.parameters.items() if parameter.kind != "constant"]
    keys = keys or list(definition.parameters)
    counts = _counts(trials, n_waiting)
    shared = shared_reasons(trials)
    notes = _notes(study, trials, shared)
    unwell = [f"{name}: {s.state}: {s.reason}" for name, s in agents.items() if s.state == "failed"]
    table = format_trials(trials, keys, definition, shared)
    below = [f"({number}) {reason}\n    log: {log}" for number, reason, log in notes]
    text = "\n".join([table, *below, counts, *unwell])
    if show is not None:
        show(text)
    # matplotlib comes with it: whoever waits for the table need not wait for that
    from spd.sweeps.figures import figures_of

    contents = {
        "study": study.id,
        "record": study.record,
        "definition": definition,
        "keys": keys,
        "trials": [(trial, _report(study, trial)) for trial in trials],
        "figures": figures_of(trials, keys, definition.metric),
        "counts": counts,
        "agents": agents,
        "shown": shown,
        "words": [reason_in_row(trial, shared) for trial in trials],
        "notes": notes,
    }
    path = render_page(study.directory / PAGE, f"{PAGE}.j2", contents, folder=Path(__file__).parent)
    good = not unwell and not n_waiting and bool(trials)
    good = good and all(trial.state in ("finished", "pruned") for trial in trials)
    return text, path, good


def shared_reasons(trials: Sequence[Trial]) -> dict[str, int]:
    """What several trials say, or one at length: it stands once, below the table, under its number."""
    said = Counter(trial.reason for trial in trials if trial.reason)
    long = (
        reason for reason, n in said.items() if n > 1 or len(reason) > LONG_REASON or "\n" in reason
    )
    return {reason: number for number, reason in enumerate(long, start=1)}


def reason_in_row(trial: Trial, shared: Mapping[str, int]) -> str:
    """The number of a reason that stands below the table, or the reason itself."""
    reason = trial.reason or ""
    return f"({shared[reason]})" if reason in shared else reason


def _notes(
    study: Study, trials: Sequence[Trial], shared: Mapping[str, int]
) -> list[tuple[int, str, str]]:
    """Each reason that is shared, by its number, and where more of it can be read."""
    with_reason: dict[str, list[Trial]] = {reason: [] for reason in shared}
    for trial in trials:
        if trial.reason is not None and trial.reason in shared:
            with_reason[trial.reason].append(trial)
    return [
        (number, reason, str(log_of(study, with_reason[reason])))
        for reason, number in shared.items()
    ]


def format_trials(
    trials: Sequence[Trial],
    keys: Sequence[str],
    definition: Definition,
    shared: Mapping[str, int],
) -> str:
    """One line per trial, the best first."""
    table = [("trial", *keys, definition.metric.name, "state")]
    for trial in trials[:N_LISTED]:
        value = "–" if trial.value is None else f"{trial.value:.6g}"
        words = reason_in_row(trial, shared)
        reason = f" {words}" if trial.reason in shared else f": {words}" if words else ""
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


def _report(study: Study, trial: Trial) -> str | None:
    folder, name = os.path.split(trial.run_dir)
    if not os.path.isfile(os.path.join(trial.run_dir, REPORT_FILE)):
        return None
    return os.path.join(_relative(folder, str(study.directory)), name, REPORT_FILE)


_relative = functools.cache(os.path.relpath)
"""found once for all runs that lie in one folder"""
