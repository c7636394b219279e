"""python -m spd.analysis.importances RUN_DIR [--batches 32]: what every subcomponent does on data.

One pass over held-out data gathers activations ‖U_c‖ h_c, importances g_c, the contexts in which each
subcomponent is on (the highest, and a uniform sample, which gives the lower quantiles), tokens or inputs,
and which are on together. Its memory does not depend on the amount of data. A pass that was killed goes
on from its last save, and leaves the bytes of one that was not; the other analyses use what it leaves.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spd.analysis.harvest import Gathered, Harvest
from spd.analysis.memberships import N_POSITIONS
from spd.analysis.observation import observe, parts_of
from spd.config import UserError
from spd.engine import checkpoint
from spd.metrics import ALIVE_THRESHOLD
from spd.problem import Batch
from spd.run_files import (
    CHECKPOINTS,
    forbidden,
    read_json,
    read_meta,
    sha256_of,
    write_json,
    write_safetensors,
)
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.run import Run, load_run

logger = logging.getLogger(__name__)

FOLDER = "analysis/importances"
FILE, RECORD, PARTIAL = "importances.safetensors", "importances.json", "partial.safetensors"
N_BATCHES, SAVE_EVERY = 32, 16
COMMAND = "python -m spd.analysis.importances"


class Options(NamedTuple):
    """What decides the numbers of a pass."""

    batches: int = N_BATCHES
    """of held-out data, those of the evaluation first"""
    positions: int = N_POSITIONS
    """at most, of which it is kept which subcomponents are on"""
    seed: int = 0
    """of the samples of contexts and positions"""


USUAL = Options()


def importances(
    run: Run, options: Options = USUAL, *, save_every: int = SAVE_EVERY, anew: bool = False
) -> Gathered:
    """What a pass over held-out data gathers, kept in the run; that of an equal earlier one is read.

    `UserError` if no site is applied at every position. `anew`: not even an equal one is read.
    """
    folder = run.directory / FOLDER
    about = _about(run.directory, run.step, options)
    with FileLock(_made(folder) / ".lock"):
        if not anew and (folder / RECORD).is_file():
            if read_json(folder / RECORD).get("about") == about:
                return load_importances(run.directory)
            logger.info("importances: those of another checkpoint or other options are replaced")
        harvest, n_batches = _pass(run, folder, about, options, save_every, anew)
        return _finish(folder, about, harvest, n_batches)


def load_importances(run_dir: Path) -> Gathered:
    """What the last pass has left in a run; `UserError` if there is none, or it is damaged or outdated."""
    folder = run_dir / FOLDER
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: nothing there yet; {COMMAND} {run_dir} makes it")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("about"), dict):
        raise UserError(
            f"{folder / RECORD}: not the record of importances; {COMMAND} {run_dir} makes one"
        )
    newest = checkpoint.latest(run_dir / CHECKPOINTS)
    if newest is not None and int(newest.name) != record["about"].get("checkpoint"):
        raise UserError(
            f"{folder}: of the checkpoint of step {record['about'].get('checkpoint')}, and the run has come"
            f" to {int(newest.name)}; {COMMAND} {run_dir} makes it anew"
        )
    path = folder / FILE
    if not path.is_file() or sha256_of(path) != record.get("sha256"):
        raise UserError(
            f"{path}: is not what was written there; {COMMAND} {run_dir} --anew makes it"
        )
    tensors, seen = _read(path)
    return _harvest_of(seen, tensors).compute()


def found_or_made(run_dir: Path, *, trust: bool = False, verify: bool = True) -> Gathered:
    """The importances that the run has, or those of a pass with the usual options."""
    read_meta(run_dir)
    if (run_dir / FOLDER / RECORD).is_file():
        return load_importances(run_dir)
    logger.info("importances: none yet; a pass over %d held-out batches gathers them", N_BATCHES)
    return importances(load_run(run_dir, trust=trust, verify=verify))


def _about(run_dir: Path, step: int, options: Options) -> dict[str, Any]:
    run_id = read_meta(run_dir).get("run_id")
    return {"run": run_id, "checkpoint": step, **options._asdict()}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pass(
    run: Run, folder: Path, about: dict[str, Any], options: Options, save_every: int, anew: bool
) -> tuple[Harvest, int]:
    """From the last save of an equal pass, if there is one."""
    harvest, n_done = None, 0
    if (folder / PARTIAL).is_file() and not anew:
        tensors, seen = _read(folder / PARTIAL)
        if seen.get("about") == about:
            harvest, n_done = _harvest_of(seen, tensors), seen["n_batches"]
            logger.info("importances: goes on after %d of %d batches", n_done, options.batches)
    C = sum(site.C for site in run.model.sites.values())
    for number, batch in enumerate(_held_out(run, options.batches), start=1):
        if number <= n_done:
            continue
        for part in parts_of(batch, C):
            seen = observe(run.model, run.problem, part)
            if harvest is None:
                if not seen.upper:
                    raise UserError(f"{run.directory}: no site is applied at every position")
                C_of = {path: g.shape[-1] for path, g in seen.upper.items()}
                width = seen.contents.shape[-1] if seen.kind == "inputs" else 0
                limit = options.positions
                harvest = Harvest(C_of, seen.kind, width, seed=options.seed, n_positions=limit)
            harvest.update(seen)
        n_done = number
        if number % save_every == 0 and number < options.batches:
            assert harvest is not None, "a batch was seen"
            _write(folder / PARTIAL, harvest, {"about": about, "n_batches": number})
            logger.info("importances: %d of %d batches", number, options.batches)
    if harvest is None or harvest.statistics.n_positions == 0:
        raise UserError(f"{run.directory}: its held-out data hold no position that counts")
    return harvest, n_done


def _held_out(run: Run, n: int) -> Iterator[Batch]:
    return islice(chain(run.prepared.eval_batches, run.prepared.problem.eval_batches), n)


def _finish(folder: Path, about: dict[str, Any], harvest: Harvest, n_batches: int) -> Gathered:
    (folder / RECORD).unlink(missing_ok=True)  # never beside the file of another pass
    _write(folder / FILE, harvest, {"about": about, "n_batches": n_batches})
    found = harvest.compute()
    digest = sha256_of(folder / FILE)
    write_json(folder / RECORD, {"about": about, "sha256": digest, **summary(found, n_batches)})
    (folder / PARTIAL).unlink(missing_ok=True)
    return found


def _write(path: Path, harvest: Harvest, seen: dict[str, Any]) -> None:
    """The whole state; what it is of is one entry, as the order of several would not be fixed."""
    width = harvest.inputs.shape[1]
    seen = {**seen, "sites": harvest.C_of, "kind": harvest.kind, "width": width}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in harvest.state().items()}
    write_safetensors(path, tensors, {"seen": json.dumps(seen, sort_keys=True)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            seen = json.loads((file.metadata() or {})["seen"])
            return {name: file.get_tensor(name) for name in file.keys()}, seen  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        found = forbidden(path, error) or UserError(
            f"{path}: cannot be read ({error}); {COMMAND} with --anew makes it"
        )
        raise found from None


def _harvest_of(seen: dict[str, Any], tensors: dict[str, Tensor]) -> Harvest:
    about = seen["about"]
    harvest = Harvest(
        seen["sites"],
        seen["kind"],
        seen["width"],
        seed=about["seed"],
        n_positions=about["positions"],
    )
    harvest.load_state(tensors)
    return harvest


# --- what is said of it --------------------------------------------------------------------------


def summary(found: Gathered, n_batches: int) -> dict[str, Any]:
    """What the report shows: of each site, and of the pass."""
    statistics, start, sites = found.statistics, 0, {}
    for path, C in found.C_of.items():
        own = slice(start, start + C)
        n_active, mean = statistics.n_active[own], statistics.mean[own]
        sites[path] = {
            "C": C,
            "alive": int((n_active > 0).sum()),
            "l0": n_active.sum().item() / statistics.n_positions,
            "mean_g": mean.sum().item(),
        }
        start += C
    kept = found.memberships
    return {
        "n_batches": n_batches,
        "n_positions": statistics.n_positions,
        "kind": found.kind,
        "threshold": ALIVE_THRESHOLD,
        "n_kept_positions": kept.n_positions,
        "sites": sites,
    }


def rows(found: Gathered) -> list[dict[str, Any]]:
    """One object for each subcomponent, for a table: `pandas.DataFrame(rows(found))`."""
    statistics = found.statistics
    density = statistics.n_active / statistics.n_positions
    names = [(path, c) for path, C in found.C_of.items() for c in range(C)]
    return [
        {
            "site": path,
            "c": c,
            "mean_g": statistics.mean[place].item(),
            "highest_g": statistics.highest[place].item(),
            "density": density[place].item(),
            "positive": statistics.positive[place].item(),
            "rms_activation": found.rms[place].item(),
        }
        for place, (path, c) in enumerate(names)
    ]


def lines(told: dict[str, Any]) -> list[str]:
    """A table of the sites."""
    width = max(len("site"), *map(len, told["sites"]))
    head = f"{'site':{width}}  {'C':>6}  {'alive':>6}  {'L0':>8}  {'mean of Σ g':>11}"
    return [
        head,
        *(
            f"{path:{width}}  {own['C']:>6}  {own['alive']:>6}  {own['l0']:>8.4g}  {own['mean_g']:>11.4g}"
            for path, own in told["sites"].items()
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """What every subcomponent of a run does on held-out data: importances, contexts, co-activation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    for name, default in Options()._asdict().items():
        help_ = {
            "batches": "of held-out data, or what there is",
            "positions": "at most, of which memberships are kept",
            "seed": "of the samples",
        }[name]
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help_} (default {default})"
        )
    parser.add_argument("--anew", action="store_true", help="even if there is an equal pass")
    add_ways_in(parser)
    args = parser.parse_args(argv)
    for name in ("batches", "positions"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is needed")
    options = Options(args.batches, args.positions, args.seed)
    with console_log(), user_errors():
        run = load_run(args.run_dir, trust=args.trust, verify=not args.unverified)
        importances(run, options, anew=args.anew)
        told = read_json(args.run_dir / FOLDER / RECORD)
    print(*lines(told), sep="\n")
    print(
        f"on {told['n_positions']:,} positions of {told['n_batches']} held-out batches; a subcomponent is"
        f" on where g > {ALIVE_THRESHOLD}, L0 is how many are on at a time; in {args.run_dir / FOLDER}"
    )


if __name__ == "__main__":
    main()
