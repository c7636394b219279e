"""python -m spd.analysis.adversary RUN_DIR [--steps 320] [--restarts 3]: how wrong masks can make a run.

A decomposition says that whatever it calls unimportant can be ablated, in any combination. A ladder of
errors D on held-out data tells how far that holds: from no mask over random ones and the importances
themselves to masks that an adversary has searched for, and everything ablated. Each adversary stands with
its number of steps: more steps are a stronger adversary, not another quantity.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spd.adversary import Attack, Found, Scope, attack
from spd.engine.prepare import Prepared
from spd.losses import recon_errors
from spd.masks import stochastic_mask
from spd.noise import seeded, uniform
from spd.run_files import write_json
from spd.runs.console import console_log, user_errors
from spd.runs.run import load_run

ANALYSIS = "analysis/adversary/ladder.json"
SHOWN = (1, 5, 20, 80)
"""steps at which the search is shown on its way"""
N_ROWS, N_SEQUENCES = 1024, 8
SCOPES: dict[Scope, str] = {
    "batch": "one source for the whole batch",
    "row": "one source for each row or position",
}


class Ladder(NamedTuple):
    """Mean D under each kind of masks, on the same rows."""

    rungs: dict[str, float]
    """unmasked, stochastic, importances, rounded, ablated"""
    attacks: dict[Scope, Found]
    attack: Attack
    n_rows: int


def ladder(prepared: Prepared, how: Attack, n_rows: int | None = None) -> Ladder:
    """Everything that is shown, on the first held-out rows."""
    model, kind = prepared.objective.model, prepared.problem.recon
    batch = prepared.eval_batches[0]
    if n_rows is None:
        n_rows = N_ROWS if batch.is_floating_point() else N_SEQUENCES
    batch = batch[:n_rows]
    output, site_inputs = model.target_forward(batch)
    with torch.no_grad():
        g = {p: own.clamp(0, 1) for p, own in model.causal_importances(site_inputs).lower.items()}

    def errors(masks: Mapping[str, Tensor]) -> Tensor:
        return recon_errors(model(batch, masks), output, kind)

    def drawn(path: str) -> Tensor:
        return uniform(g[path].shape, seeded(batch.device, "ladder", how.seed, path))

    kinds = {
        "unmasked": {path: torch.ones_like(own) for path, own in g.items()},
        "stochastic": {path: stochastic_mask(own, drawn(path)) for path, own in g.items()},
        "importances": g,
        "rounded at 0.5": {path: (own > 0.5).float() for path, own in g.items()},
        "ablated": {path: torch.zeros_like(own) for path, own in g.items()},
    }
    with torch.no_grad():
        rungs = {name: errors(masks).mean().item() for name, masks in kinds.items()}
    attacks: dict[Scope, Found] = {
        scope: attack(errors, g, how._replace(scope=scope)) for scope in SCOPES
    }
    return Ladder(rungs, attacks, how, output[..., 0].numel())


def lines(found: Ladder) -> list[str]:
    """One for each rung, in shares of what ablating everything costs, too."""
    whole = found.rungs["ablated"]
    rows = [(name, value) for name, value in found.rungs.items() if name != "ablated"]
    for scope, words in SCOPES.items():
        curve = found.attacks[scope].by_step
        shown = sorted({*(n for n in SHOWN if n < len(curve)), len(curve) - 1})
        rows += [(f"adversary, {words}, {n} steps", curve[n]) for n in shown]
    rows.append(("ablated", whole))
    width = max(len(name) for name, _ in rows)
    share = [f"{value / whole:.3f}" if whole else "-" for _, value in rows]
    return [
        f"{'masks':{width}}  {'D':>10}  of ablated",
        *(
            f"{name:{width}}  {value:>10.3e}  {part:>10}"
            for (name, value), part in zip(rows, share, strict=True)
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """How wrong masks between g and 1 can make a finished run, beside other masks; held-out data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--steps", type=int, default=320, metavar="N", help="of 0.1 (default 320)")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="(default 3)")
    args = parser.parse_args(argv)
    for name in ("steps", "restarts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is needed")
    with console_log(), user_errors():
        run = load_run(args.run_dir)
        found = ladder(run.prepared, Attack("batch", args.steps, args.restarts))
        path = args.run_dir / ANALYSIS
        path.parent.mkdir(parents=True, exist_ok=True)
        curves = {scope: own.by_step for scope, own in found.attacks.items()}
        numbers = {"rungs": found.rungs, "adversary": curves, "n_rows": found.n_rows}
        write_json(path, {"checkpoint": run.step, **found.attack._asdict(), **numbers})
    print(*lines(found), sep="\n")
    print(
        f"on {found.n_rows:,} held-out rows, the worst of {args.restarts} starts, the largest error until"
        f" each step; in {path}"
    )


if __name__ == "__main__":
    main()
