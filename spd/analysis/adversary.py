"""python -m spd.analysis.adversary RUN_DIR [--steps 320] [--restarts 3]: how wrong masks can make a run.

A decomposition says that whatever it calls unimportant can be ablated, in any combination. A ladder of
errors D on held-out data tells how far that holds: from no mask over random ones and the importances
themselves to masks that an adversary has searched for, and everything ablated. Each adversary stands with
its number of steps: more steps are a stronger adversary, not another quantity.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from spd.adversary import STEP_SIZE
from spd.config import counted
from spd.engine.prepare import Prepared
from spd.masks import ROUNDING_THRESHOLD
from spd.metrics import SCOPES, SOURCES, Ladder, climb, some_rows
from spd.metrics.baselines import NAMES as BASELINES
from spd.metrics.baselines import against
from spd.metrics.ladder import Predicts
from spd.problem import of_ids
from spd.run_files import write_json
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.run import load_run

ANALYSIS = "analysis/adversary/ladder.json"
SHOWN = (1, 5, 20, 80)
"""steps at which the search is shown on its way"""
N_ROWS, N_SEQUENCES = 1024, 8
WORDS = {
    "importance_masked": "importances",
    "permuted": "importances of other rows",
    "rounded": f"rounded at {ROUNDING_THRESHOLD}",
}


def ladder(
    prepared: Prepared, *, n_steps: int, n_restarts: int, n_rows: int | None = None
) -> Ladder:
    """Every rung, on a seeded choice of the first held-out rows."""
    batch = prepared.eval_batches[0]
    if n_rows is None:
        n_rows = N_SEQUENCES if of_ids(batch) else N_ROWS
    steps = sorted({*(n for n in SHOWN if n < n_steps), n_steps})
    model, rows = prepared.objective.model, some_rows(batch, n_rows)
    beside = steps if isinstance(prepared.problem, Predicts) else ()
    return climb(
        *(model, prepared.problem, rows), steps=steps, n_restarts=n_restarts, baselines=beside
    )


def lines(found: Ladder) -> list[str]:
    """One for each rung, in shares of what ablating everything costs, too."""
    whole = found.rungs["ablated"]
    names = {name: described(name) for name in found.rungs}
    width = max(map(len, names.values()))
    head = f"{'masks':{width}}  {'D':>10}  of ablated"
    beside = {name: own for name, own in found.baselines.items() if own}
    heads = "".join(f"  {f'D of {BASELINES[name]}':>21}" for name in beside)
    return [
        head + ("  CE recovered" if found.recovered else "") + heads,
        *(
            f"{names[name]:{width}}  {value:>10.3e}  {f'{value / whole:.3f}' if whole else '-':>10}"
            + (f"  {_cell(found.recovered, name, '.3f'):>12}" if found.recovered else "")
            + "".join(f"  {_cell(own, name, '.3e'):>21}" for own in beside.values())
            for name, value in found.rungs.items()
        ),
    ]


def _cell(values: Mapping[str, float], name: str, form: str) -> str:
    return format(values[name], form) if name in values else "-"


def described(name: str) -> str:
    """What a rung is, in words."""
    for scope in SCOPES:
        if name.endswith(f"_{scope}"):
            n = name.split("_")[1]
            return f"adversary, {SOURCES[scope]}, {n} step{'' if n == '1' else 's'}"
    return WORDS.get(name, name)


MOST = {"steps": 100_000, "restarts": 1_000}
"""what may be asked for: more would not end"""


def main(argv: Sequence[str] | None = None) -> None:
    """How wrong masks between g and 1 can make a finished run, beside other masks; held-out data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--steps", type=int, default=320, metavar="N", help="of 0.1 (default 320)")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="(default 3)")
    add_ways_in(parser)
    args = parser.parse_args(argv)
    for name, most in MOST.items():
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} {getattr(args, name)}: from 1 to {most:,} are allowed")
    with console_log(), user_errors():
        run = load_run(args.run_dir, trust=args.trust, verify=not args.unverified)
        found = ladder(run.prepared, n_steps=args.steps, n_restarts=args.restarts)
        path = args.run_dir / ANALYSIS
        path.parent.mkdir(parents=True, exist_ok=True)
        curves = {scope: own.by_step for scope, own in found.attacks.items()}
        how = {"n_steps": args.steps, "n_restarts": args.restarts, "step_size": STEP_SIZE}
        numbers = {"rungs": found.rungs, "recovered": found.recovered, "adversary": curves}
        numbers["baselines"] = found.baselines
        on = {"l0": found.l0, "C": found.C, "n_rows": found.n_rows}
        write_json(path, {"checkpoint": run.step, **how, **numbers, **on})
    print(*lines(found), sep="\n")
    if compared := against(found.figures()):
        print(f"{compared}.")
    print(
        f"L0 {found.l0:.4g} of {found.C}; on {counted(found.n_rows, 'held-out row')}, the worst of"
        f" {counted(args.restarts, 'start')}, the largest error until each step; in {path}"
    )


if __name__ == "__main__":
    main()
