"""The target's layers, as the passes of a step run them: not again before the first replaced site, and
compiled, or recomputed in the backward pass, if that is wanted.

Which modules are layers is what transformers itself marks for checkpointing. Its own switch is not used:
it is off in evaluation mode, in which a target always is.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd.component_model import ComponentModel, Site, TargetOutput, in_half, layers_of
from spd.config import UserError, counted
from spd.engine.experts import Experts
from spd.masks import Mask, Pass, Place, Routed, Running, SiteMask
from spd.problem import Batch

logger = logging.getLogger(__name__)

CACHES = ("past_key_values", "past_key_value", "layer_past")
"""what layers are given to append to; a second time would be one too many"""


class Layer(nn.Module):
    """What a layer of the target becomes, for good: it asks the pass that it is part of how to run.

    Its class becomes one that extends both this class and its own, as torch's `fully_shard` does it:
    paths, names of parameters, `isinstance` and hooks stay what they were, which a module around the
    layer (torch's `checkpoint_wrapper`) would change.
    """

    running: Running
    places: tuple[Place, ...]
    """of the sites that are part of it"""
    recomputed: bool
    of_any_length: bool
    """whether parts of it read more rows or less from batch to batch, so that no graph fits it"""
    own_forward: Callable[..., Any]
    """the original's"""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        current = self.running.current
        if isinstance(current, LayeredPass):
            return current.run_layer(self, args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer has always computed, once more in the backward pass if it is `recomputed`."""
        current = self.running.current
        if not self.recomputed or current is None or not torch.is_grad_enabled():
            return self.own_forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.running.within(
                current
            ):  # by the backward pass, the model is in another, or none
                return self.own_forward(*args, **kwargs)

        kwargs |= {name: None for name in CACHES if name in kwargs}
        kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For `copy` and `pickle`, to which the class, made while the program runs, has no name."""
        return _empty_layer, (type(self).__bases__[1],), self.__dict__


@cache
def _layer_class(original: type[nn.Module]) -> type[Layer]:
    body = {"own_forward": original.forward}
    return cast(type[Layer], type(f"Layer{original.__name__}", (Layer, original), body))


def _empty_layer(original: type[nn.Module]) -> Layer:
    return object.__new__(_layer_class(original))


def install_layers_(model: ComponentModel) -> list[Layer]:
    """Make every layer of the target a `Layer`, unless it is one already."""
    for module in layers_of(model.target):
        if not isinstance(module, Layer):
            sites = [part for part in module.modules() if isinstance(part, Site)]
            module.__class__ = _layer_class(type(module))
            assert isinstance(module, Layer)
            module.running, module.recomputed = model.running, False
            module.places = tuple(site.place for site in sites)
            module.of_any_length = any(isinstance(part, Experts) for part in module.modules())
    return [layer for layer in layers_of(model.target) if isinstance(layer, Layer)]


def checkpoint_layers_(model: ComponentModel) -> None:
    """From now on, passes with gradients store the inputs of the target's layers only, for good."""
    layers = install_layers_(model)
    if not layers:
        raise UserError(
            "activation_checkpointing: true needs a target whose layers transformers knows how to"
            f" checkpoint; {type(model.target).__name__} has none"
        )
    for layer in layers:
        layer.recomputed = True


class LayerPass(Pass):
    """The part of a pass that lies in one layer: the same for layers that are alike."""

    def __init__(self, whole: Pass, places: Sequence[Place]) -> None:
        masks = {place.in_layer: whole.mask_of(place) for place in places}
        replaced = {name: mask for name, mask in masks.items() if mask is not None}
        super().__init__(replaced, keep_inputs=whole.inputs is not None)
        self.copied = {place.in_layer for place in places if place.path in whole.copied}

    def key(self, place: Place) -> str:
        return place.in_layer


class LayeredPass(Pass):
    """A pass that runs layer by layer, as `SharedPrefix` wants it."""

    def __init__(
        self,
        masks: Mapping[str, Mask],
        *,
        known: Sequence[Any] = (),
        record: bool = False,
        compiler: Callable[[Layer], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__(masks, keep_inputs=record)
        self.known = list(known)
        """what the first layers give out, which are not run"""
        self.record = record
        self.outputs: list[Any] = []
        """of the layers, in the order of their calls, if they are recorded"""
        self.n_before: dict[str, int] = {}
        """how many layers had been run when a site was called"""
        self.compiler = compiler

    def read(self, place: Place, x: Tensor, routed: Routed | None = None) -> Tensor:
        self.n_before.setdefault(place.path, len(self.outputs))
        return super().read(place, x, routed)

    def run_layer(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.known:
            return self.known.pop(0)
        output = (
            layer.run(args, kwargs)
            if self.compiler is None or layer.of_any_length
            else self._run_compiled(layer, self.compiler(layer), args, kwargs)
        )
        if self.record:
            self.outputs.append(output)
        return output

    def _run_compiled(
        self,
        layer: Layer,
        compiled: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        part = LayerPass(self, layer.places)
        with layer.running.within(part):
            output = compiled(layer, *args, **kwargs)
        for place in layer.places:
            for x in (part.inputs or {}).get(place.in_layer, ()):
                self.read(place, x)
        return output


class SharedPrefix:
    """Starts masked passes from what the target's layers gave out, as far as no mask has a say in it.

    No value before the first replaced site depends on masks or on anything that is trained. What a
    layer gives out is kept from the target's pass over a batch to the end of `kept`. Without layers,
    outside of it, and where `try_out` has found that layers take more than that, every pass is whole.

    `compiled`: in between, layers run compiled, each as a graph of its own. Layers that are alike share
    it, so there are as many graphs as ways in which the sites of a layer are replaced.
    """

    def __init__(self, model: ComponentModel) -> None:
        self.model = model
        self.compiled = False
        self.whole = False
        """whether passes are not shortened"""
        self.recorded: LayeredPass | None = None
        """the target's pass over the batch that is kept"""
        self._forwards: dict[Callable[..., Any], Callable[..., Any]] = {}
        install_layers_(model)

    @contextmanager
    def kept(self, batch: Batch) -> Iterator[TargetOutput]:
        """Run the target; passes over this batch within are shortened."""
        try:
            target = self.model.target_output(batch, self._record)
            if self.whole and self.recorded is not None:
                self.recorded.outputs.clear()
            yield target
        finally:
            self.recorded = None

    @torch.no_grad()
    def try_out(self, batch: Batch) -> None:
        """From now on, passes are whole if shortened ones do not give the target's output on this batch.

        So it is where layers take more than what the one before gives out, such as keys and values that
        an earlier one has left behind (Gemma 3n and 4). Runs a pass from every layer where one may begin.
        """
        with self.kept(batch) as target:
            assert self.recorded is not None, "there is a pass that is kept"
            begins = sorted({n for n in self.recorded.n_before.values() if n})
            if not begins:
                return
            sites = self.model.sites.items()
            off = {path: SiteMask(site.subcomponents.V.new_zeros(site.C)) for path, site in sites}
            self.model(batch, off)  # so that what layers have left behind is not that of the target
            for n_known in begins:
                why = self._difference(batch, target.output, n_known)
                if why is not None:
                    self.whole = True
                    logger.warning(
                        "passes run whole, which is slower: begun after %s, the target %s",
                        counted(n_known, "layer"),
                        why,
                    )
                    return

    def _difference(self, batch: Batch, expected: Tensor, n_known: int) -> str | None:
        """What is wrong about the output of an unmasked pass of which so many layers are known."""
        assert self.recorded is not None, "there is a pass that is kept"
        this = LayeredPass({}, known=self.recorded.outputs[:n_known])
        try:
            output = self.model.run(batch, this)
        except Exception as error:  # whatever a layer raises that misses something
            return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not _alike(output, expected, 1e-2 if in_half(self.model) else 1e-4):
            return "gives another output"
        return None

    def forward(self, batch: Batch, masks: Mapping[str, Mask | None] | None) -> Tensor:
        """What `ComponentModel.forward` gives, for the batch that is `kept`."""
        if self.recorded is None:
            return self.model(batch, masks)
        replaced = self.model.known_masks(masks)
        first = min((self.recorded.n_before[path] for path in replaced), default=0)
        n_known = 0 if self.whole else first
        known = self.recorded.outputs[:n_known]
        return self.model.run(batch, LayeredPass(replaced, known=known, compiler=self._compiler()))

    def _record(self) -> LayeredPass:
        self.recorded = LayeredPass({}, record=True, compiler=self._compiler())
        return self.recorded

    def _compiler(self) -> Callable[[Layer], Callable[..., Any]] | None:
        return self._compiled_forward if self.compiled else None

    def _compiled_forward(self, layer: Layer) -> Callable[..., Any]:
        forward = type(layer).own_forward
        if forward not in self._forwards:
            self._forwards[forward] = torch.compile(forward, dynamic=False)
        return self._forwards[forward]


def _alike(output: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether they differ by no more than this share of their norm; -∞ and NaN stand where they stood."""
    if output.shape != expected.shape or not torch.equal(output.isfinite(), expected.isfinite()):
        return False
    output, expected = (x.where(x.isfinite(), 0.0).double() for x in (output, expected))
    return bool((output - expected).norm() <= tolerance * expected.norm())
