"""Where things lie on disk, read from the environment when asked for. Creates nothing."""

import logging
import os
import re
from pathlib import Path

from dotenv import dotenv_values, load_dotenv

logger = logging.getLogger(__name__)

PACKAGE_DIR = Path(__file__).resolve().parent
REPO_DIR = PACKAGE_DIR.parent

TRUSTED = "SPD_TRUSTED"
"""folders, as in PATH, below which code may be imported because a run names it; see spd.runs.trust"""
OF_THE_SHELL_ALONE = re.compile(
    rf"{TRUSTED}|PATH|PYTHON[A-Z].*|(LD|DYLD|GIT|XDG|TORCH[A-Z]*|TRITON)_.*|HOME|SHELL|ENV|BASH_ENV"
    r"|CC|CXX|C[A-Z_]*PATH|LIBRARY_PATH|CUDA_(HOME|PATH)|NVCC.*|MPL.*|.*TRUST_REMOTE_CODE|_.*|.*EXECUTABLE"
)
"""settings that decide which code runs, as where git and a compiler are found and what they read: a `.env`
cannot set them
"""

PATIENCE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""has torch's threads spin for a moment while they wait, and then sleep: those of two processes wait less
for each other, and a lone one does not pay for being woken thousands of times a second"""


def load_env(root: Path = REPO_DIR) -> None:
    """Load `.env` from the working directory, then from the repository root; the shell wins.

    What decides which code runs is left out, with one line: the working directory may be a stranger's.
    """
    for folder in (Path.cwd(), root):
        file = folder / ".env"
        if not file.is_file():
            continue
        names = filter(OF_THE_SHELL_ALONE.fullmatch, dotenv_values(file))
        kept = {name: os.environ.get(name) for name in names}
        load_dotenv(file, override=False)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
        if kept:
            logger.warning("%s: %s: only the shell sets it; left out", file, ", ".join(kept))


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
