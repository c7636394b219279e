"""Where a run comes from, for its page: its target, its code, the commands that it is used with."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from spd.config import UserError
from spd.reports.reading import object_of, paces_in
from spd.run_files import CONFIG_FILE, REPORT_FILE, TARGET, TIMINGS_FILE

SIDE_BY_SIDE = "side_by_side"
"""the key of meta.json for the page and the names of runs that were trained together"""


class _Seed(BaseModel):
    """One of the networks that were trained."""

    model_config = ConfigDict(strict=True)

    seed: int
    n_represented: int
    final_loss: float | None = None
    outputs_at_probe: list[float | None] = []


class _Training(BaseModel):
    """What a target's training.json holds, as far as the page shows it."""

    model_config = ConfigDict(extra="allow", strict=True)

    seeds: list[_Seed] | None = None
    chosen_seed: int | None = None
    n_features: int | None = None


def target_record(record_file: Path) -> dict[str, Any]:
    """How the target was chosen; every seed with the least of its outputs at the probe."""
    record = object_of(record_file)
    try:
        found = _Training.model_validate(record)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise UserError(
            f"{record_file}: not the record of a training: {place}: {wrong['msg']}"
        ) from None
    if found.seeds is None:
        return record
    rows = [own.model_dump() for own in found.seeds]
    for row in rows:
        outputs = row["outputs_at_probe"]
        row["least"] = min(outputs) if outputs and None not in outputs else None
    return {**record, "seeds": rows}


def provenance_of(meta: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """Label → value, of what is known."""
    paces = paces_in(run_dir / TIMINGS_FILE)
    known = {
        "status": meta.get("status"),
        "started": meta.get("started"),
        "took": _duration(meta["seconds"]) if meta.get("seconds") else None,
        "speed": f"{paces[-1]:.1f} steps/s" if paces else None,
        "device": meta.get("device"),
        "host": meta.get("host"),
        "commit": meta.get("commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in (meta.get("versions") or {}).items()),
        "command": meta.get("command"),
    }
    return {label: str(value) for label, value in known.items() if value}


def commands_of(meta: Mapping[str, Any], run_dir: Path, *, outside: bool) -> dict[str, str]:
    """What to type, by what it does; empty where the run does not say which script made it."""
    module = (meta.get("entry") or {}).get("module")
    if not isinstance(module, str) or not module:
        return {}
    script = shlex.quote(module)
    python = f"python {script}" if module.endswith(".py") else f"python -m {script}"
    python = "spd-run" if outside else python
    place = shlex.quote(str(run_dir))
    commands = {}
    if meta.get("commit"):
        commands["The code as it was"] = f"git checkout {shlex.quote(str(meta['commit']))}"
    if meta.get("status") in ("interrupted", "running"):
        trust = "" if module.startswith("spd.") else " --trust"
        commands["Go on with this run"] = f"spd-run --resume {place}{trust}"
    own = run_dir / TARGET
    target = f" target={shlex.quote(str(own))}" if own.is_dir() else ""
    commands["The same run again, in a new directory"] = f"{python} {place}/{CONFIG_FILE}{target}"
    commands["This page again"] = f"spd-report {place}"
    load = ["from spd.runs.run import load_run", f"run = load_run({json.dumps(str(run_dir))})"]
    commands["The decomposition, in Python"] = "\n".join([*load, "print(run.model.sites)"])
    return commands


def siblings_of(meta: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """Name → link of the page of all seeds and of the other runs of it, as far as these are there."""
    known = meta.get(SIDE_BY_SIDE) or {"runs": []}
    named = [*known["runs"], *([known["page"]] if "page" in known else [])]
    if any(Path(name).name != name for name in named):
        return {}  # a name alone is no way out of the folder
    others = [name for name in known["runs"] if name != run_dir.name]
    links = {n: f"../{n}/{REPORT_FILE}" for n in others if (run_dir.parent / n).is_dir()}
    page = known.get("page")
    if links and isinstance(page, str) and (run_dir.parent / page).is_file():
        links = {"all of them": f"../{page}", **links}
    return links


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


def web_link(url: Any) -> str | None:
    """The address, if it is one of the web."""
    return url if isinstance(url, str) and url.startswith("https://") else None
