"""python -m spd.analysis.causes RUN_DIR: is this run solved, by what its subcomponents cause?

Prints five points site by site beside their thresholds, and ends with status 0 if all hold (solved), 1 if
one does not, 2 where nothing can be judged. Without a known solution the points on mechanisms and weights
are left out. Of a language model the figures are shown and the status is 0: the thresholds were set on
toy models of at most 40 features.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from spd.config import UserError, counted
from spd.metrics.causes import (
    ADVERSARIAL,
    FAITHFUL,
    IDLE,
    LOST,
    N_ROWS,
    N_SAMPLED,
    Causes,
    SiteCauses,
    causes_of,
)
from spd.metrics.ladder import Predicts
from spd.problem import of_ids
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.run import load_run

HEADS = ("site", "unfaithful", "effects", "weights", "lost", "idle", "never active", "measured")
N_SEQUENCES = 4
"""sequences of a language model that are looked at"""
N_SAMPLED_OF_TOKENS = 64


def table(causes: Causes) -> list[str]:
    """The figures of each site, and above them what is allowed."""
    allowed = ("at most", f"{FAITHFUL}", "0 errors", "0 wrong", f"{LOST}", f"{IDLE}", "", "")
    lines = [HEADS, allowed, *(_cells(path, own) for path, own in causes.sites.items())]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEADS))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _cells(path: str, own: SiteCauses) -> tuple[str, ...]:
    counts = ["-" if n is None else str(n) for n in (own.effect_errors, own.wrong_weights)]
    measured = f"{own.n_measured} of {own.C}"
    shares = [f"{value:.3f}" for value in (own.lost, own.idle, own.never_active)]
    return (path, f"{own.unfaithful:.3f}", *counts, *shares, measured)


def judged(directory: Path, *, trust: bool = False, verify: bool = True) -> tuple[Causes, bool]:
    """The figures of a finished run, and whether the thresholds mean anything for it."""
    run = load_run(directory, trust=trust, verify=verify)
    prepared = run.prepared
    batches = [batch for batch in prepared.eval_batches if isinstance(batch, Tensor)]
    if not batches:
        raise UserError(
            f"{directory}: its batches have names; only batches of one Tensor can be judged"
        )
    tokens = isinstance(prepared.problem, Predicts) or of_ids(batches[0])
    causes = causes_of(
        prepared.objective.model,
        prepared.problem,
        batches,
        n_rows=N_SEQUENCES if tokens else N_ROWS,
        n_sampled=N_SAMPLED_OF_TOKENS if tokens else N_SAMPLED,
    )
    if causes.n_rows == 0:
        raise UserError(
            f"{directory}: no row of the held-out data has an input; nothing to judge by"
        )
    return causes, not tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Five points by which a run is solved or not, site by site; status 0 (solved), 1 (not) or 2."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    add_ways_in(parser)
    args = parser.parse_args(argv)
    with console_log(), user_errors():
        causes, judges = judged(args.run_dir, trust=args.trust, verify=not args.unverified)
    print(*table(causes), sep="\n")
    how = causes.attack
    print(
        f"adversary, {counted(how.n_steps, 'step')} of {how.step_size}, the worst of"
        f" {counted(how.n_restarts, 'start')} for each row:"
        f" {causes.adversarial:.3f} of ablating everything (at most {ADVERSARIAL})"
    )
    print(f"on {counted(causes.n_rows, 'held-out row')} with input")
    if not judges:
        print("no verdict: the thresholds were set on toy models")
        raise SystemExit(0)
    failures = causes.failures()
    known = "" if causes.judged_by_solution else ", as far as it is known without a solution"
    print(f"solved{known}" if not failures else "not solved:", *failures, sep="\n  ")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
