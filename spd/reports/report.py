"""report.html: a run directory as one self-contained page, whatever the directory holds so far.

Reads files alone. Imports no experiment and loads no model.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from spd.config import UserError
from spd.engine import checkpoint
from spd.engine.prepare import Prepared, evaluate, progress_at
from spd.metrics import MetricSpec
from spd.registry import EXPERIMENTS
from spd.reports.analyses import analyses_of
from spd.reports.curves import live_curves
from spd.reports.evaluations import evaluation_of
from spd.reports.figures import Drawable, draw, loss_curves, save_figures
from spd.reports.images import CURVES, drawn, image, images, numbers_of
from spd.reports.ladder import LADDER, is_of_ladder, ladder_of
from spd.reports.null import null_of
from spd.reports.origin import (
    commands_of,
    provenance_of,
    siblings_of,
    target_record,
    web_link,
)
from spd.reports.page import render_page
from spd.reports.reading import (
    configuration_in,
    evaluation_in,
    object_of,
    text_of,
)
from spd.reports.results import (
    Evaluation,
    ResultRow,
    choice_of,
    cut_short,
    last_evaluation,
    read_result,
    read_starts,
)
from spd.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    EVALUATION_FILE,
    FIGURES,
    META_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULT_FILE,
    STARTS_PAGE,
    TARGET,
    check_record,
    has_finished,
    read_metrics,
    write_json,
)

TEMPLATE = "report.html.j2"
LOSS = "loss/"
"""The keys of the held-out losses begin so."""


class Verdict(NamedTuple):
    """What stands on top of the page."""

    kind: str
    """solved, unsolved, or open where there is no answer (yet)"""
    headline: str
    detail: str
    reason: str = ""
    """why the run failed"""


def write_report(
    run_dir: Path,
    metrics: Mapping[str, MetricSpec] | None = None,
    *,
    from_files: bool = False,
) -> Path:
    """Write `report.html` into a run directory, whole or not at all, and return its path.

    Pieces that are missing are left out: a run may be interrupted, without figures or a solution. The
    run's `metrics` say what its figures are where there is no result.json yet. The page says so if it is
    made `from_files` alone, because the run's code may not be imported.
    """
    contents = {**report_contents(run_dir, metrics), "from_files": from_files}
    return render_page(run_dir / REPORT_FILE, TEMPLATE, contents)


def report_contents(
    run_dir: Path, metrics: Mapping[str, MetricSpec] | None = None
) -> dict[str, Any]:
    """Everything that the template shows."""
    config_text = text_of(run_dir / CONFIG_FILE)
    config = configuration_in(run_dir / CONFIG_FILE)
    meta = object_of(run_dir / META_FILE)
    check_record(meta, run_dir / META_FILE)
    logged = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    stopped = evaluation_in(run_dir / EVALUATION_FILE) if meta.get("status") != "finished" else {}
    history = _until_checkpoint(logged, stopped)
    result = _evaluation(run_dir, history, metrics or {})
    experiment = str(config.get("experiment", run_dir.parent.name))
    last_step, logged_step = _last_step(history), _last_step(logged)
    shown_step = _shown_step(run_dir, meta, last_step)
    known, starts = EXPERIMENTS.get(experiment), read_starts(run_dir)
    return {
        "experiment": experiment,
        "run_name": run_dir.name,
        "seed": config.get("seed", "?"),
        "steps": config.get("steps", "?"),
        "verdict": verdict(
            meta.get("status", "unknown"),
            result,
            last_step,
            config.get("steps"),
            logged=logged_step if stopped else None,
            reason=str(meta.get("reason") or ""),
        ),
        "cut_short": cut_short(experiment, config.get("steps")),
        "expected": known.expected if known and not config.get("null") else None,
        "merits": merits(result, config.get("sites", {})),
        "any_published": any(row.published is not None for row in result.rows),
        "site_table": site_table(result, config.get("sites", {})),
        "loss_rows": _loss_rows(result, config.get("losses", {})),
        "evaluated": bool(result.rows),
        "figures": images(
            run_dir / FIGURES,
            list(config.get("figures") or {}),
            at=last_step if stopped else None,
        ),
        **_curves(run_dir, history, last_step),
        **_ladder(run_dir, result, history, shown_step),
        "analyses": analyses_of(run_dir, shown_step),
        "target": target_record(run_dir / TARGET / "training.json"),
        "target_config": text_of(run_dir / TARGET / CONFIG_FILE),
        "config_text": config_text,
        "provenance": provenance_of(meta, run_dir),
        "tracker": web_link(meta.get("tracker")),
        "dirty": bool(meta.get("dirty")),
        "imported": (meta.get("imported") or {}).get("from"),
        "commands": commands_of(meta, run_dir, outside=bool(config.get("module"))),
        "finished": meta.get("status") == "finished",
        "siblings": siblings_of(meta, run_dir),
        "is_null": bool(config.get("null")),
        "null": null_of(config, run_dir, result),
        "choice": "" if starts is None else choice_of(starts.starts),
        "starts_page": STARTS_PAGE,
    }


def verdict(
    status: str,
    result: Evaluation,
    step: int,
    steps: int | None,
    *,
    logged: int | None = None,
    reason: str = "",
) -> Verdict:
    """The first thing a reader wants to know.

    A run that has not finished is shown as it was at `step`, which is that of a checkpoint if it is known
    to which step the run has `logged`.
    """
    found = result.conclusion
    if status != "finished":
        words = {"interrupted": "Interrupted", "failed": "Failed", "running": "Not finished"}
        so_far = (
            f"At the last evaluation: {found.headline}."
            if found
            else "No known solution to compare with."
        )
        of_all = f" of {steps:,}" if isinstance(steps, int) else ""
        headline = f"{words.get(status, 'Not finished')} at step {step:,}{of_all}"
        shown = "What follows is the state until then."
        if logged is not None:
            beyond = f" The run had come to step {logged:,}." if logged > step else ""
            shown = f"All of this page shows the checkpoint of step {step:,}.{beyond}"
        reason = reason if status == "failed" else ""
        return Verdict("open", headline, f"{shown} {so_far}", reason)
    unknown = (
        "What the decomposition should look like is not known for this target: the figures of this page are"
        " all there is to judge it by."
    )
    if found is None:
        return Verdict("open", "No known solution", unknown)
    kind = {True: "solved", False: "unsolved", None: "open"}[result.solved]
    sentences = [f"{_capital(found.detail)}."] if found.detail else []
    detail = " ".join(sentences + [unknown] * (kind == "open"))
    return Verdict(kind, _capital(found.headline), detail)


def _until_checkpoint(
    logged: list[dict[str, float]], stopped: Mapping[str, float]
) -> list[dict[str, float]]:
    """The lines before a checkpoint and its evaluation; all, if none is shown."""
    if not stopped:
        return logged
    return [*(line for line in logged if line["step"] < stopped["step"]), dict(stopped)]


def _last_step(history: Sequence[Mapping[str, float]]) -> int:
    return int(max((line["step"] for line in history), default=0))


def _shown_step(run_dir: Path, meta: Mapping[str, Any], last_step: int) -> int | None:
    """The step whose state the page shows; None where it is not known."""
    newest = checkpoint.latest(run_dir / CHECKPOINTS)
    if meta.get("status") == "finished" and newest is not None:
        return int(newest.name)
    return last_step or None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _evaluation(
    run_dir: Path, history: Sequence[Mapping[str, float]], metrics: Mapping[str, MetricSpec]
) -> Evaluation:
    """The result, or how the run stands so far."""
    path = run_dir / RESULT_FILE
    return read_result(path) if path.is_file() else evaluation_of(last_evaluation(history), metrics)


# --- tables --------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A figure of merit as text."""

    metric: str
    own: str
    published: str


class Table(NamedTuple):
    """A table with what its words mean."""

    heads: list[str]
    lines: list[list[str]]
    meanings: dict[str, str]
    """label → what it is"""


class Merits(NamedTuple):
    """The figures of the whole decomposition."""

    lines: list[Line]
    meanings: dict[str, str]


def merits(result: Evaluation, sites: Mapping[str, int]) -> Merits:
    """Every figure but those of each matrix, the losses and the ladder."""
    rows = [
        row
        for row in result.rows
        if not (_of_each_site(row, result, sites) or _loss(row) or is_of_ladder(row.key))
    ]
    lines = [Line(row.metric, result.own(row), result.published(row)) for row in rows]
    return Merits(lines, _meanings(result, rows))


def site_table(result: Evaluation, sites: Mapping[str, int]) -> Table:
    """One line for each decomposed matrix, with C and all figures of their own."""
    rows = [row for row in result.rows if _of_each_site(row, result, sites)]
    paths = list(dict.fromkeys(row.key.partition("/")[2] for row in rows))
    names = list(dict.fromkeys(row.key.partition("/")[0] for row in rows))
    cells = {row.key: result.own(row) for row in rows}
    lines = [
        [path, str(_C_of(path, sites)), *(cells.get(f"{name}/{path}", "–") for name in names)]
        for path in paths
    ]
    heads = ["matrix", "C", *(result.quantity(name).label for name in names)]
    return Table(heads, lines, _meanings(result, rows))


def _of_each_site(row: ResultRow, result: Evaluation, sites: Mapping[str, int]) -> bool:
    plain = row.published is None and row.spread is None and not result.quantity(row.key).headline
    return plain and _C_of(row.key.partition("/")[2], sites) is not None


def _C_of(path: str, sites: Mapping[str, int]) -> int | None:
    return next((C for pattern, C in sites.items() if fnmatch.fnmatchcase(path, pattern)), None)


def _meanings(result: Evaluation, rows: Sequence[ResultRow]) -> dict[str, str]:
    quantities = [result.quantity(row.key) for row in rows]
    return {q.label: q.meaning for q in quantities if q.meaning}


def _loss(row: ResultRow) -> bool:
    return row.key.startswith(LOSS)


def _loss_rows(result: Evaluation, losses: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each term with its coefficient, the weighted sum last."""
    terms = {row.key.removeprefix(LOSS): result.own(row) for row in result.rows if _loss(row)}
    ordered = [name for name in terms if name != "total"] + ["total"] * ("total" in terms)
    return [
        {
            "name": "weighted sum" if name == "total" else name.replace("_", " "),
            "coeff": "" if name == "total" else _coefficient(losses.get(name, {})),
            "value": terms[name],
        }
        for name in ordered
    ]


def _coefficient(loss: Mapping[str, Any]) -> str:
    coeff = loss.get("coeff", "–")
    return f"{coeff['peak']}, scheduled" if isinstance(coeff, Mapping) else f"{coeff}"


# --- figures -------------------------------------------------------------------------------------


def _curves(
    run_dir: Path, history: Sequence[Mapping[str, float]], last_step: int
) -> dict[str, Any]:
    """The curves, as drawn and for the page's script; nothing where less than two steps were logged."""
    if len({line["step"] for line in history}) < 2:
        return {"curves": None}
    figure = loss_curves(history)
    live = live_curves(figure)
    png = run_dir / FIGURES / CURVES / f"{last_step:08d}.png"
    if not png.is_file():
        return {"curves": drawn(CURVES, figure, png.with_suffix(".csv"), run_dir), "live": live}
    kept = image(CURVES, png.read_bytes())
    return {"curves": kept._replace(numbers=numbers_of(png, run_dir / FIGURES)), "live": live}


def _ladder(
    run_dir: Path, result: Evaluation, history: Sequence[Mapping[str, float]], step: int | None
) -> dict[str, Any]:
    """What masks cost, as a table and drawn; nothing where it was not looked at."""
    found = ladder_of({row.key: row.value for row in result.rows}, history, run_dir, step)
    table = run_dir / FIGURES / LADDER / f"{step or 0:08d}.csv"
    figure = None if found is None else drawn(LADDER, found.figure, table, run_dir)
    return {"ladder": found, "ladder_figure": figure}


@runtime_checkable
class OwnReport(Protocol):
    """A problem that writes `report.html` itself, by looking into the decomposed model."""

    def write_report(
        self, run_dir: Path, prepared: Prepared, n_batches: int | None = None
    ) -> Path: ...


def look_at_checkpoint(
    run_dir: Path, prepared: Prepared, step: int, figures: Mapping[str, Drawable]
) -> None:
    """Evaluate a run at the checkpoint of `step`, which is loaded, and draw its figures.

    The page of a run that has not finished shows that state and no other.
    """
    if has_finished(run_dir):
        return
    state = checkpoint.load_state(run_dir / CHECKPOINTS / f"{step:08d}")["carried"]
    device = prepared.eval_batches[0].device
    carried = {key: value.to(device) for key, value in state.items()}
    progress = progress_at(step, prepared.config.steps)
    values = evaluate(prepared, carried, at_end=False, progress=progress)
    write_json(run_dir / EVALUATION_FILE, {"step": step, **values})
    curves = loss_curves(_until_checkpoint(read_metrics(run_dir), {"step": step, **values}))
    save_figures(run_dir / FIGURES, step, {**draw(prepared, figures), CURVES: curves})


def report_on(run_dir: Path, prepared: Prepared, n_batches: int | None = None) -> Path:
    """Write `report.html` into a run directory; `n_batches` of held-out data, where it is made of any."""
    if isinstance(prepared.problem, OwnReport):
        return prepared.problem.write_report(run_dir, prepared, n_batches)
    if n_batches is not None:
        raise UserError(
            f"--batches: the report of {run_dir} is made of the run's files; it looks at no data"
        )
    return write_report(run_dir, prepared.config.metrics)
