"""Steps per second and peak memory of the naive, the eager and the compiled step, measured in turn.

python -m benchmarks.step_time [EXPERIMENT …] [--variants naive eager compiled] [--blocks 9] [--seconds 2]
python -m benchmarks.step_time [EXPERIMENT …] --against CHECKOUT [--variants eager compiled]

Prints tables for the documentation: medians over the blocks, quartiles in brackets, peak memory of the
process. Against another checkout, its runs and those of this one take turns, and the ratio tells how many
times faster this one is.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.against import check_checkout, compare
from benchmarks.blocks import Spread, Variant, machine, measure, ratios, spread
from benchmarks.cases import Case
from spd.runs.console import user_errors
from spd.settings import REPO_DIR

DEFAULT = ("tms_5-2", "tms_40-10", "resid_mlp1", "resid_mlp2")
VARIANTS: tuple[Variant, ...] = ("naive", "eager", "compiled")


def in_words(values: Spread) -> str:
    return f"{values.median:.3g} ({values.low:.3g}–{values.high:.3g})"


def print_variants(
    names: Sequence[str], variants: Sequence[Variant], args: argparse.Namespace
) -> None:
    """Every variant of this checkout's step; the first of them is what the others are compared with."""
    print(f"| experiment | step | steps/s | times {variants[0]} | peak memory | first 3 steps |")
    print("|---|---|---|---|---|---|")
    for name in names:
        found = measure(Case(name), variants, n_blocks=args.blocks, block_seconds=args.seconds)
        for variant, own in found.items():
            ratio = in_words(spread(ratios(own, found[variants[0]])))
            speed = in_words(spread(own.steps_per_second))
            print(
                f"| `{name}` | {variant} | {speed} | {ratio} | {own.megabytes:.0f} MB"
                f" | {own.first_seconds:.1f} s |",
                flush=True,
            )


def print_against(
    names: Sequence[str], variants: Sequence[Variant], args: argparse.Namespace
) -> None:
    """This checkout and another, run by run in turn."""
    there = check_checkout(args.against)
    print(f"this checkout: {REPO_DIR}\nthe other: {there}\n")
    print("| experiment | step | steps/s here | steps/s there | ratio |\n|---|---|---|---|---|")
    for name in names:
        for variant in variants:
            found = compare(
                Case(name),
                REPO_DIR,
                there,
                compiled=variant == "compiled",
                n_rounds=args.blocks,
                seconds=args.seconds,
            )
            cells = [in_words(spread(values)) for values in (found.here, found.there, found.ratios)]
            print(f"| `{name}` | {variant} | {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiments", nargs="*", default=DEFAULT, metavar="EXPERIMENT")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="of the step (default all)")
    parser.add_argument("--blocks", type=int, default=9, help="of each variant (default 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each block (default 2)")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another one, timed in turn"
    )
    args = parser.parse_args(argv)
    if args.blocks < 1:
        parser.error("--blocks: at least 1 is needed")
    if args.against is not None and "naive" in (args.variants or ()):
        parser.error("--variants naive: it is the same in every checkout")
    print(machine(), end="\n\n")
    with user_errors():
        if args.against is not None:
            print_against(args.experiments, args.variants or VARIANTS[1:], args)
        else:
            print_variants(args.experiments, args.variants or VARIANTS, args)


if __name__ == "__main__":
    main()
