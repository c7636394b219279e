"""What came out of a study of `spd-evals`, beside the published figures. Reads only files."""

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from spd.launch.job import Job, Status
from spd.launch.watch import duration
from spd.registry import EXPERIMENTS, Experiment
from spd.reports.results import LABELS, format_value
from spd.run_files import (
    RESULT_FILE,
    has_finished,
    read_json,
    write_json,
)
from spd.settings import PACKAGE_DIR

PAGE, DATA = "summary.html", "summary.json"
ALWAYS = ("errors/total", "loss/total")
"""figures that are shown beside those with a published value"""


class Figure(NamedTuple):
    """One figure of an experiment over its seeds."""

    key: str
    label: str
    mean: float | None
    sd: float | None
    """over the seeds; None for a single one"""
    published: float | None
    published_spread: float | None

    @property
    def own(self) -> str:
        sd = "" if self.sd is None else f" ± {format_value(self.sd, None)}"
        return format_value(self.mean, None) + sd


class Seed(NamedTuple):
    """One run of an experiment."""

    name: str
    state: str
    reason: str | None
    seconds: float
    result: dict[str, Any] | None
    """what result.json holds"""
    report: str | None
    """its path, from the study"""


class Row(NamedTuple):
    """One experiment."""

    experiment: str
    figures: list[Figure]
    seeds: list[Seed]
    n_solved: int | None
    """None: there is no known solution"""
    misses: list[str]
    """in what it is not as expected"""

    @property
    def finished(self) -> list[Seed]:
        return [seed for seed in self.seeds if seed.result is not None]

    @property
    def skipped(self) -> bool:
        return all(seed.state == "skipped" for seed in self.seeds)

    @property
    def solved(self) -> str:
        return "–" if self.n_solved is None else f"{self.n_solved} of {len(self.finished)}"

    @property
    def time(self) -> str:
        times = [seed.seconds for seed in self.finished]
        return duration(statistics.fmean(times)) if times else "–"

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        states = [seed.state for seed in self.seeds]
        counts = [f"{states.count(s)} {s}" for s in dict.fromkeys(states) if s != "finished"]
        return "; ".join(counts + ["missed"] * bool(self.misses)) or "as expected"

    @property
    def details(self) -> list[str]:
        """What the verdict is about: misses, and why runs did not finish."""
        reasons = [f"seed {s.name} {s.state}: {s.reason}" for s in self.seeds if s.reason]
        return [f"expected {miss}" for miss in self.misses] + reasons


class Summary(NamedTuple):
    """The table in words, and where the page is."""

    text: str
    page: Path
    as_expected: bool
    """no job failed or is left, and every experiment that ran has its expected result"""
    unfinished: bool


def write_summary(
    directory: Path,
    jobs: Sequence[Job],
    statuses: Mapping[str, Status],
    record: Mapping[str, Any],
) -> Summary:
    """Write `summary.html` and `summary.json` into the study."""
    rows = [
        summarise(name, [seed for job in group for seed in _seeds(directory, job, statuses)])
        for name, group in _by_experiment(jobs, record).items()
    ]
    states = [status.state for status in statuses.values()]
    unfinished = any(state not in ("finished", "failed", "skipped") for state in states)
    good = not any(row.misses for row in rows)
    good = good and all(state in ("finished", "skipped") for state in states)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([PACKAGE_DIR / "evals", PACKAGE_DIR / "reports"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(f"{PAGE}.j2")
    page = template.render(
        study=directory.name,
        rows=rows,
        record=record,
        good=good,
        unfinished=unfinished,
        value=format_value,
        duration=duration,
    )
    partial = directory / f".{PAGE}.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(directory / PAGE)
    write_json(directory / DATA, [_plain(row) for row in rows])
    return Summary(format_rows(rows), directory / PAGE, good, unfinished)


def summarise(name: str, seeds: list[Seed]) -> Row:
    """The figures of one experiment over its finished seeds, and in what they are not as expected."""
    experiment = EXPERIMENTS[name]
    results = [seed.result for seed in seeds if seed.result is not None]
    values = [{row["key"]: row for row in result["rows"]} for result in results]
    figures = [
        _figure(key, [rows[key]["value"] for rows in values if key in rows], experiment)
        for key in (
            *experiment.published,
            *(key for key in ALWAYS if any(key in v for v in values)),
        )
    ]
    verdicts = [result["solved"] for result in results if result["solved"] is not None]
    n_solved = sum(verdicts) if verdicts else None
    misses = _misses(experiment, figures, n_solved, values) if results else []
    return Row(name, figures, seeds, n_solved, misses)


def format_rows(rows: Sequence[Row]) -> str:
    """One line per figure; what belongs to the whole experiment stands on its first."""
    table = [("experiment", "figure", "mean ± sd", "published", "solved", "time", "result")]
    for row in rows:
        whole = (row.solved, row.time, row.verdict)
        for index, figure in enumerate(row.figures or [None]):
            own, published = _cells(figure)
            name, rest = (row.experiment, whole) if index == 0 else ("", ("", "", ""))
            table.append((name, figure.label if figure else "–", own, published, *rest))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    details = [f"{row.experiment}: {detail}" for row in rows for detail in row.details]
    return "\n".join([*lines, *details])


def _figure(key: str, values: Sequence[float], experiment: Experiment) -> Figure:
    name, _, place = key.partition("/")
    published = experiment.published.get(key)
    mean = statistics.fmean(values) if values else None
    finite = len(values) > 1 and all(math.isfinite(value) for value in values)
    return Figure(
        key,
        f"{LABELS.get(name, name)} {place}",
        mean,
        statistics.stdev(values) if finite else None,
        published.value if published else None,
        published.spread if published else None,
    )


def _misses(
    experiment: Experiment,
    figures: Sequence[Figure],
    n_solved: int | None,
    values: Sequence[Mapping[str, Any]],
) -> list[str]:
    misses, n = [], len(values)
    wanted = experiment.expects.solved
    if wanted is not None and (n_solved or 0) < wanted * n:
        misses.append(f"at least {math.ceil(wanted * n)} of {n} solved, found {n_solved or 0}")
    means = {figure.key: figure for figure in figures}
    for key, (low, high) in experiment.expects.means.items():
        known = [rows[key]["value"] for rows in values if key in rows]
        mean = statistics.fmean(known) if len(known) == n else math.nan
        if not low <= mean <= high:
            label = means[key].label if key in means else key
            misses.append(f"{label} from {low:g} to {high:g}, found {mean:.3f}")
    return misses


def _by_experiment(jobs: Sequence[Job], record: Mapping[str, Any]) -> dict[str, list[Job]]:
    return {
        name: [job for job in jobs if job.name.startswith(f"{name}-seed")]
        for name in record["experiments"]
    }


def _seeds(directory: Path, job: Job, statuses: Mapping[str, Status]) -> Iterator[Seed]:
    """The runs of a job; of several, some may have finished where it has failed or was stopped."""
    status = statuses[job.name]
    names = [str(seed) for seed in job.seeds] or [job.name.rpartition("-seed")[2]]
    for name, run_dir in zip(names, job.run_dirs, strict=True):
        result, report = run_dir / RESULT_FILE, run_dir / "report.html"
        finished = status.state == "finished" or (bool(job.seeds) and has_finished(run_dir))
        yield Seed(
            name,
            "finished" if finished else status.state,
            None if finished else status.reason,
            status.seconds,
            read_json(result) if finished and result.is_file() else None,
            os.path.relpath(report, directory) if report.is_file() else None,
        )


def _cells(figure: Figure | None) -> tuple[str, str]:
    if figure is None:
        return "–", "–"
    return figure.own, format_value(figure.published, figure.published_spread)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "experiment": row.experiment,
        "figures": [figure._asdict() for figure in row.figures],
        "seeds": [seed._asdict() for seed in row.seeds],
        "n_solved": row.n_solved,
        "n_finished": len(row.finished),
        "verdict": row.verdict,
        "as_expected": row.verdict == "as expected",
    }
