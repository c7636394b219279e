"""Time of a step and peak memory against one size at a time, naive and compiled, measured in turn.

python -m benchmarks.scaling [AXIS …] [--blocks 5] [--seconds 1]

Prints tables for README.md. Everything else stays as in the experiment that is named.
"""

import argparse

from benchmarks.blocks import Measured, Variant, machine, measure, ratios, spread
from benchmarks.cases import Case

VARIANTS: tuple[Variant, ...] = ("naive", "compiled")
AXES: dict[str, dict[int, Case]] = {
    "C": {
        C: Case("tms_40-10", (f"sites={{linear1: {C}, linear2: {C}}}",))
        for C in (50, 100, 200, 400)
    },
    "batch": {n: Case("tms_40-10", (f"batch_size={n}",)) for n in (1024, 2048, 4096, 8192)},
    "sites": {2 * n: Case("resid_mlp1", (), (f"model.n_layers={n}",)) for n in (1, 2, 3, 4)},
    "runs side by side": {n: Case("tms_5-2", n_seeds=n) for n in (1, 2, 5, 20)},
    "width": {n: Case("resid_mlp1", (), (f"model.d_embed={n}",)) for n in (250, 500, 1000, 2000)},
}


def row(size: int, found: dict[Variant, Measured], n_seeds: int) -> str:
    """The naive step is that of one run; the other does a step of each of `n_seeds`."""
    cells = [str(size)]
    for name, own in found.items():
        n_runs = 1 if name == "naive" else n_seeds
        milliseconds = 1e3 / spread(own.steps_per_second).median / n_runs
        cells += [f"{milliseconds:.3g}", f"{own.megabytes:.0f}"]
    ratio = n_seeds * spread(ratios(found["compiled"], found["naive"])).median
    return f"| {' | '.join(cells)} | {ratio:.3g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)} (default all)"
    )
    parser.add_argument("--blocks", type=int, default=5, help="of each variant (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each block (default 1)")
    args = parser.parse_args()
    unknown = [axis for axis in args.axes if axis not in AXES]
    if unknown:
        parser.error(f"unknown axis {unknown[0]!r}, there are {', '.join(AXES)}")
    print(machine())
    for axis in args.axes or AXES:
        cases = AXES[axis]
        experiment = next(iter(cases.values())).experiment
        print(f"\nBy {axis}, else as `{experiment}`:\n")
        print(f"| {axis} | naive, ms/step | MB | compiled, ms/step of a run | MB | ratio |")
        print("|---|---|---|---|---|---|")
        for size, case in cases.items():
            found = measure(case, VARIANTS, n_blocks=args.blocks, block_seconds=args.seconds)
            print(row(size, found, case.n_seeds), flush=True)


if __name__ == "__main__":
    main()
