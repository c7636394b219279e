"""The target's layers, as the passes of a step run them: not again before the first replaced site, and
compiled if that is wanted.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, Mask, TargetOutput


def layers_of(target: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model, marked as such by transformers; none of anything else."""
    modeling_layers = sys.modules.get("transformers.modeling_layers")
    if modeling_layers is None:
        return []
    kind = modeling_layers.GradientCheckpointingLayer
    return [module for module in target.modules() if isinstance(module, kind)]


class SharedPrefix:
    """Starts masked passes from what the target's layers gave out, as far as no mask has a say in it.

    No value before the first replaced site depends on masks or on anything that is trained. What a
    layer gives out is kept from the target's pass over a batch to the end of `kept`. Without layers,
    and outside of it, every pass is a whole one.

    `compiled`: in between, layers run compiled, each as a graph of its own. Layers that are alike share
    it, so there are as many graphs as ways in which the sites of a layer are replaced.
    """

    def __init__(self, model: ComponentModel) -> None:
        self.model = model
        self.compiled = False
        self.outputs: list[Any] = []
        """of the layers, in the order of their calls"""
        self.n_before: dict[str, int] = {}
        """how many layers have been run when a site is called"""
        self._keeping = self._recording = False
        self._known: list[Any] = []
        path_of: dict[nn.Module, str] = {site: path for path, site in model.sites.items()}
        inner: set[nn.Module] = set()
        for layer in layers_of(model.target):
            if layer not in inner:
                inner |= set(layer.modules())
                sites = [path_of[module] for module in layer.modules() if module in path_of]
                layer.forward = self._starting_late(layer.forward, sites)
        if inner:
            for site, path in path_of.items():
                if site not in inner:
                    site.register_forward_pre_hook(partial(self._note, path))

    @contextmanager
    def kept(self, batch: Tensor) -> Iterator[TargetOutput]:
        """Run the target; passes over this batch within are shortened."""
        self._keeping = True
        try:
            yield self._target_forward(batch)
        finally:
            self._keeping = False
            self.outputs.clear()
            self.n_before.clear()

    def _target_forward(self, batch: Tensor) -> TargetOutput:
        self._recording = True
        try:
            return self.model.target_forward(batch)
        finally:
            self._recording = False

    def forward(self, batch: Tensor, masks: Mapping[str, Mask | None] | None) -> Tensor:
        """What `ComponentModel.forward` gives, for the batch that is `kept`."""
        paths = self.model.sites if masks is None else masks
        n_known = min((self.n_before.get(path, 0) for path in paths), default=0)
        self._known = self.outputs[:n_known]
        try:
            return self.model(batch, masks)
        finally:
            self._known = []

    def _starting_late(
        self, forward: Callable[..., Any], sites: Sequence[str]
    ) -> Callable[..., Any]:
        @cache
        def compiled() -> Callable[..., Any]:
            return torch.compile(forward, dynamic=False)

        def layer(*args: Any, **kwargs: Any) -> Any:
            if self._known:
                return self._known.pop(0)
            for path in sites:
                self._note(path)
            run = compiled() if self.compiled and self._keeping else forward
            output = run(*args, **kwargs)
            if self._recording:
                self.outputs.append(output)
            return output

        return layer

    def _note(self, path: str, *_: Any) -> None:
        if self._recording:
            self.n_before[path] = len(self.outputs)
