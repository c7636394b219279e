"""The target's layers, as the passes of a step run them: not again before the first replaced site, and
compiled, or recomputed in the backward pass, if that is wanted.

Which modules are layers is what transformers itself marks for checkpointing. Its own switch is not used:
it is off in evaluation mode, in which a target always is.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd.component_model import ComponentModel, Mask, Site, TargetOutput
from spd.config import UserError


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


CACHES = ("past_key_values", "past_key_value", "layer_past")
"""what layers are given to append to; a second time would be one too many"""

State = tuple[bool, Mask | None]
"""whether a site is replaced, and its mask"""


def checkpoint_layers_(model: ComponentModel) -> None:
    """From now on, passes with gradients store the inputs of the target's layers only, for good."""
    layers = layers_of(model.target)
    if not layers:
        raise UserError(
            "activation_checkpointing: true needs a target whose layers transformers knows how to"
            f" checkpoint; {type(model.target).__name__} has none"
        )
    for layer in layers:
        sites = [module for module in layer.modules() if isinstance(module, Site)]
        layer.forward = _recomputed(layer.forward, sites)


def _recomputed(forward: Callable[..., Any], sites: Sequence[Site]) -> Callable[..., Any]:
    """`forward`, run a second time in the backward pass with the masks that it had in the first.

    By then `ComponentModel.forward` has long cleared them.
    """

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        states = [(site.replaced, site.mask) for site in sites]

        def run(*args: Any, **kwargs: Any) -> Any:
            with _in_states(sites, states):
                return forward(*args, **kwargs)

        kwargs |= {name: None for name in CACHES if name in kwargs}
        kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed


@contextmanager
def _in_states(sites: Sequence[Site], states: Sequence[State]) -> Iterator[None]:
    before = [(site.replaced, site.mask) for site in sites]
    _set_states(sites, states)
    try:
        yield
    finally:
        _set_states(sites, before)


def _set_states(sites: Sequence[Site], states: Sequence[State]) -> None:
    for site, (replaced, mask) in zip(sites, states, strict=True):
        site.replaced, site.mask = replaced, mask
