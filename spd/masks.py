"""What a pass says of its sites, and where masks come from: importances and random draws.

A site's mask has one entry for each subcomponent, `[..., C]`.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd.config import UserError


def stochastic_mask(
    g: Float[Tensor, "*rows C"], uniform: Float[Tensor, "*rows C"]
) -> Float[Tensor, "*rows C"]:
    """m = g + (1 − g) r with r ~ U(0, 1) (paper, section 2)."""
    return g + (1 - g) * uniform


class SiteMask(NamedTuple):
    """How one site is replaced in one pass: by y = ((x V) ⊙ m) U + δ (x W − (x V) U) + bias.

    With m = 1 and δ = 1 that is the target's own output, up to rounding.
    """

    components: Float[Tensor, "*rows C"] | None = None
    """m, of the subcomponents; None: all on"""
    delta: Float[Tensor, "*rows"] | None = None
    """δ, of what the subcomponents leave over of W; None: that is no part of the pass"""
    routed: Bool[Tensor, "*rows"] | None = None
    """where the site is replaced; elsewhere it gives the original's output itself. None: everywhere"""


Mask = SiteMask | Tensor | Callable[[], SiteMask | Tensor]
"""What a pass says of a site. A tensor `[..., C]` stands for `SiteMask(components=tensor)`; a function
makes either, and makes it anew in the backward pass, so that less is stored."""


def as_site_mask(mask: SiteMask | Tensor | None) -> SiteMask:
    """None stands for a site whose subcomponents are all on."""
    return mask if isinstance(mask, SiteMask) else SiteMask(components=mask)


@dataclass
class Place:
    """Where a site stands in the target."""

    path: str
    in_layer: str
    """its path within its layer, the same in layers that are alike; outside of layers, the whole path"""


class Pass:
    """One run of the target: which sites are replaced in it, and what is kept of it.

    It lives as long as something runs that reads it: the pass itself, and what its backward pass computes
    again.
    """

    def __init__(self, masks: Mapping[str, Mask], *, keep_inputs: bool = False) -> None:
        self.masks = masks
        """of the sites that are replaced"""
        self.inputs: dict[str, list[Tensor]] | None = {} if keep_inputs else None
        """what each site has read, call by call, if that is kept"""
        self.versions: dict[str, int] = {}
        """how often torch had changed the last of them in place when it was read"""
        self.copied: Set[str] = frozenset()
        """sites that read a copy, since the target overwrites what it feeds to them"""

    def key(self, place: Place) -> str:
        """Under which name this pass knows a site."""
        return place.path

    def mask_of(self, place: Place) -> Mask | None:
        """None: the site runs as in the target."""
        return self.masks.get(self.key(place))

    def read(self, place: Place, x: Tensor) -> Tensor:
        """What a site that is called with `x` is to read."""
        key = self.key(place)
        if key in self.copied:
            x = x.clone()
        if self.inputs is not None:
            self.inputs.setdefault(key, []).append(x)
            if not torch.compiler.is_compiling() and not x.is_inference():
                self.versions[key] = x._version
        return x

    def overwritten(self) -> set[str]:
        """The sites whose kept inputs have been changed in place since they were read."""
        inputs = self.inputs or {}
        return {
            key for key, version in self.versions.items() if inputs[key][-1]._version != version
        }


class Running:
    """The pass that a model is in: what its sites read. Between passes there is none."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.over = False
        """whether the target has been decomposed anew since, by another model"""

    @contextmanager
    def within(self, this: Pass) -> Iterator[None]:
        """Whatever is called in the meantime belongs to this pass."""
        before, self.current = self.current, this
        try:
            yield
        finally:
            self.current = before


OneMask = SiteMask | Tensor | float | str | None
GivenMask = OneMask | Callable[[Tensor], OneMask]
"""What a user may say of a site: see `ComponentModel.masked`."""


@runtime_checkable
class MaskedSite(Protocol):
    """What is asked of a site."""

    def mask_of_all(self, mask: Tensor | float, x: Tensor) -> Tensor: ...


class GivenMasks(Pass):
    """A pass under masks that a user has given, over as many calls of the target as it lasts."""

    def __init__(
        self,
        given: Mapping[str, GivenMask],
        sites: Mapping[str, MaskedSite],
        importances: Callable[[str, Tensor], Tensor],
    ) -> None:
        super().__init__({})
        self.given = given
        self.sites = sites
        self.importances = importances
        """site, its input → g_c of it"""
        self.latest: dict[str, Tensor] = {}
        """what a site is being called with"""

    def read(self, place: Place, x: Tensor) -> Tensor:
        x = super().read(place, x)
        self.latest[self.key(place)] = x
        return x

    def mask_of(self, place: Place) -> SiteMask | None:
        path = self.key(place)
        x = self.latest.pop(path)
        if path not in self.given:
            return None
        mask = self.given[path]
        if callable(mask) and not isinstance(mask, Tensor | SiteMask):
            mask = mask(x)
        match mask:
            case None:
                return SiteMask()
            case "importances":
                return SiteMask(self.importances(path, x))
            case SiteMask(components=None):
                return mask
            case SiteMask(components=Tensor() as components):
                return mask._replace(components=self.sites[path].mask_of_all(components, x))
            case Tensor() | float() | int():
                return SiteMask(self.sites[path].mask_of_all(mask, x))
        raise UserError(
            f"masks: {path!r} has {mask!r}; a number, a Tensor, a SiteMask, a function of the site's input"
            " or 'importances' is needed"
        )
