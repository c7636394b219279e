"""What came out of a study of `spd-evals`, beside the published figures. Reads only files."""

import functools
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spd.config import UserError
from spd.evals.controls import CONTROLS
from spd.launch.job import Job, Status
from spd.launch.watch import duration
from spd.reports.page import render_page
from spd.reports.results import Result, read_result
from spd.reports.seeds import Figure, figures_over
from spd.run_files import (
    META_FILE,
    REPORT_FILE,
    RESULT_FILE,
    atomic_write,
    has_finished,
    read_json,
    sha256_of,
)

if TYPE_CHECKING:
    from spd.evals.picture import Picture

PAGE, DATA = "summary.html", "summary.json"
MEANINGS = {control.suffix: control.meaning for control in CONTROLS}
ERRORS = "errors/total"
"""the key of what the known pattern is matched by"""
DAMAGED = "damaged"
"""of a run that has finished, and whose result is not what it wrote"""


class Seed(NamedTuple):
    """One run of an experiment."""

    name: str
    state: str
    reason: str | None
    seconds: float
    result: Result | None
    report: str | None
    """its path, from the study"""
    target: int | None = None
    """on which of several targets"""


class Rate(NamedTuple):
    """On how many of n seeds something holds."""

    k: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate over seeds that nobody has chosen."""
        z = statistics.NormalDist().inv_cdf(0.975)
        share, spread = self.k / self.n, z * z / self.n
        middle = share + spread / 2
        half = math.sqrt(spread * (share * (1 - share) + spread / 4))
        low, high = (end / (1 + spread) for end in (middle - half, middle + half))
        return max(0.0, low), min(1.0, high)


def rate_of(verdicts: Sequence[bool | None]) -> Rate | None:
    """Of what was judged; None if nothing was."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    return Rate(sum(judged), len(judged)) if judged else None


def in_words(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    low, high = rate.interval
    return f"{rate.k} of {rate.n} ({low:.2f}–{high:.2f})"


def matches_pattern(result: Result) -> bool | None:
    """None: the run has no figure of it."""
    errors = [row.value for row in result.rows if row.key == ERRORS]
    return errors[0] == 0 if errors else None


class Row(NamedTuple):
    """One experiment."""

    experiment: str
    figures: list[Figure]
    seeds: list[Seed]
    solved_by: Rate | None
    """causes; None: nothing was judged"""
    matching: Rate | None
    """the known pattern; None: none is known"""
    misses: list[str]
    """in what it is not as expected"""
    control: str = ""
    """what it is run on in place of the experiment itself"""

    @property
    def headlines(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.headline]

    @property
    def finished(self) -> list[Seed]:
        return [seed for seed in self.seeds if seed.result is not None]

    @property
    def skipped(self) -> bool:
        return all(seed.state == "skipped" for seed in self.seeds)

    @property
    def solved(self) -> str:
        return in_words(self.solved_by)

    @property
    def pattern(self) -> str:
        return in_words(self.matching)

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
        fine = "control" if self.control else "as expected"
        return "; ".join(counts + ["missed"] * bool(self.misses)) or fine

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
    *,
    show: Callable[[str], object] | None = None,
) -> Summary:
    """Write `summary.html` and `summary.json` into the study; `show` is given the table before that."""
    rows = [
        summarise(
            *(name + suffix, [seed for job in group for seed in _seeds(directory, job, statuses)]),
            control=MEANINGS.get(suffix, ""),
        )
        for (name, suffix), group in _by_experiment(jobs, record).items()
    ]
    table = format_rows(rows)
    if show is not None:
        show(table)
    states = [status.state for status in statuses.values()]
    unfinished = any(state not in ("finished", "failed", "skipped") for state in states)
    good = not any(row.misses for row in rows if not row.control)
    good = good and all(state in ("finished", "skipped") for state in states)
    good = good and not any(seed.state == DAMAGED for row in rows for seed in row.seeds)
    contents = {
        "study": directory.name,
        "rows": rows,
        "pictures": {row.experiment: _picture(directory, row) for row in rows},
        "record": record,
        "good": good,
        "unfinished": unfinished,
        "duration": duration,
    }
    page = render_page(directory / PAGE, f"{PAGE}.j2", contents, folder=Path(__file__).parent)
    data = json.dumps([_plain(row) for row in rows])  # without indentation C writes it
    atomic_write(directory / DATA, f"{data}\n")
    return Summary(table, page, good, unfinished)


def _picture(directory: Path, row: Row) -> "Picture | None":
    # matplotlib comes with it: whoever waits for the table need not wait for that
    from spd.evals.picture import Run, picture_of

    figures = [figure for figure in row.figures if figure.headline or figure.key == ERRORS]
    runs = [Run(s.name, s.target, s.result) for s in row.finished if s.result is not None]
    return picture_of(directory, row.experiment, figures, runs)


def summarise(name: str, seeds: list[Seed], control: str = "") -> Row:
    """The figures of one experiment over its finished seeds, and in what they are not as expected.

    Of a control nothing is expected here.
    """
    results = [seed.result for seed in seeds if seed.result is not None]
    figures = figures_over(results)
    solved = rate_of([result.solved for result in results])
    matching = rate_of([matches_pattern(result) for result in results])
    misses = [] if control else _misses(results, figures)
    return Row(name, figures, seeds, solved, matching, misses, control)


def format_rows(rows: Sequence[Row]) -> str:
    """One line per figure; what belongs to the whole experiment stands on its first."""
    heads = ("experiment", "figure", "mean ± sd", "published")
    table: list[tuple[str, ...]] = [(*heads, "solved (95 %)", "pattern (95 %)", "time", "result")]
    for row in rows:
        whole = (row.solved, row.pattern, row.time, row.verdict)
        cells = [(figure.label, figure.own, figure.beside) for figure in row.headlines]
        for index, words in enumerate(cells or [("–", "–", "–")]):
            name, rest = (row.experiment, whole) if index == 0 else ("", ("", "", "", ""))
            table.append((name, *words, *rest))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    details = [f"{row.experiment}: {detail}" for row in rows for detail in row.details]
    details += [f"{row.experiment}: {row.control}" for row in rows if row.control]
    return "\n".join([*lines, *details])


def _misses(results: Sequence[Result], figures: Sequence[Figure]) -> list[str]:
    """Whose mean over the seeds is not in the range that the configuration expects."""
    expected = {key: ends for result in results for key, ends in result.expected.items()}
    labels = {figure.key: figure.label for figure in figures}
    misses = []
    for key, (low, high) in expected.items():
        known = [row.value for result in results for row in result.rows if row.key == key]
        mean = statistics.fmean(known) if len(known) == len(results) else math.nan
        if not low <= mean <= high:
            found = f"from {low:g} to {high:g}, found {mean:.3f}"
            misses.append(f"{labels.get(key, key)} {found}")
    return misses


def _by_experiment(
    jobs: Sequence[Job], record: Mapping[str, Any]
) -> dict[tuple[str, str], list[Job]]:
    """(experiment, suffix of a control or nothing) → its jobs."""
    groups = {
        (name, suffix): [
            job
            for job in jobs
            if re.match(rf"{re.escape(name + suffix)}(-target\d+)?-seed", job.name)
        ]
        for name in record["experiments"]
        for suffix in ("", *MEANINGS)
    }
    return {key: group for key, group in groups.items() if group or not key[1]}


def _seeds(directory: Path, job: Job, statuses: Mapping[str, Status]) -> Iterator[Seed]:
    """The runs of a job; of several, some may have finished where it has failed or was stopped."""
    status = statuses[job.name]
    seeds = [str(seed) for seed in job.seeds] or [job.name.rpartition("-seed")[2]]
    found = re.search(r"-target(\d+)-seed", job.name)
    target = None if found is None else int(found[1])
    for name, run_dir in zip(seeds, job.run_dirs, strict=True):
        report = run_dir / REPORT_FILE
        state, reason, result = status.state, status.reason, None
        try:
            if state == "finished" or (bool(job.seeds) and has_finished(run_dir)):
                state, reason, result = "finished", None, _result_of(run_dir)
        except UserError as error:
            state, reason = DAMAGED, str(error)
        yield Seed(
            name if target is None else f"{name} on target {target}",
            state,
            reason,
            status.seconds,
            result,
            f"{_way(run_dir, directory)}/{REPORT_FILE}" if report.is_file() else None,
            target,
        )


def _result_of(run_dir: Path) -> Result | None:
    """What a finished run has come to; `UserError` unless it is what the run wrote, by its digest."""
    path, record = run_dir / RESULT_FILE, run_dir / META_FILE
    if not path.is_file():
        return None
    result = read_result(path)
    if record.is_file():
        whole = f'"{RESULT_FILE}": "{sha256_of(path)}"'.encode()
        # it is looked for as text: the records of thousands of runs are long
        if whole not in record.read_bytes():
            meta = read_json(record)
            known = meta.get("digests", {}) if isinstance(meta, dict) else {}
            if known.get(RESULT_FILE, "") and sha256_of(path) != known[RESULT_FILE]:
                raise UserError(f"{path}: is not what the run wrote there, by its SHA-256")
    return result


def _way(run_dir: Path, directory: Path) -> str:
    """To a run from the study; that to its folder is found once for the runs that lie there."""
    return os.path.join(_relative(os.path.dirname(run_dir), str(directory)), run_dir.name)


_relative = functools.cache(os.path.relpath)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "experiment": row.experiment,
        "figures": [figure._asdict() for figure in row.figures],
        "seeds": [_plain_seed(seed) for seed in row.seeds],
        "solved": _plain_rate(row.solved_by),
        "pattern": _plain_rate(row.matching),
        "n_finished": len(row.finished),
        "verdict": row.verdict,
        "control": row.control,
        "as_expected": row.verdict == "as expected",
    }


def _plain_rate(rate: Rate | None) -> dict[str, Any] | None:
    return None if rate is None else {**rate._asdict(), "wilson_95": rate.interval}


def _plain_seed(seed: Seed) -> dict[str, Any]:
    return {**seed._asdict(), "result": seed.result.as_json() if seed.result else None}
