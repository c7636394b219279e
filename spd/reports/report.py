"""report.html: a run directory as one self-contained page, whatever the directory holds so far.

Reads files alone. Imports no experiment and loads no model.
"""

import base64
import fnmatch
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jinja2
import yaml

from spd.config import UserError
from spd.engine.prepare import Prepared
from spd.registry import EXPERIMENTS
from spd.reports.drawing import FigureText, count
from spd.reports.figures import loss_curves, png_bytes, read_png
from spd.reports.results import format_value, recovered, result_of
from spd.run_files import (
    CONFIG_FILE,
    FIGURES,
    META_FILE,
    METRICS_FILE,
    RESULT_FILE,
    TARGET,
    TIMINGS_FILE,
    read_json,
    read_metrics,
)

HERE = Path(__file__).parent
TEMPLATE = "report.html.j2"
REPORT_FILE = "report.html"
CURVES = "loss_curves"


class Verdict(NamedTuple):
    """What stands on top of the page."""

    kind: str
    """solved, unsolved, or open where there is no answer (yet)"""
    headline: str
    detail: str


class Image(NamedTuple):
    """A figure, ready to be inlined."""

    name: str
    text: FigureText
    data: str
    """the PNG in base64"""
    width: int
    """on paper, in CSS pixels"""
    height: int


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, whole or not at all, and return its path.

    Pieces that are missing are left out: a run may be interrupted, without figures or a solution.
    """
    return write_page(run_dir, TEMPLATE, report_contents(run_dir))


def write_page(
    run_dir: Path, template: str, contents: Mapping[str, Any], *, folder: Path = HERE
) -> Path:
    """Write `report.html` from a template in `folder`, which may extend `TEMPLATE`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(contents)
    path = run_dir / REPORT_FILE
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def report_contents(run_dir: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    config_text = _text(run_dir / CONFIG_FILE)
    config = yaml.safe_load(config_text) or {}
    meta = _json(run_dir / META_FILE)
    history = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    result = _json(run_dir / RESULT_FILE) or _result_so_far(config, meta, history)
    experiment = str(config.get("experiment", run_dir.parent.name))
    rows = result.get("rows", [])
    last_step = int(max((line["step"] for line in history), default=0))
    known = EXPERIMENTS.get(experiment)
    return {
        "experiment": experiment,
        "run_name": run_dir.name,
        "seed": config.get("seed", "?"),
        "steps": config.get("steps", "?"),
        "verdict": verdict(meta.get("status", "unknown"), result, last_step, config.get("steps")),
        "expected": known.expected if known else None,
        "error_rows": _errors(rows),
        "merits": [_merit(row) for row in rows if _is_merit(row)],
        "any_column_match": any(row["key"].startswith(("mmcs", "ml2r")) for row in rows),
        "any_published": any(row["published"] is not None for row in rows),
        "site_rows": _site_rows(rows, config.get("sites", {})),
        "loss_rows": _loss_rows(rows, config.get("losses", {})),
        "evaluated": bool(rows),
        "figures": _images(run_dir / FIGURES, list(config.get("figures") or {})),
        "curves": _image(CURVES, png_bytes(loss_curves(history))) if history else None,
        "target": _target(run_dir / TARGET / "training.json"),
        "target_config": _text(run_dir / TARGET / CONFIG_FILE),
        "config_text": config_text,
        "provenance": _provenance(meta, run_dir),
        "tracker": _web_link(meta.get("tracker")),
        "dirty": bool(meta.get("dirty")),
        "commands": _commands(meta, run_dir),
        "finished": meta.get("status") == "finished",
    }


def verdict(status: str, result: Mapping[str, Any], step: int, steps: int | None) -> Verdict:
    """The first thing a reader wants to know."""
    n_errors = sum(int(row["value"]) for row in _errors(result.get("rows", [])))
    solved = result.get("solved")
    if status != "finished":
        words = {"interrupted": "Interrupted", "failed": "Failed", "running": "Not finished"}
        so_far = (
            "No known solution to compare with."
            if solved is None
            else f"At the last evaluation: {count(n_errors, 'error')}."
        )
        of_all = f" of {steps:,}" if isinstance(steps, int) else ""
        headline = f"{words.get(status, 'Not finished')} at step {step:,}{of_all}"
        return Verdict("open", headline, f"What follows is the state until then. {so_far}")
    if solved is None:
        detail = "What the decomposition should look like is not known for this target."
        if kept := recovered(result):
            return Verdict("open", kept[0], f"{kept[1].capitalize()}. {detail}")
        return Verdict("open", "No known solution", detail)
    if solved:
        detail = "Every decomposed matrix matches the known importance pattern, without an error."
        return Verdict("solved", "Solved", detail)
    detail = "The importances differ from the known pattern."
    return Verdict("unsolved", f"Not solved: {count(n_errors, 'error')}", detail)


def _result_so_far(
    config: Mapping[str, Any], meta: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    if not any(key.startswith("eval/") for line in history for key in line):
        return {}
    names = {key: config.get(key) for key in ("experiment", "seed", "steps")}
    return result_of(SimpleNamespace(**names), history, meta.get("seconds", 0.0))


# --- tables --------------------------------------------------------------------------------------


def _errors(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with the errors of each site."""
    return [r for r in rows if r["key"].startswith("errors/") and r["key"] != "errors/total"]


def _is_merit(row: Mapping[str, Any]) -> bool:
    return row["key"].split("/")[0] not in ("errors", "l0", "alive", "density", "loss")


def _merit(row: Mapping[str, Any]) -> dict[str, str]:
    published = format_value(row["published"], row["published_spread"])
    own = format_value(row["value"], row["spread"])
    return {"metric": row["metric"], "own": own, "published": published}


def _site_rows(rows: Sequence[Mapping[str, Any]], sites: Mapping[str, int]) -> list[dict[str, str]]:
    """One row per decomposed matrix: errors, L0, alive, C, density."""
    values = {row["key"]: format_value(row["value"], None) for row in rows}
    paths = [key.removeprefix("l0/") for key in values if key.startswith("l0/")]
    return [
        {
            "site": path,
            **{name: values.get(f"{name}/{path}", "–") for name in ("errors", "l0", "alive")},
            "C": str(next((C for p, C in sites.items() if fnmatch.fnmatchcase(path, p)), "–")),
            "density": values.get(f"density/{path}", "–"),
        }
        for path in paths
    ]


def _loss_rows(
    rows: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Each term with its coefficient, the weighted sum last."""
    terms = {r["key"][5:]: f"{r['value']:.3g}" for r in rows if r["key"].startswith("loss/")}
    ordered = [name for name in terms if name != "total"] + ["total"] * ("total" in terms)
    return [
        {
            "name": "weighted sum" if name == "total" else name.replace("_", " "),
            "coeff": "" if name == "total" else f"{losses.get(name, {}).get('coeff', '–')}",
            "value": terms[name],
        }
        for name in ordered
    ]


# --- figures -------------------------------------------------------------------------------------


def _images(directory: Path, configured: list[str]) -> list[Image]:
    """The newest drawing of each figure, in the configured order; the curves come apart."""
    newest: dict[str, Path] = {}
    for path in sorted(directory.rglob("*.png"), key=lambda path: path.name):
        newest[path.parent.relative_to(directory).as_posix()] = path
    newest.pop(CURVES, None)
    names = sorted(newest, key=lambda n: (configured.index(n) if n in configured else 10**6, n))
    return [_image(name, newest[name].read_bytes()) for name in names]


def _image(name: str, png: bytes) -> Image:
    title = name.replace("_", " ").replace("/", ": ")
    text, (width, height) = read_png(png)
    data = base64.b64encode(png).decode("ascii")
    return Image(name, text or FigureText(title, "", title), data, width, height)


# --- where it comes from -------------------------------------------------------------------------


def _target(record_file: Path) -> dict[str, Any]:
    """How the target was chosen; every seed with the least of its outputs at the probe."""
    record = _json(record_file)
    for row in record.get("seeds", []):
        outputs = row.get("outputs_at_probe", [])
        row["least"] = min(outputs) if outputs and None not in outputs else None
    return record


def _provenance(meta: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """Label → value, of what is known."""
    lines = _text(run_dir / TIMINGS_FILE).splitlines(keepends=True)
    timings = [json.loads(line) for line in lines if line.endswith("\n")]
    known = {
        "status": meta.get("status"),
        "started": meta.get("started"),
        "took": _duration(meta["seconds"]) if meta.get("seconds") else None,
        "speed": f"{timings[-1]['steps_per_second']:.1f} steps/s" if timings else None,
        "device": meta.get("device"),
        "host": meta.get("host"),
        "commit": meta.get("commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in (meta.get("versions") or {}).items()),
        "command": meta.get("command"),
    }
    return {label: str(value) for label, value in known.items() if value}


def _commands(meta: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """What to type, by what it does; empty where the run does not say which script made it."""
    module = (meta.get("entry") or {}).get("module")
    if not module:
        return {}
    script = shlex.quote(module)
    python = f"python {script}" if module.endswith(".py") else f"python -m {script}"
    place = shlex.quote(str(run_dir))
    commands = {}
    if meta.get("commit"):
        commands["The code as it was"] = f"git checkout {meta['commit']}"
    if meta.get("status") in ("interrupted", "running"):
        commands["Go on with this run"] = f"{python} --resume {place}"
    own = run_dir / TARGET
    target = f" target={shlex.quote(str(own))}" if own.is_dir() else ""
    commands["The same run again, in a new directory"] = f"{python} {place}/{CONFIG_FILE}{target}"
    commands["This page again"] = f"spd-report {place}"
    load = ["from spd.run import load_run", f"run = load_run({json.dumps(str(run_dir))})"]
    commands["The decomposition, in Python"] = "\n".join([*load, "print(run.model.sites)"])
    return commands


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _web_link(url: Any) -> str | None:
    return url if isinstance(url, str) and url.startswith("https://") else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


@runtime_checkable
class OwnReport(Protocol):
    """A problem that writes `report.html` itself, by looking into the decomposed model."""

    def write_report(
        self, run_dir: Path, prepared: Prepared, n_batches: int | None = None
    ) -> Path: ...


def report_on(run_dir: Path, prepared: Prepared, n_batches: int | None = None) -> Path:
    """Write `report.html` into a run directory; `n_batches` of held-out data, where it is made of any."""
    if isinstance(prepared.problem, OwnReport):
        return prepared.problem.write_report(run_dir, prepared, n_batches)
    if n_batches is not None:
        raise UserError(
            f"--batches: the report of {run_dir} is made of the run's files; it looks at no data"
        )
    return write_report(run_dir)
