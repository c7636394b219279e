"""Where a run comes from: the code, the machine, the command. Reads, never writes."""

import builtins
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from spd.config import UserError
from spd.settings import PACKAGE_DIR, REPO_DIR

RECORD_FILE = "snapshot.json"
OF_FILE = "spd_entry_"
"""begins the names of modules that were imported from a file"""

PACKAGES = ("spd", "torch", "numpy", "pydantic", "transformers", "datasets", "wandb", "safetensors")


def provenance(device: str) -> dict[str, Any]:
    """The part of meta.json that is known before the run begins."""
    return {
        "argv": sys.argv,
        "command": shlex.join(["python", *sys.argv]),
        **code_state()._asdict(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": device,
        "host": platform.node(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # of this package, where it runs from a folder
        return "unknown"


def is_interactive() -> bool:
    """Whether this is a notebook or a session at a prompt, whose code lies in no file."""
    at_a_prompt = hasattr(builtins, "get_ipython") or hasattr(sys, "ps1")
    return at_a_prompt and not hasattr(sys.modules["__main__"], "__file__")


def entry_of(module: ModuleType) -> str:
    """An importable name of an experiment's module, or its file, also when it runs as a script."""
    if module.__name__ != "__main__" and not module.__name__.startswith(OF_FILE):
        return module.__name__
    assert module.__file__ is not None, "an experiment runs from a file"
    path = Path(module.__file__).resolve()
    if path.is_relative_to(REPO_DIR / "spd"):
        return ".".join(path.relative_to(REPO_DIR).with_suffix("").parts)
    return str(path)


def import_entry(name: str) -> ModuleType:
    """The module that `entry_of` named, or a `UserError` if it is no longer there."""
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"{name}: the module of this experiment is missing: {error}") from None
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(f"{OF_FILE}{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{name}: the file of this experiment is gone")
    if str(path.parent) not in sys.path:  # of what lies beside it, as if it were started
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class CodeState(NamedTuple):
    """Which code runs."""

    commit: str | None
    """None outside a git checkout that tracks the package"""
    dirty: bool
    """something differs from that commit, or a file of the package is not in it"""


def code_state(root: Path = REPO_DIR) -> CodeState:
    """The state of the checkout at `root`, or what a snapshot recorded of its origin."""
    record = root / RECORD_FILE
    if record.is_file():
        return CodeState(**json.loads(record.read_text(encoding="utf-8")))
    if not _git(root, "ls-files", "--", PACKAGE_DIR.name):  # a checkout of something else
        return CodeState(None, False)
    others = ("ls-files", "--others", "--exclude-standard", "--", PACKAGE_DIR.name)
    changed = _git(root, "status", "--porcelain", "--untracked-files=no") or _git(root, *others)
    return CodeState(_git(root, "rev-parse", "HEAD"), bool(changed))


def package_files(package: Path = PACKAGE_DIR) -> list[Path]:
    """The files of the package, from its folder: those that git tracks or does not ignore.

    Outside a checkout all but compiled ones. Never a `.env`, tracked or not.
    """
    listed = _git(package, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files = [Path(name) for name in (listed or "").split("\0") if name]
    if (
        Path("__init__.py") not in files
    ):  # no checkout, or one that ignores it, as of an environment
        files = [path.relative_to(package) for path in package.rglob("*")]
        files = [path for path in files if "__pycache__" not in path.parts]
    hidden = re.compile(r"\.env(\..*)?")
    kept = {path for path in files if not any(map(hidden.fullmatch, path.parts))}
    return sorted(path for path in kept if (package / path).is_file() and path.suffix != ".pyc")


def _without_git() -> dict[str, str]:
    """The environment without what names another repository, as a hook of git does."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            text=True,
            timeout=10,
            env=_without_git(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
