"""How many seeds of a recipe come out right: records of studies of `spd-evals`, and their part of the page.

A study has too many runs for a record of each. Its own, docs/results/rates/<name>.json, keeps the command,
the commit and one line of figures for every run.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd.config import UserError
from spd.engine.fingerprint import is_stale
from spd.evals.confusion import Judged, Near, by_group
from spd.evals.summary import in_words, matches_pattern, rate_of
from spd.launch.job import Job
from spd.launch.study import STUDY_FILE, find_study, study_jobs
from spd.metrics.causes import BY_SOLUTION, beyond
from spd.reports.results import Result, format_value, read_result
from spd.run_files import CONFIG_FILE, META_FILE, RESULT_FILE, has_finished, read_json
from spd.runs.verify import check_run

FOLDER = "rates"
FIGURES = {
    "loss": ("loss/total",),
    "pattern errors": ("errors/total",),
    "MMCS": ("mmcs/linear1",),
    "ML2R": ("ml2r/linear1",),
    "unfaithful": ("unfaithful/",),
    "effect errors": ("effect_errors/", "wrong_weights/"),
    "lost effect": ("lost_effect/",),
    "idle importance": ("idle_importance/",),
    "adversary, 20 steps": ("adversarial/20_steps",),
    "never active": ("never_active/",),
}
"""column of the table → the figures it is made of: errors are added up, of others the largest counts"""
SUMMED = ("effect errors",)
WITHOUT_SOLUTION = ("unfaithful", "lost effect", "idle importance", "adversary, 20 steps")
"""columns that a verdict is made of where no solution is known"""
NOT_SHOWN = ("max_parallel", "local", "cpu", "wait", "partition", "account", "qos", "time", "cpus")
"""options of a command that change where its runs are, not what comes out"""

HEAD = """\
## How many seeds come out right

One line for each study of `spd-evals`, whose seeds were named before it ran; none was left out or run
again. In brackets stands Wilson's 95 % interval. `python scripts/results.py rates STUDY` makes such a
record. Of starts the seed is that of the run, whose starts have seeds of their own.
"""

CONFUSION_HEAD = """\
## What can be said without a solution

A target that nobody has solved has no known solution to compare with. Here is what the points that need
none (faithful, adversary, data) would have said of the runs above, alone and with the best run of the same
target and settings beside them, against the verdict by all points. `python -m spd.evals.confusion PLACE`
prints it of any finished runs. The limits were chosen on other seeds, 10 to 29 of `tms_5-2_fast`.
"""


def rates_record(study: Path) -> dict[str, Any]:
    """The record of a finished study of one experiment; `UserError` if it is none."""
    if not (study / STUDY_FILE).is_file():
        raise UserError(f"{study}: no study of spd-evals; a folder with {STUDY_FILE} is allowed")
    whole = find_study("evals", f"{study}/")
    about = read_json(study / STUDY_FILE)
    jobs: Sequence[Job] = study_jobs(whole)
    folders = [Path(run) for job in jobs for run in job.run_dirs]
    open_runs = [run for run in folders if not has_finished(run)]
    if open_runs:
        raise UserError(
            f"{open_runs[0]}: the run is not finished; a study whose runs all are is needed"
        )
    for run in folders:
        check_run(run, verify=True)
    experiments = {read_result(run / RESULT_FILE).experiment for run in folders}
    if len(experiments) != 1:
        raise UserError(f"{study}: {len(experiments)} experiments; a study of one is needed")
    return {
        "experiment": experiments.pop(),
        "command": _command(about["argv"]),
        "commit": about["commit"],
        "dirty": about["dirty"],
        "created": about["created"],
        "objective": read_json(folders[0] / META_FILE).get("objective", {}),
        "device": read_json(folders[0] / META_FILE).get("device"),
        "runs": [_line(run) for run in folders],
    }


def _command(argv: Sequence[str]) -> str:
    """What was typed, without where its runs were to be executed."""
    words, rest = [Path(argv[0]).name], list(argv[1:])
    while rest:
        word = rest.pop(0)
        takes_value = bool(rest) and not rest[0].startswith("--") and "=" not in word
        value = [rest.pop(0)] if word.startswith("--") and takes_value else []
        if word.removeprefix("--").partition("=")[0] not in NOT_SHOWN:
            words += [word, *value]
    return shlex.join(words)


def _line(run: Path) -> dict[str, Any]:
    result = read_result(run / RESULT_FILE)
    config = (run / CONFIG_FILE).read_text(encoding="utf-8")
    target = re.search(r"^target_seed: (\d+)$", config, re.M)
    return {
        "seed": result.seed,
        "target_seed": int(target[1]) if target else None,
        "solved": result.solved if _was_judged(result) else None,
        "pattern": matches_pattern(result),
        "seconds": round(result.seconds),
        **{name: _figure(result, name) for name in FIGURES},
    }


def _was_judged(result: Result) -> bool:
    return any(row.key.startswith(BY_SOLUTION) for row in result.rows)


def _figure(result: Result, name: str) -> float | None:
    values = [row.value for row in result.rows if row.key.startswith(FIGURES[name])]
    if not values:
        return None
    return float(f"{sum(values) if name in SUMMED else max(values):.6g}")


def write_rates(record: Mapping[str, Any], study: Path, root: Path) -> Path:
    """Write a record to `rates/<experiment>_<study>.json`."""
    path = root / FOLDER / f"{record['experiment']}_{study.resolve().name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n  ".join(json.dumps(run) for run in record["runs"])
    rest = {key: value for key, value in record.items() if key != "runs"}
    text = json.dumps(rest, indent=1)[:-2] + f',\n "runs": [\n  {runs}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")
    return path


def read_rates(root: Path) -> list[dict[str, Any]]:
    """All records, in the order in which their studies began."""
    found = [read_json(path) for path in root.glob(f"{FOLDER}/*.json")]
    return sorted(found, key=lambda record: (record["experiment"], record["created"]))


def rates_part(root: Path, present: Mapping[str, float]) -> str:
    """The part of the page: a table of all studies, and one of the runs of each."""
    records = read_rates(root)
    if not records:
        return ""
    heads = [
        "experiment",
        "command",
        "solved",
        "pattern",
        "loss where solved",
        "where not",
        "record",
    ]
    lines = [
        [
            f"`{record['experiment']}`",
            f"`{record['command']}`",
            in_words(rate_of([run["solved"] for run in record["runs"]])),
            in_words(rate_of([run["pattern"] for run in record["runs"]])),
            *(_range_of_losses(record["runs"], solved) for solved in (True, False)),
            "stale" if is_stale(record["objective"], present) else "current",
        ]
        for record in records
    ]
    parts = [HEAD, _table(heads, lines) + "\n"]
    for record in records:
        parts += [
            f"`{record['command']}`, commit {_commit(record)}\n",
            _runs(record["runs"]) + "\n",
        ]
    return "\n".join(parts)


def confusion_part(root: Path) -> str:
    """What the verdict without a solution is worth on these runs."""
    records = read_rates(root)
    runs = [judged for record in records for judged in _judged(record)]
    if not runs:
        return ""
    parts = ["\n".join(["```text", *lines, "```\n"]) for lines in by_group(runs, Near())]
    return "\n".join([CONFUSION_HEAD, *parts])


def _judged(record: Mapping[str, Any]) -> list[Judged]:
    """Both verdicts of the runs of a record, as far as its figures go."""
    settings = [word for word in shlex.split(record["command"]) if "=" in word]
    found = []
    for run in record["runs"]:
        if run["solved"] is None:
            continue
        named = {FIGURES[name][0]: run.get(name) for name in WITHOUT_SOLUTION}
        figures = {
            f"{key}worst site" if key.endswith("/") else key: value
            for key, value in named.items()
            if value is not None
        }
        target = f"target seed {run['target_seed'] or 0}"
        found.append(
            Judged(
                f"seed {run['seed']}, {target}",
                ", ".join([record["experiment"], *settings, target]),
                run["solved"],
                tuple(beyond(figures)),
                run["loss"],
                run["adversary, 20 steps"],
            )
        )
    return found


def _range_of_losses(runs: Sequence[Mapping[str, Any]], solved: bool) -> str:
    losses = [run["loss"] for run in runs if run["solved"] is solved and run["loss"] is not None]
    if not losses:
        return "–"
    return f"{min(losses):.4g} to {max(losses):.4g}" if len(losses) > 1 else f"{losses[0]:.4g}"


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    said = {True: "yes", False: "no", None: "–"}
    targets = any(run["target_seed"] is not None for run in runs)
    heads = [*(["target"] if targets else []), "seed", "solved", "pattern", *FIGURES]
    lines = [
        [
            *([str(run["target_seed"])] if targets else []),
            str(run["seed"]),
            said[run["solved"]],
            said[run["pattern"]],
            *(_shown(name, run.get(name)) for name in FIGURES),
        ]
        for run in runs
    ]
    return _table(heads, lines)


def _shown(name: str, value: float | None) -> str:
    return f"{value:.4g}" if name == "loss" and value is not None else format_value(value, None)


def _commit(record: Mapping[str, Any]) -> str:
    commit = record["commit"]
    return "–" if commit is None else commit[:8] + ("+" if record["dirty"] else "")


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
