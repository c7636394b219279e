"""One checkout of this project against another: their own commands, timed in turn.

Only what every layout of the code has in common is used: an experiment's command line, the format of a
target, and the `timings.jsonl` of a run. The other checkout may be older or newer than this one.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import Case, load
from spd.config import RunError, UserError

N_INTERVALS = 10
"""in which a run is timed, after the first step"""
SHORT_RUN = 5 * N_INTERVALS
"""steps of the runs that come first: they fill the compiler's cache, and tell how fast a step is"""


class Compared(NamedTuple):
    """Two checkouts on one case: steps per second of each run, in the order in which they ran."""

    here: list[float]
    there: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times faster this checkout is, round by round."""
        return [own / other for own, other in zip(self.here, self.there, strict=True)]


def check_checkout(path: Path) -> Path:
    """The absolute path of a checkout, or a `UserError`."""
    if not (path / "spd" / "registry.py").is_file():
        raise UserError(
            f"--against {path}: a checkout of this project is expected (spd/registry.py)"
        )
    return path.absolute()


def compare(
    case: Case, here: Path, there: Path, *, compiled: bool, n_rounds: int, seconds: float
) -> Compared:
    """Runs of about so many seconds, of one checkout and the other in turn, each a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load(case, folder / "target")
        settings = [*case.overrides, f"target={folder / 'target'}", f"compile={compiled}".lower()]
        first = [
            steps_per_second(where, case.experiment, settings, SHORT_RUN) for where in (here, there)
        ]
        n_steps = max(SHORT_RUN, round(min(first) * seconds))
        found = Compared([], [])
        for _ in range(n_rounds):
            for where, own in ((here, found.here), (there, found.there)):
                own.append(steps_per_second(where, case.experiment, settings, n_steps))
    return found


def steps_per_second(checkout: Path, experiment: str, settings: list[str], n_steps: int) -> float:
    """The median pace of a run of `n_steps` steps, without its first step and without evaluations."""
    every = max(1, n_steps // N_INTERVALS)
    lengths = {"log_every": every, "eval_every": n_steps, "save_every": n_steps, "steps": n_steps}
    # Held-out batches tell how many zero rows a batch has: from too few of them, more room is left.
    quiet = ["metrics={}", "figures={}", "n_eval_batches=20", "wandb_project=null"]
    overrides = [*settings, *quiet, *(f"{key}={value}" for key, value in lengths.items())]
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        command = [sys.executable, "-m", "spd.registry", experiment, *overrides]
        done = subprocess.run(
            [*command, "--run_dir", str(run_dir)],
            cwd=checkout,
            env=_environment(checkout, Path(name)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RunError(f"{checkout}: the run of {experiment} failed:\n{done.stderr.strip()}")
        lines = (run_dir / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    times = [(line["step"], line["seconds"]) for line in map(json.loads, lines)]
    if len(times) < 2:
        raise RunError(f"{checkout}: the run of {experiment} was too short to be timed")
    pairs = zip(times, times[1:], strict=False)
    return statistics.median((end - begin) / (t1 - t0) for (begin, t0), (end, t1) in pairs)


def _environment(checkout: Path, folder: Path) -> Mapping[str, str]:
    return os.environ | {
        "PYTHONPATH": str(checkout),
        "SPD_OUT_DIR": str(folder / "out"),
        "WANDB_MODE": "disabled",
    }
