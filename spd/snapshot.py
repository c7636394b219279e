"""The code that runs: its commit, and a copy of it that stays as it is."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from spd.settings import PACKAGE_DIR, REPO_DIR

RECORD_FILE = "snapshot.json"


class CodeState(NamedTuple):
    """Which code runs."""

    commit: str | None
    """None outside a git checkout"""
    dirty: bool
    """something differs from that commit, or a file of the package is not in it"""


def code_state(root: Path = REPO_DIR) -> CodeState:
    """The state of the checkout at `root`, or what a snapshot recorded of its origin."""
    record = root / RECORD_FILE
    if record.is_file():
        return CodeState(**json.loads(record.read_text(encoding="utf-8")))
    others = ("ls-files", "--others", "--exclude-standard", "--", PACKAGE_DIR.name)
    changed = _git(root, "status", "--porcelain", "--untracked-files=no") or _git(root, *others)
    return CodeState(_git(root, "rev-parse", "HEAD"), bool(changed))


def take_snapshot(folder: Path) -> CodeState:
    """Copy the package into `folder`, from where `PYTHONPATH` finds it; returns its state.

    With what is not committed: the copy is the code that would run now.
    """
    state = code_state()
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE_DIR, folder / PACKAGE_DIR.name, ignore=ignored)
    text = json.dumps(state._asdict(), indent=2) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")
    return state


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
