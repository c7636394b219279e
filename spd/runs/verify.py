"""Whether a run is what it was when it was written: digests of its files, and its configuration.

meta.json keeps the configuration and the digests of what does not change any more; a checkpoint those of
its own files, and of what metrics.jsonl held when it was written.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
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
    TARGET,
    read_json,
    read_meta,
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


def check_run(
    run: Path, *, verify: bool = True, own_target: bool = True, finished: bool = True
) -> None:
    """`UserError` if a file of a run is not as the run left it; one line in the log if not `verify`.

    Looks at configuration, target, metrics and result, and at the newest checkpoint. `own_target`: whether
    the run's own is used. `finished`: a run that has ended is not gone on with, and all of it counts.
    """
    found = list(_changes(run, own_target=own_target, finished=finished))
    if found and not verify:
        logger.warning("%s: not as the run left it, and used as it is: %s", run, "; ".join(found))
    elif found:
        advice = f"; {ADVICE}" if finished else ""
        raise UserError("\n  ".join(found) + advice)


def _changes(run: Path, *, own_target: bool, finished: bool) -> Iterator[str]:
    meta = read_meta(run)
    yield from _config_changes(run, meta)
    if own_target:
        yield from _target_changes(run, meta)
    newest = checkpoint.latest(run / CHECKPOINTS)
    complete = finished and meta.get("status") == "finished"
    for name, digest in meta.get("digests", {}).items() if complete else ():
        if name in FINAL and (changed := _changed(run / name, digest)):
            yield f"{changed}; checkpoints, configuration and target are not concerned"
    if newest is None:
        return
    damage = checkpoint.check_digests(newest, meta.get("run_id"), needed=bool(meta.get("format")))
    if damage is not None:
        yield damage
    elif not complete:
        yield from _metrics_changes(run, newest)


def _config_changes(run: Path, meta: Mapping[str, Any]) -> Iterator[str]:
    if "config" not in meta:
        return
    changed = value_differences(meta["config"], read_yaml(run / CONFIG_FILE))
    lines = [f"{key} is {now!r}, and was {was!r}" for key, was, now in changed]
    if lines:
        yield (
            f"{run / CONFIG_FILE}: was changed since the run was made ({META_FILE} has what it was): "
            + "; ".join(lines)
        )


def _target_changes(run: Path, meta: Mapping[str, Any]) -> Iterator[str]:
    if "digests" not in meta:
        return
    recorded = {n: d for n, d in meta["digests"].items() if n.startswith(f"{TARGET}/")}
    for name, digest in recorded.items():
        if changed := _changed(run / name, digest):
            yield f"{changed}; the checkpoints are not concerned: a whole copy of the target can be given"
    for path in sorted((run / TARGET).rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and _counts(path) and name not in recorded:
            yield f"{path}: is no file of the run's target"


def _metrics_changes(run: Path, newest: Path) -> Iterator[str]:
    """Against what the checkpoint says metrics.jsonl began with: what came later is written again."""
    path, record = run / METRICS_FILE, newest / DIGESTS_FILE
    if not record.is_file():
        return
    position = read_json(record).get(METRICS_FILE)
    if position is None:
        return
    length = position["bytes"]
    there = path.read_bytes()[:length] if path.is_file() else b""
    place = f"when the checkpoint of step {int(newest.name)} was written"
    works = checkpoint.what_works(newest)
    if not path.is_file():
        yield f"{path}: is missing; it held {length} bytes {place}{works}"
    elif len(there) < length:
        yield f"{path}: was cut short; it has {len(there)} of the {length} bytes {place}{works}"
    elif hashlib.sha256(there).hexdigest() != position["sha256"]:
        yield f"{path}: is not what the run wrote; it differs from what it was {place}{works}"


def _changed(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return f"{path}: is missing"
    if sha256_of(path) != digest:
        return f"{path}: is not what the run wrote there (its SHA-256 differs from that in {META_FILE})"
    return None


def _counts(path: Path) -> bool:
    """Whether it is a file of the run's, and none that a system or an editor leaves anywhere."""
    return not path.name.startswith(".")
