"""Stochastic Parameter Decomposition: weight matrices as sums of causally gated rank-one parts.

The public names are imported when they are first asked for, so that `import spd` alone imports no torch.
`__init__.pyi` tells type checkers what they are.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "ComponentModel": "spd.component_model",
    "Problem": "spd.problem",
    "RunError": "spd.config",
    "SPDConfig": "spd.spd_config",
    "SiteMask": "spd.masks",
    "UserError": "spd.config",
    "decompose": "spd.runs.library",
    "export": "spd.runs.export",
    "load_run": "spd.runs.run",
}
__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll] - it lists what __init__.pyi lists


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
