"""python -m spd.analysis.agreement RUN RUN …: do runs on one target find the same subcomponents?

For every site, of the subcomponents that are ever on in one run: how well another run has them, by the
reading direction V_c, the writing direction U_c, the rank-one matrix of both, and by the causal importance
over the same inputs. Beside it, what chance gives. Little agreement alone condemns no run: there may be
several faithful decompositions.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd.component_model import Site
from spd.components import init_subcomponents_
from spd.config import UserError
from spd.metrics import ALIVE_THRESHOLD
from spd.noise import seeded
from spd.problem import Batch
from spd.run_files import write_json
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.run import Run, load_run
from spd.runs.target import digest

ANALYSIS = "analysis/agreement/agreement.json"
KINDS = ("V", "U", "rank one", "importance")
N_RESAMPLES = 1000
N_DRAWS = 20
"""of what chance gives"""
CPU = torch.device("cpu")


class Match(NamedTuple):
    """How well each of some subcomponents of one run is met by another run, `[alive]` each."""

    best: Float[Tensor, " alive"]
    """by the most similar one, which may serve several"""
    assigned: Float[Tensor, " alive"]
    """by its partner in the best one-to-one assignment; 0 for those that are left over"""


class Chance(NamedTuple):
    """Means of the same where nothing was learned, or nothing belongs together."""

    initial: tuple[float, float] | None
    """best and assigned, of as many subcomponents of two runs at their beginning"""
    permuted: tuple[float, float]
    """of subcomponents that permuted importances choose; for importances: over permuted inputs"""


class Agreement(NamedTuple):
    """Of one site, over all ordered pairs of runs."""

    alive: list[int]
    """subcomponents that are ever on, of each run"""
    matches: dict[str, list[Match]]
    """by kind, one for each pair"""
    chance: dict[str, Chance]


def cosines(a: Float[Tensor, "A d"], b: Float[Tensor, "B d"]) -> Float[Tensor, "A B"]:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT


def similarities(
    V: tuple[Float[Tensor, "d_in A"], Float[Tensor, "d_in B"]],
    U: tuple[Float[Tensor, "A d_out"], Float[Tensor, "B d_out"]],
) -> dict[str, Float[Tensor, "A B"]]:
    """The absolute cosines of directions, whose sign means nothing, and the cosine of V_c U_c."""
    reading, writing = cosines(V[0].mT, V[1].mT), cosines(*U)
    return {"V": reading.abs(), "U": writing.abs(), "rank one": reading * writing}


def match(similarity: Float[Tensor, "A B"]) -> Match:
    """0 everywhere if the other run has nothing."""
    best = assigned = similarity.new_zeros(len(similarity))
    if similarity.numel():
        best = similarity.amax(dim=1)
        rows, columns = map(torch.as_tensor, linear_sum_assignment(similarity.numpy(), True))
        assigned = assigned.index_put((rows,), similarity[rows, columns])
    return Match(best, assigned)


class Correlation:
    """Pearson's, between the columns of two tables of importances that come in batches of rows."""

    def __init__(self) -> None:
        self.n_rows, self.sums, self.squares, self.products = 0, [], [], torch.zeros(())

    def update(self, a: Float[Tensor, "rows A"], b: Float[Tensor, "rows B"]) -> None:
        pair = (a.double(), b.double())
        sums, squares = [x.sum(dim=0) for x in pair], [(x * x).sum(dim=0) for x in pair]
        if self.n_rows:
            sums = [old + new for old, new in zip(self.sums, sums, strict=True)]
            squares = [old + new for old, new in zip(self.squares, squares, strict=True)]
        self.n_rows, self.sums, self.squares = self.n_rows + len(a), sums, squares
        self.products = self.products + pair[0].mT @ pair[1]

    def compute(self) -> Float[Tensor, "A B"]:
        """0 where one of the two is constant."""
        n, (a, b) = self.n_rows, self.sums
        spread = [
            (q / n - (s / n) ** 2).clamp(min=0) for q, s in zip(self.squares, (a, b), strict=True)
        ]
        below = spread[0].sqrt()[:, None] * spread[1].sqrt()
        shared = self.products / n - torch.outer(a, b) / n**2
        return torch.where(below > 1e-12, shared / below.clamp(min=1e-12), 0.0).float()


class _Pair(NamedTuple):
    alive: tuple[Tensor, Tensor]
    """which subcomponents are on at least once, `[C]` of each run"""
    together: Float[Tensor, "C C"]
    """the correlation of their importances"""
    apart: Float[Tensor, "C C"]
    """the same with the inputs of one permuted"""


def agreement(runs: Sequence[Run]) -> dict[str, Agreement]:
    """Of every site, on the held-out batches of the first run."""
    _check_one_target(runs)
    batches = runs[0].prepared.eval_batches
    pairs = {
        (i, j): _importances(runs[i], runs[j], batches)
        for i, j in permutations(range(len(runs)), 2)
    }
    found = {}
    for path in runs[0].model.sites:
        sites = [run.model.sites[path] for run in runs]
        own = {key: by_site[path] for key, by_site in pairs.items()}
        found[path] = _of_site(path, sites, own)
    return found


@torch.no_grad()
def _importances(a: Run, b: Run, batches: Sequence[Batch]) -> dict[str, _Pair]:
    together = {path: Correlation() for path in a.model.sites}
    apart = {path: Correlation() for path in a.model.sites}
    highest: dict[str, list[Tensor]] = {}
    generator = seeded(CPU, "agreement", "inputs")
    for batch in batches:
        found = [run.model.importances(batch).lower for run in (a, b)]
        for path in together:
            g = [own[path].flatten(end_dim=-2).cpu() for own in found]
            order = torch.randperm(len(g[0]), generator=generator)
            together[path].update(*g)
            apart[path].update(g[0], g[1][order])
            before = highest.get(path, [torch.zeros(x.shape[1]) for x in g])
            highest[path] = [old.maximum(x.amax(dim=0)) for old, x in zip(before, g, strict=True)]
    return {
        path: _Pair(
            (highest[path][0] > ALIVE_THRESHOLD, highest[path][1] > ALIVE_THRESHOLD),
            together[path].compute(),
            apart[path].compute(),
        )
        for path in together
    }


def _of_site(path: str, sites: Sequence[Site], pairs: Mapping[tuple[int, int], _Pair]) -> Agreement:
    matches: dict[str, list[Match]] = {kind: [] for kind in KINDS}
    permuted: dict[str, list[Match]] = {kind: [] for kind in KINDS}
    initial: dict[str, list[Match]] = {kind: [] for kind in KINDS[:3]}
    for (i, j), pair in pairs.items():
        chosen = tuple(own.nonzero().flatten() for own in pair.alive)
        two = (sites[i], sites[j])
        for kind, similarity in _of_weights(two, chosen).items():
            matches[kind].append(match(similarity))
        matches["importance"].append(match(pair.together[chosen[0]][:, chosen[1]]))
        permuted["importance"].append(match(pair.apart[chosen[0]][:, chosen[1]]))
        for draw in range(N_DRAWS):
            generator = seeded(CPU, "agreement", path, i, j, draw)
            others = tuple(
                torch.randperm(site.C, generator=generator)[: len(own)]
                for site, own in zip(two, chosen, strict=True)
            )
            for kind, similarity in _of_weights(two, others).items():
                permuted[kind].append(match(similarity))
            for kind, similarity in _at_the_beginning(two, chosen, generator).items():
                initial[kind].append(match(similarity))
    chance = {
        kind: Chance(_means(initial[kind]) if kind in initial else None, _means(permuted[kind]))
        for kind in KINDS
    }
    alive = {i: int(pair.alive[0].sum()) for (i, _), pair in pairs.items()}
    return Agreement([alive[i] for i in sorted(alive)], matches, chance)


def _of_weights(sites: tuple[Site, Site], chosen: tuple[Tensor, ...]) -> dict[str, Tensor]:
    parts = [site.subcomponents for site in sites]
    V = [own.V.detach().cpu()[:, c] for own, c in zip(parts, chosen, strict=True)]
    U = [own.U.detach().cpu()[c] for own, c in zip(parts, chosen, strict=True)]
    return similarities((V[0], V[1]), (U[0], U[1]))


def _at_the_beginning(
    sites: tuple[Site, Site], chosen: tuple[Tensor, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """Of as many subcomponents as are alive, as two runs are initialised."""
    weight = sites[0].target_weight.detach().float().cpu()
    d_in, d_out = weight.shape
    V, U = [torch.empty(d_in, len(c)) for c in chosen], [torch.empty(len(c), d_out) for c in chosen]
    for own_V, own_U in zip(V, U, strict=True):
        init_subcomponents_(own_V, own_U, weight, generator=generator)
    return similarities((V[0], V[1]), (U[0], U[1]))


def _means(matches: Sequence[Match]) -> tuple[float, float]:
    """Best and assigned, each the mean over pairs of the mean over subcomponents."""
    return _mean([own.best for own in matches]), _mean([own.assigned for own in matches])


def _mean(values: Sequence[Tensor]) -> float:
    means = [own.mean().item() for own in values if len(own)]
    return sum(means) / len(means) if means else 0.0


def interval(values: Sequence[Tensor], seed: int = 0) -> tuple[float, float]:
    """95 % of the means over resampled subcomponents of each pair (percentile bootstrap)."""
    generator = seeded(CPU, "agreement", "bootstrap", seed)
    resampled = [
        own[torch.randint(len(own), (N_RESAMPLES, len(own)), generator=generator)].mean(dim=1)
        for own in values
        if len(own)
    ]
    if not resampled:
        return 0.0, 0.0
    low, high = torch.stack(resampled).mean(dim=0).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _check_one_target(runs: Sequence[Run]) -> None:
    first, *others = runs
    for other in others:
        if list(other.model.sites) != list(first.model.sites):
            different = sorted({*other.model.sites} ^ {*first.model.sites})
            raise UserError(
                f"{other.directory}: its sites are others than those of {first.directory}"
                f" ({', '.join(different)}); runs on the same matrices can be compared"
            )
        if digest(other.model) != digest(first.model):
            raise UserError(
                f"{other.directory}: its target is another than that of {first.directory}; runs on one"
                " target can be compared"
            )


def lines(found: Mapping[str, Agreement]) -> list[str]:
    """A table: one line for each site and kind of likeness."""
    heads = ("site", "alive", "by", "best match", "95 %", "assigned", "initial", "permuted")
    rows: list[tuple[str, ...]] = [heads]
    for path, own in found.items():
        for kind, matches in own.matches.items():
            low, high = interval([pair.best for pair in matches])
            best, assigned = _means(matches)
            chance = own.chance[kind]
            pairs = [chance.initial, chance.permuted]
            cells = ["–" if two is None else f"{two[0]:.3f} {two[1]:.3f}" for two in pairs]
            first = (path, " ".join(map(str, own.alive))) if kind == KINDS[0] else ("", "")
            shown = (f"{best:.3f}", f"{low:.3f}–{high:.3f}", f"{assigned:.3f}")
            rows.append((*first, kind, *shown, *cells))
    widths = [max(len(row[place]) for row in rows) for place in range(len(heads))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def record(found: Mapping[str, Agreement], runs: Sequence[Run]) -> dict[str, object]:
    """Everything, for a JSON file; matches in the order of the pairs."""
    pairs = [list(pair) for pair in permutations(range(len(runs)), 2)]
    names = [str(run.directory) for run in runs]
    sites = {
        path: {
            "alive": own.alive,
            "best": {kind: [m.best.tolist() for m in ms] for kind, ms in own.matches.items()},
            "assigned": {
                kind: [m.assigned.tolist() for m in ms] for kind, ms in own.matches.items()
            },
            "chance": {kind: chance._asdict() for kind, chance in own.chance.items()},
        }
        for path, own in found.items()
    }
    return {
        "runs": names,
        "checkpoints": [run.step for run in runs],
        "pairs": pairs,
        "sites": sites,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """How far two or more runs on one target have found the same subcomponents."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dirs", type=Path, metavar="RUN_DIR", nargs="+", help="two or more")
    add_ways_in(parser)
    args = parser.parse_args(argv)
    if len(args.run_dirs) < 2:
        parser.error(f"{args.run_dirs[0]}: one run; at least two are needed")
    with console_log(), user_errors():
        runs = [
            load_run(directory, trust=args.trust, verify=not args.unverified)
            for directory in args.run_dirs
        ]
        found = agreement(runs)
        path = args.run_dirs[0] / ANALYSIS
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record(found, runs))
    print(*lines(found), sep="\n")
    print(
        f"similarity of the subcomponents that are ever above {ALIVE_THRESHOLD}, mean over the ordered"
        " pairs of runs: to the most similar one (with a bootstrap interval over subcomponents) and to"
        " the partner in the best assignment; both again by chance, as runs are initialised and with"
        f" permuted importances; in {path}"
    )


if __name__ == "__main__":
    main()
