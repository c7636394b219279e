"""Whether a run is what it was when it was written: digests of its files, and its configuration.

meta.json keeps the configuration and the digests of what does not change any more; a checkpoint those of
its own files, and of what metrics.jsonl held when it was written.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

from spd.config import UserError, read_yaml, value_differences
from spd.engine import checkpoint
from spd.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    DIGESTS_FILE,
    META_FILE,
    METRICS_FILE,
    RESULT_FILE,
    STARTS,
    TARGET,
    read_json,
    read_meta,
    read_metrics,
    sha256_of,
)

logger = logging.getLogger(__name__)

FINAL = (METRICS_FILE, RESULT_FILE)
"""what meta.json has digests of once a run has finished"""
ADVICE = "--unverified (in Python verify=False) goes on with it as it is"


def target_digests(run: Path) -> dict[str, str]:
    """Of every file of the target, from the folder of the run."""
    files = sorted(path for path in (run / TARGET).rglob("*") if path.is_file())
    return {path.relative_to(run).as_posix(): sha256_of(path) for path in files if _counts(path)}


def final_digests(run: Path) -> dict[str, str]:
    """Of what does not change any more once a run has finished."""
    return {name: sha256_of(run / name) for name in FINAL}


def without_final(meta: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a run that is about to go on."""
    return {name: digest for name, digest in meta.get("digests", {}).items() if name not in FINAL}


class Part(Enum):
    """What is compared at a time."""

    FILES = auto()
    """configuration, target, metrics and result: before anything is made of them"""
    CHECKPOINT = auto()
    """the newest one, once it could be read"""
    ALL = auto()


def check_run(
    run: Path,
    part: Part = Part.ALL,
    *,
    verify: bool = True,
    own_target: bool = True,
    goes_on: bool = False,
) -> None:
    """`UserError` if a file of a run is not as the run left it; one line in the log if not `verify`.

    own_target: whether the run's own target is used. goes_on: what a run that goes on writes again, it may
    have lost.
    """
    if part is not Part.CHECKPOINT and (run / METRICS_FILE).is_file():
        read_metrics(run)  # what cannot be read is said line by line
    found = list(_changes(run, part, own_target=own_target, goes_on=goes_on))
    if found and not verify:
        logger.warning("%s: not as the run left it, and used as it is: %s", run, "; ".join(found))
    elif found:
        raise UserError("\n  ".join(found) + ("" if goes_on else f"; {ADVICE}"))


def _changes(run: Path, part: Part, *, own_target: bool, goes_on: bool) -> Iterator[str]:
    meta = read_meta(run)
    newest = checkpoint.latest(run / CHECKPOINTS)
    if part is not Part.CHECKPOINT:
        yield from _config_changes(run, meta)
        if own_target and meta.get("format"):
            yield from _target_changes(run, meta["digests"])
        if meta.get("status") == "finished" and not goes_on:
            yield from _final_changes(run, meta.get("digests", {}))
        elif newest is not None:
            yield from _metrics_changes(run, newest, meta.get("run_id"))
    if part is not Part.FILES and newest is not None:
        needed = bool(meta.get("format"))
        damage = checkpoint.check_digests(newest, meta.get("run_id"), needed=needed)
        if damage is not None:
            yield damage
    if part is not Part.FILES and newest is None:
        yield from _starts_changes(run, meta.get("run_id"))


def _starts_changes(run: Path, run_id: str | None) -> Iterator[str]:
    """Of the starts of a run that none has been chosen of: what each goes on from."""
    for start in sorted((run / STARTS).glob("*")):
        newest = checkpoint.latest(start / CHECKPOINTS)
        if newest is not None:
            damage = checkpoint.check_digests(newest, run_id, needed=True)
            yield from _metrics_changes(start, newest, run_id) if damage is None else [damage]


def _config_changes(run: Path, meta: Mapping[str, Any]) -> Iterator[str]:
    if "config" not in meta:
        return
    now = json.loads(json.dumps(read_yaml(run / CONFIG_FILE), default=str))  # as meta.json has it
    changed = value_differences(meta["config"], now)
    lines = [f"{key} is {now!r}, and was {was!r}" for key, was, now in changed]
    if lines:
        yield (
            f"{run / CONFIG_FILE}: was changed since the run was made ({META_FILE} has what it was): "
            + "; ".join(lines)
        )


def _target_changes(run: Path, digests: Mapping[str, str]) -> Iterator[str]:
    recorded = {name: d for name, d in digests.items() if name.startswith(f"{TARGET}/")}
    for name, digest in recorded.items():
        if changed := _changed(run / name, digest):
            yield f"{changed}; the checkpoints are not concerned: load_run(…, target=…) takes a whole copy"
    for path in sorted((run / TARGET).rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and _counts(path) and name not in recorded:
            yield f"{path}: is no file of the run's target"


def _final_changes(run: Path, digests: Mapping[str, str]) -> Iterator[str]:
    for name in FINAL:
        changed = _changed(run / name, digests[name]) if name in digests else None
        if changed:
            yield f"{changed}; checkpoints, configuration and target are not concerned"


def _metrics_changes(run: Path, newest: Path, run_id: str | None) -> Iterator[str]:
    """Against what the checkpoint says metrics.jsonl began with: what came later is written again."""
    changed = _metrics_change(run, newest, run_id)
    if changed is None:
        return
    folders = [run / CHECKPOINTS / f"{step:08d}" for step in checkpoint.steps(newest.parent)]
    fitting = [f for f in folders if f < newest and not _metrics_change(run, f, run_id)]
    works = "; the checkpoints, configuration and target are not concerned"
    if fitting:
        later = " and ".join(folder.name for folder in folders if folder > fitting[-1])
        works = (
            f"; without {later} in {CHECKPOINTS}, moved elsewhere, the run goes on from the checkpoint of"
            f" step {int(fitting[-1].name)}, which it fits"
        )
    at = f"when the checkpoint of step {int(newest.name)} was written"
    yield f"{run / METRICS_FILE}: {changed} {at}{works}"


def _metrics_change(run: Path, folder: Path, run_id: str | None) -> str | None:
    """Nothing is said by a checkpoint of another run, which is a damage of its own."""
    path, record = run / METRICS_FILE, folder / DIGESTS_FILE
    known = read_json(record) if record.is_file() else {}
    position = known.get(METRICS_FILE) if isinstance(known, dict) else None
    if not isinstance(position, dict) or not isinstance(position.get("bytes"), int):
        return None
    if known.get("run") != run_id:
        return None
    length = position["bytes"]
    if not path.is_file():
        return f"is missing; it held {length} bytes"
    with path.open("rb") as file:
        there = file.read(length)
    if len(there) < length:
        return f"was cut short; it has {len(there)} of the {length} bytes that it had"
    if hashlib.sha256(there).hexdigest() != position.get("sha256"):
        return "is not what the run wrote; it differs from what it was"
    return None


def _changed(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return f"{path}: is missing"
    if sha256_of(path) != digest:
        return f"{path}: is not what the run wrote there (its SHA-256 differs from that in {META_FILE})"
    return None


def _counts(path: Path) -> bool:
    """Whether it is a file of the run's, and none that a system or an editor leaves anywhere."""
    return not path.name.startswith(".")
