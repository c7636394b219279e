"""The figures of merit of a run beside the published ones; pure functions on data.

What a figure is called and how it is written comes from the metric that computes it: nothing here knows
one by name.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from spd.config import UserError, counted, read_yaml
from spd.quantities import Conclusion, Quantity, quantity_of
from spd.registry import EXPERIMENTS
from spd.run_files import REPORT_FILE, RESULT_FILE, STARTS_FILE, read_json
from spd.settings import PACKAGE_DIR

MAX_SHOWN = 16
"""figures of one run on a screen"""


class ResultRow(BaseModel):
    """One figure of the last evaluation."""

    model_config = ConfigDict(frozen=True)

    metric: str
    """how it is called"""
    key: str
    """as in metrics.jsonl, without `eval/`"""
    value: float
    spread: float | None = None
    """behind its ±"""
    published: float | None = None
    published_spread: float | None = None


class Evaluation(BaseModel):
    """The last evaluation of a run, with what its metrics say about it."""

    model_config = ConfigDict(frozen=True)

    solved: bool | None = None
    """None: there is no known solution"""
    conclusion: Conclusion | None = None
    rows: tuple[ResultRow, ...] = ()
    expected: dict[str, tuple[float, float]] = {}
    """key → lowest and highest mean over the seeds"""
    quantities: dict[str, Quantity] = {}
    """what the names in the keys of the rows mean"""

    def quantity(self, key: str) -> Quantity:
        """What a figure is; one that no metric has declared is called by its key."""
        return quantity_of(key, self.quantities) or Quantity(label=key)

    def own(self, row: ResultRow) -> str:
        """The value of this run as text."""
        return format_value(row.value, row.spread, self.quantity(row.key).format)

    def published(self, row: ResultRow) -> str:
        return format_value(row.published, row.published_spread, self.quantity(row.key).format)


class Start(BaseModel):
    """One of several starts of a run, and what became of it."""

    model_config = ConfigDict(frozen=True)

    index: int
    seed: int
    """of its V, U, importance functions and masks"""
    losses: dict[int, float] = {}
    """step → loss on the data of the choice, before that step"""
    dropped: int | None = None
    """the step before which it was left behind"""
    reason: str = ""
    chosen: bool = False


class Starts(BaseModel):
    """What starts.json holds: the starts of a run so far."""

    model_config = ConfigDict(frozen=True)

    together: bool
    """whether they are trained as one computation"""
    starts: tuple[Start, ...]

    @property
    def left(self) -> list[Start]:
        return [start for start in self.starts if start.dropped is None]

    @property
    def chosen(self) -> Start | None:
        return next((start for start in self.starts if start.chosen), None)

    def changed(self, changes: Mapping[int, Mapping[str, Any]]) -> "Starts":
        """The same with other values of some starts, by index."""
        starts = [own.model_copy(update=changes.get(own.index, {})) for own in self.starts]
        return self.model_copy(update={"starts": tuple(starts)})


def read_starts(run: Path) -> Starts | None:
    """What became of the starts of a run so far; None where nothing is recorded of any."""
    path = run / STARTS_FILE
    if not path.is_file():
        return None
    try:
        found = Starts.model_validate(read_json(path))
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise UserError(f"{path}: not the starts of a run: {place}: {wrong['msg']}") from None
    indices = [start.index for start in found.starts]
    if indices != list(range(len(indices))):
        raise UserError(f"{path}: not the starts of a run: their indices are {indices}")
    return found


class Result(Evaluation):
    """What result.json holds: a finished run."""

    experiment: str
    seed: int
    steps: int
    seconds: float
    starts: tuple[Start, ...] = ()
    """where the run was chosen among several"""
    warnings: tuple[str, ...] = ()
    """what was noticed while it was trained"""

    def as_json(self) -> dict[str, Any]:
        """For result.json; what says nothing about a figure is left out of `quantities`."""
        first = ("experiment", "seed", "steps", "seconds", "solved")
        silent = {name for name in ("starts", "warnings") if not getattr(self, name)}
        whole = self.model_dump(mode="python", exclude=silent)
        whole["quantities"] = {
            name: quantity.model_dump(exclude_defaults=True)
            for name, quantity in self.quantities.items()
        }
        return {**{key: whole.pop(key) for key in first}, **whole}


def read_result(path: Path) -> Result:
    """What a result.json holds, or a `UserError` if it is none."""
    raw = read_json(path)
    try:
        return Result.model_validate(raw)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise UserError(f"{path}: not the result of a run: {place}: {wrong['msg']}") from None


def summary_of(
    result: Result, history: Sequence[Mapping[str, float]]
) -> dict[str, float | bool | str]:
    """What a table of many runs wants to know of one: the verdict, the last figures, the best losses.

    A loss is at its best where it is lowest; of other figures nobody says which way is better.
    """
    best: dict[str, float] = {}
    for line in history:
        for key, value in line.items():
            if key.startswith("eval/loss/"):
                best[f"best/{key}"] = min(value, best.get(f"best/{key}", math.inf))
    solved = {} if result.solved is None else {"verdict/solved": result.solved}
    last = {f"eval/{key}": value for key, value in last_evaluation(history).items()}
    return {**solved, "verdict/text": verdict(result), **last, **best}


def last_evaluation(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of the last evaluation in metrics.jsonl by key; empty where there was none."""
    evaluations = [line for line in history if any(key.startswith("eval/") for key in line)]
    if not evaluations:
        return {}
    last = evaluations[-1].items()
    return {key.removeprefix("eval/"): value for key, value in last if key.startswith("eval/")}


def verdict(result: Evaluation) -> str:
    """One line: what the run comes to."""
    if result.conclusion is None:
        return "no known solution to compare with"
    headline, detail = result.conclusion.headline, result.conclusion.detail
    return f"{headline} ({detail})" if detail else headline


def cut_short(experiment: str, steps: object) -> str:
    """A sentence on a run with fewer steps than its registered experiment has; empty for any other."""
    known = EXPERIMENTS.get(experiment)
    if known is None or not isinstance(steps, int):
        return ""
    usual = read_yaml(PACKAGE_DIR / known.config)["steps"]
    if steps >= usual:
        return ""
    return f"Cut short: {counted(steps, 'step')}, where {experiment} has {usual:,}."


def in_short(result: Result) -> list[ResultRow]:
    """The figures for a screen: all where they are few, else those with a published one, then headlines."""

    def rank(row: ResultRow) -> int:
        if row.published is not None:
            return 0
        if result.quantity(row.key).headline:
            return 1
        return 2

    ranked = sorted(result.rows, key=rank)  # in their order within a rank
    chosen = {row.key for row in ranked[:MAX_SHOWN]}
    return [row for row in result.rows if row.key in chosen]


def format_result(result: Result) -> str:
    """One run as text: its figures, the published ones beside them, the verdict."""
    shown = in_short(result)
    width = max([34, *(len(row.metric) for row in shown)])
    steps = counted(result.steps, "step")
    lines = [
        f"{result.experiment}, seed {result.seed}, {steps}, {result.seconds:.0f} s",
        f"  {'':{width}} {'this run':>18} {'published':>18}",
    ]
    for row in shown:
        lines.append(f"  {row.metric:{width}} {result.own(row):>18} {result.published(row):>18}")
    left = len(result.rows) - len(shown)
    if left:
        lines.append(f"  and {counted(left, 'figure')} more in {RESULT_FILE} and {REPORT_FILE}")
    lines.append(f"  {verdict(result)}")
    short = cut_short(result.experiment, result.steps)
    warnings = [f"warning: {warning}" for warning in result.warnings]
    further = [choice_of(result.starts), short, *warnings]
    return "\n".join([*lines, *(f"  {line}" for line in further if line)])


def choice_of(starts: Sequence[Start]) -> str:
    """A sentence on how a run was chosen among its starts; empty where there was one."""
    chosen = next((start for start in starts if start.chosen), None)
    if chosen is None:
        return ""
    dropped: dict[int, list[str]] = {}
    for start in starts:
        if start.dropped is not None:
            dropped.setdefault(start.dropped, []).append(str(start.index))
    when = "; ".join(
        f"{', '.join(indices)} before step {step:,}" for step, indices in sorted(dropped.items())
    )
    return (
        f"Start {chosen.index} of 0 to {len(starts) - 1} (seed {chosen.seed}), chosen by its loss on data"
        f" that serve the choice alone; dropped: {when}."
    )


def format_table(results: Mapping[str, Result]) -> str:
    """Several runs, one line each, with their headline figures; the key is the run's name."""
    heads = {
        row.key: row.metric
        for result in results.values()
        for row in result.rows
        if result.quantity(row.key).headline
    }
    table = [("run", "seed", "steps", *heads.values(), "solved")]
    for name, result in results.items():
        cells = {row.key: result.own(row) for row in result.rows}
        solved = {True: "yes", False: "no", None: "–"}[result.solved]
        figures = (cells.get(key, "–") for key in heads)
        table.append((name, str(result.seed), str(result.steps), *figures, solved))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in table
    )


def format_value(value: float | None, spread: float | None, form: str = "") -> str:
    """`0.993 ± 0.002`; whole numbers without decimals, small ones in powers of ten; `–` for none.

    `form` is what the figure asks for instead, as Python's `format` takes it.
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        text = str(value)
    elif form:
        text = f"{value:{form}}"
    elif value == int(value) and spread is None:
        text = f"{int(value)}"
    elif abs(value) < 1e-3 and value != 0:
        text = f"{value:.2e}"
    else:
        text = f"{value:.3f}"
    return text if spread is None else f"{text} ± {format(spread, form or '.3f')}"
