"""What every experiment can be run beside: the same pipeline where its result is known, or is to be none.

*null*: the target as it is initialised. *anchor*: an identity matrix stands in front of `linear1` and
must come out as exactly one subcomponent for each of its inputs. *pairs*: features 0 and 1, and 2 and 3,
are always on together, so that no data tell which of a pair is on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spd.config import UserError

ANCHORED = "linear1"


class Control(NamedTuple):
    """One way to run an experiment on purpose where its result is known, or is to be nothing."""

    suffix: str
    """behind the experiment's name, in the names of jobs and runs"""
    overrides: Callable[[Any], Sequence[str] | None]
    """of a configuration; None: it makes no sense there"""
    meaning: str


def _null(config: Any) -> Sequence[str] | None:
    return ("null=true",) if "null" in type(config).model_fields else None


def _anchor(config: Any) -> Sequence[str] | None:
    if "anchor" not in type(config).model_fields or config.anchor:
        return None
    C = max(config.sites.values())
    return (f"anchor=[{ANCHORED}]", f'sites."anchors.{ANCHORED}"={C}')


def _pairs(config: Any) -> Sequence[str] | None:
    if not hasattr(getattr(config, "data", None), "synced_inputs"):
        return None
    return ("data.synced_inputs=[[0, 1], [2, 3]]", "data.unlike_target=true")


CONTROLS = (
    Control("-null", _null, "a target as it is initialised"),
    Control("-anchor", _anchor, f"an identity matrix in front of {ANCHORED}"),
    Control("-pairs", _pairs, "features 0 and 1, and 2 and 3, always on together"),
)


def is_control(config: Mapping[str, Any]) -> bool:
    """Whether a run's configuration is one of these."""
    pairs = (config.get("data") or {}).get("unlike_target", False)
    return bool(config.get("null") or config.get("anchor") or pairs)


def controls_of(name: str, config: Any) -> dict[str, Sequence[str]]:
    """Suffix → overrides of the controls of an experiment; `UserError` if it has no null."""
    found = {control.suffix: control.overrides(config) for control in CONTROLS}
    if found["-null"] is None:
        raise UserError(
            f"--nulls: {name} has no key null, by which build would decompose the target as it is"
            " initialised; experiments of the package have it"
        )
    return {suffix: overrides for suffix, overrides in found.items() if overrides is not None}
