"""Steps per second and peak memory of the naive, the eager and the compiled step, measured in turn.

python -m benchmarks.step_time [EXPERIMENT …] [--blocks 9] [--seconds 2]

Prints tables for README.md: medians over the blocks, quartiles in brackets, peak memory of the process.
"""

import argparse

from benchmarks.blocks import Spread, Variant, machine, measure, ratios, spread
from benchmarks.cases import Case

DEFAULT = ("tms_5-2", "tms_40-10", "resid_mlp1", "resid_mlp2")
VARIANTS: tuple[Variant, ...] = ("naive", "eager", "compiled")


def in_words(values: Spread) -> str:
    return f"{values.median:.3g} ({values.low:.3g}–{values.high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiments", nargs="*", default=DEFAULT, metavar="EXPERIMENT")
    parser.add_argument("--blocks", type=int, default=9, help="of each variant (default 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each block (default 2)")
    args = parser.parse_args()
    print(machine(), end="\n\n")
    print("| experiment | step | steps/s | times naive | peak memory | first 3 steps |")
    print("|---|---|---|---|---|---|")
    for name in args.experiments:
        found = measure(Case(name), VARIANTS, n_blocks=args.blocks, block_seconds=args.seconds)
        for variant, own in found.items():
            ratio = in_words(spread(ratios(own, found["naive"])))
            speed = in_words(spread(own.steps_per_second))
            print(
                f"| `{name}` | {variant} | {speed} | {ratio} | {own.megabytes:.0f} MB"
                f" | {own.first_seconds:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
