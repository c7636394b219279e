"""Recomputing the layers of a Hugging Face target in the backward pass, instead of storing them.

Which modules are layers is what transformers itself marks for this purpose. Its own switch is not used:
it is off in evaluation mode, in which a target always is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from spd.component_model import ComponentModel, Mask, Site
from spd.config import UserError
from spd.prefix import layers_of

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
