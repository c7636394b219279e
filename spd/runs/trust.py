"""Which code and which files a run may lead to.

A run may come from anybody: nothing is imported for it that neither this package, nor the caller, nor the
shell's environment has vouched for.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spd.config import UserError
from spd.run_files import META_FILE, read_meta
from spd.runs.execution import ExperimentConfig
from spd.runs.provenance import import_entry
from spd.runs.target import Build
from spd.runs.wandb_run import WANDB_FOLDER
from spd.settings import PACKAGE_DIR, TRUSTED

INSTALLED = ("spd", "transformers")
"""packages whose modules may always be named: this one, and the one that its language models come from"""
HOW = (
    f"--trust (in Python trust=True) imports it, or {TRUSTED}=FOLDER in the shell's environment what lies"
    " below FOLDER"
)


class UntrustedError(UserError):
    """A run names code or leads to files that nobody has vouched for."""


class Entry(NamedTuple):
    """What made a run, by the names in its meta.json."""

    module: str
    """an importable name, or a file"""
    config: str
    """the configuration class in it"""
    build: str
    """the function in it"""


def entry_of_run(directory: Path) -> Entry:
    """What meta.json says made the run; `UserError` unless it is three names."""
    recorded = read_meta(directory)["entry"]
    for name in Entry._fields:
        found = recorded.get(name)
        if not isinstance(found, str) or not found.isprintable() or not found.strip("."):
            raise UserError(
                f"{directory / META_FILE}: entry: {name}: a name is needed, got {found!r}"
            )
    return Entry(*(recorded[name] for name in Entry._fields))


def parts_of_run(directory: Path, *, trust: bool = False) -> tuple[type[ExperimentConfig], Build]:
    """Configuration class and `build` of a run; `UntrustedError` if its code may not be imported.

    The same if a link in the run leads out of it.
    """
    entry = entry_of_run(directory)
    check_links(directory, trust=trust)
    return parts_of_entry(entry, f"{directory / META_FILE}: entry", trust=trust)


def parts_of_entry(
    entry: Entry, place: str, *, trust: bool = False
) -> tuple[type[ExperimentConfig], Build]:
    """The same for what is named at `place`."""
    if not trust:
        check_code(entry.module, place)
    module = import_entry(entry.module)
    config_class: Any = getattr(module, entry.config, None)
    build: Any = getattr(module, entry.build, None)
    if not (isinstance(config_class, type) and issubclass(config_class, ExperimentConfig)):
        raise UserError(
            f"{place}: config: {entry.config!r} is no subclass of ExperimentConfig in {entry.module}"
        )
    if not _is_function_of(build, module.__name__):
        raise UserError(f"{place}: build: {entry.build!r} is no function of {entry.module}")
    return config_class, build


def _is_function_of(found: Any, module: str) -> bool:
    return callable(found) and getattr(found, "__module__", None) == module


def check_values(
    config: ExperimentConfig, place: str, *, trust: bool = False, named: Collection[str] = ()
) -> None:
    """`UntrustedError` if a value of the configuration at `place` names code that may not be imported.

    `named` is what the user has named himself.
    """
    for key, name in config.named_code().items():
        if not trust and name not in named:
            check_code(name.rpartition(".")[0], f"{place}: {key}")


def check_code(name: str, place: str) -> None:
    """`UntrustedError` unless the module or file of that name, which stands at `place`, may be imported."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        known = _is_file_of_package(path) or _is_imported(path) or _is_below_trusted(path)
        if not known and not _exists(path):
            raise UserError(f"{place}: {name}: the file of this experiment is gone")
    else:
        known = name.partition(".")[0] in INSTALLED or name in sys.modules or _lies_trusted(name)
    if not known:
        raise UntrustedError(
            f"{place}: {name!r} is no code of the installed package, nor has it been imported already: it"
            f" is not imported because a file names it; {HOW}"
        )


def check_links(directory: Path, *, trust: bool = False) -> None:
    """`UntrustedError` if a link in a run leads out of it; what W&B keeps there is passed over."""
    if trust:
        return
    root = directory.resolve()
    for path in _links(directory):
        if not _target_of(path).is_relative_to(root):
            raise UntrustedError(
                f"{path}: a link that leads out of the run, to {_target_of(path)}; nothing is read or"
                " written there; --trust (in Python trust=True) follows it"
            )


def _links(directory: Path, *, top: bool = True) -> Iterator[Path]:
    with os.scandir(directory) as found:
        for item in sorted(found, key=lambda item: item.name):
            if item.is_symlink():
                yield Path(item.path)
            elif item.is_dir() and not (top and item.name == WANDB_FOLDER):
                yield from _links(Path(item.path), top=False)


def _target_of(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # in a circle
        return link.absolute().parent / os.readlink(link)


def _is_file_of_package(path: Path) -> bool:
    return path.is_relative_to(PACKAGE_DIR)


def _is_imported(path: Path) -> bool:
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return any(
        isinstance(file, str) and Path(file).name == path.name and Path(file).resolve() == path
        for file in files
    )


def _is_below_trusted(path: Path) -> bool:
    folders = [folder for folder in os.environ.get(TRUSTED, "").split(os.pathsep) if folder]
    roots = [Path(folder).expanduser().resolve() for folder in folders]
    return any(path.is_relative_to(root) for root in roots)


def _lies_trusted(name: str) -> bool:
    """Whether a module, and what is imported with it, lies below a trusted folder. Imports nothing."""
    if not os.environ.get(TRUSTED):
        return False
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return False
    for depth in range(1, len(parts) + 1):
        if spec is None:
            return False
        if spec.origin is not None and not _is_below_trusted(Path(spec.origin).resolve()):
            return False
        if depth == len(parts):
            return spec.origin is not None
        places = spec.submodule_search_locations
        if places is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: depth + 1]), places)
    return False


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False
