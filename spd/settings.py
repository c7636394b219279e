"""Where things lie on disk, read from the environment when asked for. Creates nothing."""

import os
from pathlib import Path

from dotenv import load_dotenv

PACKAGE_DIR = Path(__file__).resolve().parent
REPO_DIR = PACKAGE_DIR.parent

PATIENCE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""has torch's threads sleep while they wait, so that those of two processes do not wait for each other"""


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
    sleep while they wait. Nothing where the user has said how they wait.
    """
    return {} if any(name in os.environ for name in PATIENCE) else dict(PATIENCE)
