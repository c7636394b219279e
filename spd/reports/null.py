"""The null run of a run for its page: the same pipeline on a target that was never trained.

Where its figures are as good, they say nothing about what the target has learned.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spd.reports.results import Evaluation, read_result
from spd.run_files import REPORT_FILE, RESULT_FILE, has_finished

NAME = "-null"


class Null(NamedTuple):
    """Both runs, figure by figure."""

    place: str
    """of the null run, as the page's reader can find it"""
    link: str | None
    """of its report, where both lie in one folder"""
    lines: list[tuple[str, str, str]]
    """name of a figure, this run's, the null run's"""
    missing: str
    """why there are none; empty where there are"""


def null_of(config: Mapping[str, Any], run_dir: Path, result: Evaluation) -> Null | None:
    """The null run that the configuration names, or the one beside; None where there is none."""
    named = config.get("null_run")
    if config.get("null"):
        return None
    place = _beside(run_dir) if named is None else Path(str(named)).expanduser()
    if place is None:
        return None
    if not (has_finished(place) and (place / RESULT_FILE).is_file()):
        if named is None:
            return None
        return Null(str(place), None, [], "it has not finished, or is not there")
    other = read_result(place / RESULT_FILE)
    found = {row.key: other.own(row) for row in other.rows}
    lines = [
        (row.metric, result.own(row), found[row.key]) for row in result.rows if row.key in found
    ]
    here = place.absolute().parent == run_dir.absolute().parent
    return Null(str(place), f"../{place.name}/{REPORT_FILE}" if here else None, lines, "")


def _beside(run_dir: Path) -> Path | None:
    """`X-null-seed0` of `X-seed0`, `X-null` of `X`, if it is there."""
    stem, seed = re.fullmatch(r"(.*?)(-seed\d+)?", run_dir.absolute().name, re.DOTALL).groups("")  # pyright: ignore[reportOptionalMemberAccess]
    place = run_dir.absolute().with_name(f"{stem}{NAME}{seed}")
    return place if place.is_dir() else None
