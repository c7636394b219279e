"""Several seeds of one experiment: each figure's mean and spread over them, and a page side by side.

Reads results and says what they come to; starts nothing.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spd.reports.page import render_page
from spd.reports.results import Result, ResultRow, format_value, read_result
from spd.run_files import REPORT_FILE, RESULT_FILE, has_finished

PAGE_SUFFIX = ".seeds.html"


class Figure(NamedTuple):
    """One figure of an experiment over its seeds."""

    key: str
    label: str
    mean: float | None
    sd: float | None
    """over the seeds; None for a single one"""
    published: float | None
    published_spread: float | None
    headline: bool
    """stands in the table of all experiments"""
    format: str
    """how it is written, as Python's `format` takes it"""

    @property
    def own(self) -> str:
        sd = "" if self.sd is None else f" ± {format_value(self.sd, None, self.format)}"
        return format_value(self.mean, None, self.format) + sd

    @property
    def beside(self) -> str:
        return format_value(self.published, self.published_spread, self.format)


class Member(NamedTuple):
    """One of the runs, as its column shows it."""

    name: str
    report: str | None
    """its path, from the page"""
    result: Result | None
    reason: str
    """why there is no result"""

    def cell(self, key: str) -> str:
        found = [row for row in self.result.rows if row.key == key] if self.result else []
        return self.result.own(found[0]) if self.result and found else "–"

    @property
    def solved(self) -> str:
        verdict = self.result.solved if self.result else None
        return {True: "yes", False: "no", None: "–"}[verdict]


def figures_over(results: Sequence[Result]) -> list[Figure]:
    """Every figure that one of the results has, over those that have it."""
    rows = [{row.key: row for row in result.rows} for result in results]
    keys = dict.fromkeys(key for of_seed in rows for key in of_seed)
    return [
        _figure(
            [(result, own[key]) for result, own in zip(results, rows, strict=True) if key in own]
        )
        for key in keys
    ]


def seeds_page(base: Path) -> Path:
    """Where the page of the runs lies that have been given `base` as their place."""
    return base.with_name(f"{base.name}{PAGE_SUFFIX}")


def write_seeds_page(base: Path, runs: Sequence[Path], reasons: Mapping[Path, str]) -> Path:
    """Write the runs of several seeds side by side; `reasons` say why some have no result."""
    page = seeds_page(base)
    members = [_member(run, page.parent, reasons.get(run, "")) for run in runs]
    results = [member.result for member in members if member.result is not None]
    contents = {
        "experiment": results[0].experiment if results else base.parent.name,
        "name": base.name,
        "members": members,
        "failed": [member for member in members if member.reason],
        "figures": figures_over(results),
    }
    return render_page(page, "seeds.html.j2", contents)


def _member(run: Path, folder: Path, reason: str) -> Member:
    report, result = run / REPORT_FILE, run / RESULT_FILE
    finished = has_finished(run) and result.is_file()
    return Member(
        run.name,
        os.path.relpath(report, folder) if report.is_file() else None,
        read_result(result) if finished else None,
        reason,
    )


def _figure(found: Sequence[tuple[Result, ResultRow]]) -> Figure:
    """One figure over the runs that have it."""
    values = [row.value for _, row in found]
    result, row = found[-1]
    quantity = result.quantity(row.key)
    finite = len(values) > 1 and all(math.isfinite(value) for value in values)
    return Figure(
        row.key,
        row.metric,
        statistics.fmean(values),
        statistics.stdev(values) if finite else None,
        row.published,
        row.published_spread,
        quantity.headline,
        quantity.format,
    )
