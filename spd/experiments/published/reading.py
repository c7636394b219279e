"""The directory of a run of the published implementation, read whole or refused with what it is instead.

Builds nothing. State dicts are read with `weights_only=True`: nothing in them is executed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spd.config import UserError, read_yaml, shown
from spd.run_files import forbidden, is_run, read_json

CONFIG_FILE = "final_config.yaml"
STATE_FILE = re.compile(r"model_(\d+)\.pth")
LABELS_FILE = "label_coeffs.json"
Family = Literal["tms", "resid_mlp", "lm"]
TOYS: tuple[Family, ...] = ("tms", "resid_mlp")
PARTS = ("model", "components", "gates")
"""with which the names in a state dict begin"""
NEEDED = ("C", "target_module_patterns", "n_ci_mlp_neurons")
EXPECTED = (
    f"spd-import reads a directory of the published implementation: {CONFIG_FILE}, model_<step>.pth, and"
    " tms.pth or resid_mlp.pth with its training configuration, or the name of a Hugging Face model"
)


class ToyTarget(NamedTuple):
    """A target that the published code trained."""

    weights: dict[str, Tensor]
    """name in the model → tensor"""
    training: dict[str, Any]
    """its training configuration"""
    label_coeffs: list[float] | None
    """of a residual MLP"""


class Published(NamedTuple):
    """A run of the published implementation."""

    directory: Path
    family: Family
    config: dict[str, Any]
    step: int
    """of the newest state dict"""
    state: dict[str, Tensor]
    target: ToyTarget | None
    """None for a language model, which its configuration names"""

    def part(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Of `components` or `gates`: module, its dots written as dashes → name → tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.state.items():
            head, _, rest = key.partition(".")
            module, _, last = rest.partition(".")
            if head == name:
                found.setdefault(module, {})[last] = tensor
        return found


def read_published(directory: Path) -> Published:
    """What the published code left in a directory, at its newest step.

    `UserError` if it is something else, or a part is missing or damaged.
    """
    _check_directory(directory)
    states = {
        int(found[1]): path
        for path in directory.iterdir()
        if (found := STATE_FILE.fullmatch(path.name))
    }
    config = read_yaml(directory / CONFIG_FILE)
    missing = [key for key in NEEDED if key not in config]
    if missing:
        raise UserError(
            f"{directory / CONFIG_FILE}: has no {missing[0]}: not a configuration of the published"
            " implementation of June 2025 (later ones are not read)"
        )
    if not states:
        raise UserError(
            f"{directory}: a published run without a model_<step>.pth: its decomposition was not saved"
        )
    step = max(states)
    state = read_state(states[step])
    _check_state(states[step], state)
    family, target = _target(directory, config)
    return Published(directory, family, config, step, state, target)


def _check_directory(directory: Path) -> None:
    """`UserError` with what a directory is that holds no final_config.yaml."""
    if not directory.exists():
        raise UserError(f"{directory}: no such directory; {EXPECTED}")
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file; {EXPECTED}")
    if (directory / CONFIG_FILE).is_file():
        return
    names = sorted(path.name for path in directory.iterdir())
    if is_run(directory):
        what = "is a run of this package already, which load_run takes as it is"
    elif any(f"{family}.pth" in names for family in TOYS):
        what = f"holds a target of the published code and no decomposition of it (no {CONFIG_FILE})"
    elif any(map(STATE_FILE.fullmatch, names)):
        what = f"holds a state dict of a published run, but no {CONFIG_FILE} with it"
    elif {"config.json", "model.safetensors"} <= set(names):
        what = "holds a model or a decomposition for from_pretrained"
    else:
        found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        what = f"holds no {CONFIG_FILE} ({'found: ' + found if names else 'it is empty'})"
    raise UserError(f"{directory}: {what}; {EXPECTED}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a .pth file by name, on the CPU; `UserError` if it holds anything else."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle raises almost anything
        raise forbidden(path, error) or UserError(
            f"{path}: cannot be read: it holds something else than tensors, or was cut short"
        ) from None
    whole = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )
    if not whole or not found:
        raise UserError(
            f"{path}: holds a {type(found).__name__} that is no state dict; tensors by name are needed"
        )
    bad = [name for name, value in found.items() if not bool(value.isfinite().all())]
    if bad:
        raise UserError(f"{path}: {bad[0]} has entries that are not finite")
    return {name: value.detach() for name, value in found.items()}


def _check_state(path: Path, state: Mapping[str, Tensor]) -> None:
    heads = {name.partition(".")[0] for name in state}
    missing = [part for part in PARTS if part not in heads]
    if missing:
        raise UserError(
            f"{path}: has nothing under {', '.join(f'{part}.' for part in missing)}: not the state dict of"
            f" a published decomposition ({len(state)} tensors, the first {next(iter(state))!r})"
        )
    other = sorted(name for name in state if name.partition(".")[0] not in PARTS)
    if other:
        raise UserError(
            f"{path}: {other[0]!r} is no name of a published decomposition (they begin with"
            f" {', '.join(f'{part}.' for part in PARTS)})"
        )


def _target(directory: Path, config: Mapping[str, Any]) -> tuple[Family, ToyTarget | None]:
    there: list[Family] = [*(name for name in TOYS if (directory / f"{name}.pth").is_file())]
    described: list[Family] = [
        name for name in TOYS if (directory / f"{name}_train_config.yaml").is_file()
    ]
    if len(there) > 1 or len(described) > 1:
        raise UserError(f"{directory}: holds targets of two kinds; one is needed")
    if there != described:
        kind = (there or described)[0]
        names = (f"{kind}_train_config.yaml", f"{kind}.pth")
        absent = names[0] if there else names[1]
        raise UserError(f"{directory}: a published run whose {absent} is missing")
    if not there:
        if hub_name(config) is None:
            raise UserError(
                f"{directory}: a published run without its target: neither tms.pth nor resid_mlp.pth is"
                f" there, and {CONFIG_FILE} names no Hugging Face model"
            )
        return "lm", None
    family = there[0]
    training = read_yaml(directory / f"{family}_train_config.yaml")
    weights = read_state(directory / f"{family}.pth")
    coeffs = _label_coeffs(directory) if family == "resid_mlp" else None
    return family, ToyTarget(weights, training, coeffs)


def hub_name(config: Mapping[str, Any]) -> str | None:
    """The Hugging Face model that a configuration names."""
    found = config.get("pretrained_model_name_hf") or config.get("pretrained_model_name")
    return found if isinstance(found, str) else None


def _label_coeffs(directory: Path) -> list[float]:
    path = directory / LABELS_FILE
    if not path.is_file():
        raise UserError(f"{directory}: a published run whose {LABELS_FILE} is missing")
    found = read_json(path)
    numbers = isinstance(found, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in found
    )
    if not numbers:
        raise UserError(f"{path}: a list of numbers is needed, found {shown(found)}")
    return [float(value) for value in found]
