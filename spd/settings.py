"""Where things lie on disk, read from the environment when asked for. Creates nothing."""

import os
from pathlib import Path

from dotenv import load_dotenv

PACKAGE_DIR = Path(__file__).resolve().parent
REPO_DIR = PACKAGE_DIR.parent

PATIENCE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""has torch's threads spin for a moment while they wait, and then sleep: those of two processes wait less
for each other, and a lone one does not pay for being woken thousands of times a second"""


def load_env(root: Path = REPO_DIR) -> None:
    """Load `.env` from the working directory, then from the repository root; the shell wins."""
    for folder in (Path.cwd(), root):
        if (folder / ".env").is_file():
            load_dotenv(folder / ".env", override=False)


def output_root() -> Path:
    """`$SPD_OUT_DIR`, or `out` in the working directory: runs, cached targets, logs."""
    return Path(os.environ.get("SPD_OUT_DIR") or "out").expanduser()


def targets_root() -> Path:
    """Where targets that were trained on first use are cached."""
    return output_root() / "targets"


def patient_threads() -> dict[str, str]:
    """What has to be added to the environment of a process, before it imports torch, for its threads to
    sleep where they wait for long. Nothing where the user has said how they wait.
    """
    return {} if any(name in os.environ for name in PATIENCE) else dict(PATIENCE)
