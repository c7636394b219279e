"""Where the modules of a target lie: their paths, its layers, and what was put there earlier."""

import sys
from collections.abc import Iterable

from torch import nn

from spd.component_model.site import Site
from spd.masks import Place


def begin_anew(target: nn.Module) -> None:
    """Put the target's own modules back in the place of sites that an earlier model has left in it."""
    for module, paths in paths_of_modules(target).items():
        if isinstance(module, Site):
            module.running.over = True
            for path in paths:
                target.set_submodule(path, module.original)


def layers_of(target: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model, marked as such by transformers; none of anything else."""
    modeling_layers = sys.modules.get("transformers.modeling_layers")
    if modeling_layers is None:
        return []
    kind = modeling_layers.GradientCheckpointingLayer
    outermost: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in target.modules():
        if isinstance(module, kind) and module not in inner:
            outermost.append(module)
            inner |= set(module.modules())
    return outermost


def paths_of_modules(target: nn.Module) -> dict[nn.Module, list[str]]:
    paths: dict[nn.Module, list[str]] = {}
    for path, module in target.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def places_of(target: nn.Module, paths: Iterable[str]) -> dict[str, Place]:
    """Of the modules that sites are about to replace."""
    in_layer: dict[nn.Module, str] = {}
    for layer in layers_of(target):
        in_layer |= {module: path for path, module in layer.named_modules()}
    return {path: Place(path, in_layer.get(target.get_submodule(path), path)) for path in paths}
