"""python -m spd.analysis.clustering RUN_DIR [--share 0.8 | --alpha A]: which subcomponents act as one.

Subcomponents, also of different sites, are merged as long as it takes fewer bits to say which groups are on
(`description_length`). What a group costs beyond its index is set by α; two single subcomponents that are
equally often on are merged if more than the share q of their positions is common, with
α = q/(1 − q) · log2(k)/2.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int
from numpy import ndarray

from spd.analysis.description_length import (
    Merging,
    Pick,
    RankPicker,
    alpha_for,
    best_pair,
    merge_all,
    size_of,
)
from spd.analysis.importances import FOLDER as IMPORTANCES
from spd.analysis.importances import RECORD, found_or_made
from spd.analysis.memberships import FLOOR, Memberships
from spd.analysis.partitions import hamming_distance, matching_distance, rand_distance
from spd.config import UserError
from spd.run_files import read_json, write_json
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors

ANALYSIS = "analysis/clustering/clustering.json"
SHARE = 0.8
N_SAMPLES = 3
N_ROUNDS = 20
"""rounds at which partitions are compared"""
SHOWN = 20


class Settings(NamedTuple):
    """What decides which groups are merged."""

    share: float = SHARE
    """q, which sets α where none is given"""
    alpha: float | None = None
    threshold: float = FLOOR
    """a subcomponent is on where g is above it"""
    min_count: int = 1
    """what is on at fewer of the positions is left out"""
    together: bool = True
    """only groups that are on together somewhere merge: rare ones would merge for a shorter index alone"""
    gamma: float | None = None
    """of the rank picker; None: always the best pair"""
    seed: int = 0


USUAL = Settings()


class Clustering(NamedTuple):
    """Of the subcomponents that are on at `min_count` positions at least."""

    members: Int[ndarray, " k"]
    """which they are, among all of the run"""
    alpha: float
    merging: Merging
    labels: Int[ndarray, " k"]
    """the partition at the lowest cost: of each, the place in `members` of its group's first"""
    n_positions: int

    def groups(self) -> list[Int[ndarray, " members"]]:
        """The subcomponents of each group, the largest group first."""
        found = [self.members[self.labels == label] for label in np.unique(self.labels)]
        return sorted(found, key=lambda own: (-len(own), own[0]))


class Distances(NamedTuple):
    """Means over all pairs of samples."""

    matching: float
    """pairs of subcomponents that are grouped together in exactly one of two partitions"""
    hamming: float
    """subcomponents in another group, under the best renaming"""
    rand: float
    """matching, of all pairs"""


class Stability(NamedTuple):
    """How far clusterings of several samples of the data are apart."""

    n_samples: int
    n: int
    """subcomponents in any of them"""
    by_round: dict[int, Distances]
    """after so many merges in each"""
    at_best: Distances
    """of the partitions at the lowest cost"""
    by_chance: Distances
    """of the same with the subcomponents of one permuted"""


def cluster(on: sp.csr_array, settings: Settings = USUAL) -> Clustering:
    """Merge the subcomponents of `on`, `[positions, C]`, 1 where each is on.

    `UserError` if none is on often enough, or α is negative.
    """
    counts = np.asarray(on.sum(axis=0)).ravel()
    (members,) = np.nonzero(counts >= max(1, settings.min_count))
    if not len(members):
        raise UserError(
            f"min_count: {settings.min_count}; no subcomponent is on (g > {settings.threshold}) at so many"
            f" of the {size_of(on)[0]:,} positions"
        )
    alpha = settings.alpha
    if alpha is None:
        alpha = alpha_for(settings.share, len(members))
    pick: Pick = best_pair
    if settings.gamma is not None:
        pick = RankPicker(settings.gamma, settings.seed)
    chosen = on.tocsc()[:, members].tocsr()
    merging = merge_all(chosen, alpha=alpha, together=settings.together, pick=pick)
    return Clustering(members, alpha, merging, merging.labels(), size_of(on)[0])


def stability(
    memberships: Memberships, settings: Settings, *, n_samples: int, alpha: float
) -> Stability:
    """Cluster `n_samples` disjoint samples of the sequences, each with picks of its own, and compare.

    `UserError` if there are fewer sequences.
    """
    on, sequences = memberships.on(settings.threshold), memberships.sequences.numpy()
    distinct = np.unique(sequences)
    if len(distinct) < n_samples:
        raise UserError(
            f"--samples {n_samples}: there are {len(distinct)} sequences to sample from"
        )
    generator = np.random.default_rng(settings.seed)
    part_of = dict(zip(generator.permutation(distinct), np.arange(len(distinct)), strict=True))
    part = np.array([part_of[s] % n_samples for s in sequences])
    found = [
        cluster(
            on[np.flatnonzero(part == i)],
            settings._replace(alpha=alpha, seed=settings.seed + 1 + i),
        )
        for i in range(n_samples)
    ]
    union = np.unique(np.concatenate([own.members for own in found]))
    longest = max(len(own.merging.merges) for own in found)
    rounds = sorted({round(longest * i / N_ROUNDS) for i in range(N_ROUNDS + 1)})
    by_round = {
        n: _mean_distances([labels_over(union, own, own.merging.labels(n)) for own in found])
        for n in rounds
    }
    best = [labels_over(union, own, own.labels) for own in found]
    permuted = [_distances(a, generator.permutation(b)) for a, b in combinations(best, 2)]
    chance = Distances(*np.mean(permuted, axis=0).tolist())
    return Stability(n_samples, len(union), by_round, _mean_distances(best), chance)


def labels_over(
    union: Int[ndarray, " n"], own: Clustering, labels: Int[ndarray, " k"]
) -> Int[ndarray, " n"]:
    """The partition of all of `union`: what a clustering does not have is a group of its own."""
    over = len(own.members) + np.arange(len(union))
    over[np.searchsorted(union, own.members)] = labels
    return over


def _mean_distances(partitions: Sequence[ndarray]) -> Distances:
    found = [_distances(a, b) for a, b in combinations(partitions, 2)]
    return Distances(*np.mean(found, axis=0).tolist())


def _distances(a: ndarray, b: ndarray) -> Distances:
    return Distances(matching_distance(a, b), hamming_distance(a, b), rand_distance(a, b))


# --- what is said of it --------------------------------------------------------------------------


def record(
    found: Clustering, on: sp.csr_array, names: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """Everything, for a JSON file."""
    merging = found.merging
    counts = np.asarray(on.sum(axis=0)).ravel()
    columns = on.tocsc()
    clusters = []
    for own in found.groups():
        s = int((np.diff(columns[:, own].tocsr().indptr) > 0).sum())
        clusters.append(
            {
                "members": [names[c] for c in own],
                "positions": s,
                "density": s / found.n_positions,
                "cohesion": float(counts[own].mean() / s),
            }
        )
    costs = merging.costs()
    return {
        **settings._asdict(),
        "alpha": found.alpha,
        "share": None if settings.alpha is not None else settings.share,
        "k": len(found.members),
        "n_positions": found.n_positions,
        "n_clusters": len(clusters),
        "best_round": merging.best_round(),
        "costs": costs.tolist(),
        "merges": [[names[found.members[m.i]], names[found.members[m.j]]] for m in merging.merges],
        "clusters": clusters,
    }


def stability_record(found: Stability) -> dict[str, Any]:
    """The same of the comparison of samples."""
    return {
        "n_samples": found.n_samples,
        "n": found.n,
        "by_round": {str(n): own._asdict() for n, own in found.by_round.items()},
        "at_best": found.at_best._asdict(),
        "by_chance": found.by_chance._asdict(),
    }


def lines(told: Mapping[str, Any]) -> list[str]:
    """What the command prints: the largest clusters, and what they save."""
    costs, best = told["costs"], told["best_round"]
    several = [own for own in told["clusters"] if len(own["members"]) > 1]
    n = told["n_positions"]
    said = [
        f"{told['k']} subcomponents in {told['n_clusters']} groups, {len(several)} of several, at α ="
        f" {told['alpha']:.4g}: {costs[best] / n:.4g} bits for each of {n:,} positions, {costs[0] / n:.4g}"
        " as single ones"
    ]
    for own in several[:SHOWN]:
        said.append(
            f"  {len(own['members']):>4} on at {own['density']:.4g}, each at {own['cohesion']:.0%} of that:"
            f" {shortened(own['members'])}"
        )
    if len(several) > SHOWN:
        said.append(f"  and {len(several) - SHOWN} more")
    stable: Mapping[str, Any] | None = told.get("stability")
    if stable is not None:
        own, chance = stable["at_best"], stable["by_chance"]
        said.append(
            f"{stable['n_samples']} samples of the data: of {stable['n']} subcomponents"
            f" {own['hamming']:.4g} are in another group ({chance['hamming']:.4g} by chance), and"
            f" {own['matching']:.4g} pairs are together in one alone ({chance['matching']:.4g})"
        )
    return said


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Some names of a group."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def main(argv: Sequence[str] | None = None) -> None:
    """Group the subcomponents of a run that are on together, by description length."""
    args = _parser().parse_args(argv)
    settings = Settings(
        args.share,
        args.alpha,
        args.threshold,
        args.min_count,
        not args.apart,
        args.gamma,
        args.seed,
    )
    with console_log(), user_errors():
        gathered = found_or_made(args.run_dir, trust=args.trust, verify=not args.unverified)
        on = gathered.memberships.on(settings.threshold)
        found = cluster(on, settings)
        told = record(found, on, gathered.names, settings)
        if args.samples > 1:
            stable = stability(
                gathered.memberships, settings, n_samples=args.samples, alpha=found.alpha
            )
            told["stability"] = stability_record(stable)
        told["importances"] = read_json(args.run_dir / IMPORTANCES / RECORD)["sha256"]
        path = args.run_dir / ANALYSIS
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, told)
    print(*lines(told), sep="\n")
    print(f"in {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--share",
        type=_share,
        default=SHARE,
        metavar="Q",
        help=f"two that are equally often on merge if they share so much of it (default {SHARE}); sets α",
    )
    one.add_argument("--alpha", type=_not_negative, metavar="A", help="α itself")
    parser.add_argument(
        "--threshold",
        type=float,
        default=FLOOR,
        metavar="T",
        help=f"on is g > T (default {FLOOR}, the least)",
    )
    parser.add_argument(
        "--min_count",
        type=int,
        default=1,
        metavar="N",
        help="leave out what is on less (default 1)",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="let groups merge that are never on together: rare ones then join for a shorter index alone",
    )
    parser.add_argument(
        "--gamma",
        type=_positive,
        metavar="G",
        help="merge the J-th best pair with probability ∝ exp(-G J) (0.2 is usual); default: the best",
    )
    parser.add_argument("--seed", type=int, default=0, help="of picks and samples (default 0)")
    parser.add_argument(
        "--samples",
        type=int,
        default=N_SAMPLES,
        metavar="N",
        help=f"compare clusterings of N disjoint samples of the data (default {N_SAMPLES}; 0: none)",
    )
    add_ways_in(parser)
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number between 0 and 1 is needed")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number from 0 is needed")
    return value


if __name__ == "__main__":
    main()
