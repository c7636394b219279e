"""`spd-evals` and `spd-sweep` in processes of their own, with targets that need no training."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from spd.config import load_config
from spd.experiments.targets import config_hash
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.settings import PACKAGE_DIR, REPO_DIR
from tests.run_fixtures import make_tms_target

EVALS, SWEEP = "spd.evals.run_evals", "spd.sweeps.sweep"
QUICK = (
    *("log_every=1", "eval_every=4", "save_every=2", "batch_size=16", "eval_batch_size=16"),
    *("n_eval_batches=1", "figures={}", "compile=false", "sites={linear1: 6, linear2: 6}"),
    *(
        "losses={stochastic_recon: {coeff: 1}}",
        "data.feature_probability=0.5",
        "data.unlike_target=true",
    ),
)
"""a run of a moment, but for its start"""
TARGETS = ("tms_5-2", "tms_40-10")


class Launcher:
    """Runs the commands under one output root, away from the user's own settings and logins."""

    def __init__(self, folder: Path, package: Path = REPO_DIR) -> None:
        self.folder, self.out, self.package = folder, folder / "out", package
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        for name in TARGETS:
            training = load_config(
                TMSTrainConfig, PACKAGE_DIR / "experiments" / "tms" / f"{name}_target.yaml"
            )
            cached = self.out / "targets" / f"{name}_target-{config_hash(training)}"
            make_tms_target(cached, name)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SPD_", "WANDB_", "OMP_", "CUDA_"))
        } | {
            **{"HOME": str(self.home), "SPD_OUT_DIR": str(self.out), "WANDB_MODE": "disabled"},
            **{"PYTHONPATH": str(package), "COLUMNS": "200"},
        }

    def start(
        self, module: str, *args: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *args],
            cwd=self.home,
            env=self.environment | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hears_ctrl_c,
        )

    def run(
        self, module: str, *args: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(module, *args, env=env)
        try:
            out, err = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=240)
            pytest.fail(f"{module} {args} took too long:\n{out}{err}")
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def studies(self, kind: str) -> list[Path]:
        return sorted((self.out / kind).glob("*")) if (self.out / kind).is_dir() else []


def hears_ctrl_c() -> None:
    """For a child: a shell that starts the tests in the background lets them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def table(text: str) -> list[list[str]]:
    """The rows of a printed table without what depends on time."""
    lines = text[text.index("experiment  ") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("summary: "))
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[:end]]
    return [[cell for cell in row if not cell.endswith(" s")] for row in rows]
