"""python -m spd.evals.confusion PLACE …: what can be said without a solution, beside the full verdict.

A toy model has a known solution, by which a run is judged (`spd.metrics.causes`). A target that nobody
has solved has none: what is left are the points on faithfulness, adversarial masks and data, and, where
there are runs of several seeds, how far the held-out loss of one lies above the lowest among them. On
finished runs of toys both verdicts are there; a table shows how often the second one is right.

PLACE is a run, a study of `spd-evals`, or any folder that holds runs.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spd.config import UserError, counted, read_yaml
from spd.evals.controls import is_control
from spd.evals.summary import Rate, in_words
from spd.launch.study import STUDY_FILE, find_study, study_jobs
from spd.metrics.causes import BY_SOLUTION, beyond
from spd.reports.results import read_result
from spd.run_files import CONFIG_FILE, RESULT_FILE, STARTS
from spd.runs.console import console_log, user_errors

LOSS = "loss/total"
WITHIN = 0.065
"""how far above the lowest held-out loss of its group a run may lie: between the 0.064 of the worst solved
run and the 0.066 of the best one that is not, of the 26 with fresh seeds by which it was chosen (seeds
10–29 of `tms_5-2_fast`, 5–10 of `tms_40-10_fast`)"""


class Judged(NamedTuple):
    """A finished run and both verdicts."""

    name: str
    group: str
    """runs on one target with one configuration"""
    solved: bool
    """by all points"""
    open_points: tuple[str, ...]
    """those that do not hold of the ones that need no solution, each in one line"""
    loss: float | None
    """held-out total"""

    @property
    def without_solution(self) -> bool:
        """By the points on faithfulness, adversary and data alone."""
        return not self.open_points


class Confusion(NamedTuple):
    """How two verdicts on the same runs go together."""

    both: int
    only_full: int
    """solved by all points, refused without a solution"""
    only_without: int
    """a false "solved" """
    neither: int

    @property
    def agreement(self) -> Rate:
        return Rate(self.both + self.neither, sum(self))

    def lines(self, title: str) -> list[str]:
        """The table of two by two, and the agreement in words."""
        heads = ("", "solved by all points", "not solved")
        table = [
            heads,
            (title, str(self.both), str(self.only_without)),
            ("  refused", str(self.only_full), str(self.neither)),
        ]
        wide = max(len(line[0]) for line in table)
        lines = [f"{a:{wide}}  {b:>20}  {c:>10}" for a, b, c in table]
        n_wrong = self.only_without + self.neither
        agreed = f"agreement: {in_words(self.agreement)}, with Wilson's 95 % interval"
        return [*lines, f'{agreed}; false "solved": {self.only_without} of {n_wrong} not solved']


def confusion(pairs: Sequence[tuple[bool, bool]]) -> Confusion:
    """Of pairs (solved by all points, accepted without a solution)."""
    return Confusion(
        sum(full and without for full, without in pairs),
        sum(full and not without for full, without in pairs),
        sum(without and not full for full, without in pairs),
        sum(not full and not without for full, without in pairs),
    )


def with_losses(runs: Sequence[Judged], within: float) -> list[tuple[bool, bool]]:
    """(full verdict, points that need no solution and a loss near the lowest of the run's group)."""
    lowest: dict[str, float] = {}
    for run in runs:
        if run.loss is not None:
            lowest[run.group] = min(run.loss, lowest.get(run.group, run.loss))
    return [
        (
            run.solved,
            run.without_solution
            and run.loss is not None
            and run.loss <= (1 + within) * lowest[run.group],
        )
        for run in runs
    ]


def judged(directory: Path) -> Judged | None:
    """Both verdicts of a finished run, from its files; None of a control, and without a known solution."""
    result = read_result(directory / RESULT_FILE)
    values = {row.key: row.value for row in result.rows}
    config = read_yaml(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    by_solution = not is_control(config) and any(
        key.partition("/")[0] in BY_SOLUTION for key in values
    )
    if result.solved is None or not by_solution:
        return None
    without = {k: v for k, v in values.items() if k.partition("/")[0] not in BY_SOLUTION}
    name = f"{directory.parent.name}/{directory.name}"
    group = (
        f"{result.experiment}, {result.steps} steps, target seed {config.get('target_seed') or 0}"
    )
    return Judged(name, group, result.solved, tuple(beyond(without)), values.get(LOSS))


def runs_in(place: Path) -> list[Path]:
    """The finished runs in a place: itself, those of a study, or all below it."""
    if (place / STUDY_FILE).is_file():
        folders = [
            run for job in study_jobs(find_study("evals", f"{place}/")) for run in job.run_dirs
        ]
    elif (place / RESULT_FILE).is_file():
        folders = [place]
    else:
        found = (path.parent for path in place.rglob(RESULT_FILE))
        folders = [run for run in found if STARTS not in run.relative_to(place).parts]
    finished = [run for run in sorted(folders) if (run / RESULT_FILE).is_file()]
    if not finished:
        raise UserError(
            f"{place}: no finished run there; a run, a study or a folder of runs is needed"
        )
    return finished


def tables(runs: Sequence[Judged], within: float) -> list[str]:
    """Both tables of these runs, and the runs on which the verdicts differ, each with its reasons."""
    loss_pairs = with_losses(runs, within)
    lines = confusion([(run.solved, run.without_solution) for run in runs]).lines(
        "accepted by points 1, 4 and 5"
    )
    lines += [""]
    lines += confusion(loss_pairs).lines(f"and a loss within {within:.1%} of the lowest")
    for run, (full, without) in zip(runs, loss_pairs, strict=True):
        if full != without:
            reasons = "; ".join(run.open_points) or ("its loss" if full else "nothing refuses it")
            lines.append(f"  {run.name}: {'solved' if full else 'not solved'}, but {reasons}")
    return lines


def by_group(runs: Sequence[Judged]) -> Mapping[str, list[Judged]]:
    """The runs of each group, in order of name."""
    groups: dict[str, list[Judged]] = {}
    for run in sorted(runs, key=lambda run: run.group):
        groups.setdefault(run.group, []).append(run)
    return groups


def main(argv: Sequence[str] | None = None) -> None:
    """The verdict that needs no solution beside the full one, over finished runs: a table of two by two."""
    parser = argparse.ArgumentParser(prog="python -m spd.evals.confusion", description=main.__doc__)
    parser.add_argument("places", nargs="+", type=Path, metavar="PLACE")
    about = f"share by which a loss may lie above the lowest of its group (default {WITHIN})"
    parser.add_argument("--loss-within", type=float, default=WITHIN, metavar="SHARE", help=about)
    args = parser.parse_args(argv)
    if not 0 <= args.loss_within < float("inf"):
        parser.error(f"--loss-within {args.loss_within}: a share of at least 0 is needed")
    with console_log(), user_errors():
        folders = list(dict.fromkeys(run for place in args.places for run in runs_in(place)))
        found = {run: judged(run) for run in folders}
        runs = [own for own in found.values() if own is not None]
        if not runs:
            raise UserError(
                f"{args.places[0]}: no run there was judged by a known solution; the metric causes does it"
            )
        groups = by_group(runs)
        if len(groups) > 1:
            for group, own in groups.items():
                print(
                    f"{group}: {counted(len(own), 'run')}",
                    *tables(own, args.loss_within),
                    "",
                    sep="\n",
                )
        print(f"{'all' if len(groups) > 1 else next(iter(groups))}: {counted(len(runs), 'run')}")
        print(*tables(runs, args.loss_within), sep="\n")
        if len(runs) < len(folders):
            print(f"left out, as no known solution has judged them: {len(folders) - len(runs)}")


if __name__ == "__main__":
    main()
