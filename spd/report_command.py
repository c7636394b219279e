"""`spd-report RUN_DIR`: write the report of a run anew, from its newest checkpoint."""

import argparse
from collections.abc import Sequence

from spd import settings
from spd.command import console_log, resolve_device, user_errors
from spd.config import UserError
from spd.reporting import report_on
from spd.run import load_run


def main(argv: Sequence[str] | None = None) -> None:
    """Write report.html anew, from the newest checkpoint of each run."""
    parser = argparse.ArgumentParser(prog="spd-report", description=main.__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory or wandb:entity/project/run"
    )
    parser.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="held-out batches that a language model is shown, of those that its run keeps",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args(argv)
    settings.load_env()
    with console_log(), user_errors():
        if args.batches is not None and args.batches < 1:
            raise UserError(f"--batches: {args.batches}; at least 1 is needed")
        device = str(resolve_device(args.device))
        runs = [load_run(reference, device=device) for reference in args.runs]
        for run in runs:  # all are loaded before anything is written
            print(f"report: {report_on(run.directory, run.prepared, args.batches)}")


if __name__ == "__main__":
    main()
