"""The files that a page is made of. Any may be missing, and one that is damaged is a `UserError`."""

from pathlib import Path
from typing import Any

from spd.config import UserError, read_yaml
from spd.run_files import read_json, read_lines


def text_of(path: Path) -> str:
    """The text of a file; empty, if there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text in UTF-8") from None


def object_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty, if there is none."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: an object is needed, found a {type(found).__name__}")
    return found


def evaluation_in(path: Path) -> dict[str, float]:
    """The figures of merit of a run that has not finished, at a step."""
    found = object_of(path)
    wrong = [key for key, value in found.items() if not isinstance(value, int | float)]
    if wrong or (found and "step" not in found):
        raise UserError(f"{path}: not the evaluation of a run: {', '.join(wrong) or 'no step'}")
    return found


def configuration_in(path: Path) -> dict[str, Any]:
    """What the page needs of a configuration, whose class may not be at hand."""
    config = read_yaml(path) if path.is_file() else {}
    for key, kind in (("sites", int), ("losses", dict), ("figures", object), ("steps", None)):
        value = config.get(key)
        if value is None:
            continue
        if kind is None:
            right = isinstance(value, int)
        else:
            right = isinstance(value, dict) and all(
                isinstance(name, str) and isinstance(item, kind) for name, item in value.items()
            )
        if not right:
            raise UserError(f"{path}: {key}: not that of a run: {str(value)[:100]}")
    return config


def made_elsewhere(made: Any, shown: int | None) -> str:
    """A sentence on an analysis of another checkpoint than the page shows; empty where that is unknown."""
    if not isinstance(made, int) or shown is None or made == shown:
        return ""
    return f"Made at the checkpoint of step {made:,}, while this page shows step {shown:,}."


def paces_in(path: Path) -> list[float]:
    """Steps per second, as far as a run has noted them."""
    lines = read_lines(path) if path.is_file() else []
    return [line["steps_per_second"] for line in lines if "steps_per_second" in line]
