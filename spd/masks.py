"""What a pass says of its sites, and where masks come from: importances and random draws.

A site's mask has one entry for each subcomponent, `[..., C]`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from spd.config import UserError


def stochastic_mask(
    g: Float[Tensor, "*rows C"], uniform: Float[Tensor, "*#rows C"]
) -> Float[Tensor, "*rows C"]:
    """m = g + (1 − g) r with r ~ U(0, 1) (paper, section 2)."""
    return g + (1 - g) * uniform


def uniform_k_subsets(draws: Float[Tensor, "*rows sites_and_one"]) -> Bool[Tensor, "*rows sites"]:
    """For every row by itself k ~ U{1 … L}, then a uniform k-subset of the L sites (VPD).

    The last of the uniform draws gives k; chosen are the sites whose draws are the k smallest.
    """
    keys, L = draws[..., :-1], draws.shape[-1] - 1
    k = 1 + (draws[..., -1:] * L).floor().clamp(max=L - 1)
    place = torch.arange(L, device=draws.device)
    one, other = keys[..., :, None], keys[..., None, :]
    smaller = (other < one) | ((other == one) & (place < place[:, None]))
    return smaller.sum(dim=-1) < k


MaskKind = Literal["unmasked", "stochastic", "importance_masked", "rounded", "ablated"]
MASK_KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
ROUNDING_THRESHOLD = 0.5


def masks_of(
    kind: MaskKind,
    importances: Mapping[str, Float[Tensor, "*rows _C"]],
    uniform: Callable[[Tensor], Tensor],
) -> dict[str, Tensor | None]:
    """All sites' masks of one kind: none, g + (1 − g) r, g, whether g > 0.5, or zeros.

    g is clipped to [0, 1]; `uniform` draws r like the tensor it is given.
    """
    masks: dict[str, Tensor | None] = {}
    for path, leaky in importances.items():
        g = leaky.clamp(0, 1)
        match kind:
            case "unmasked":
                masks[path] = None
            case "stochastic":
                masks[path] = stochastic_mask(g, uniform(g))
            case "importance_masked":
                masks[path] = g
            case "rounded":
                masks[path] = (g > ROUNDING_THRESHOLD).to(g.dtype)
            case "ablated":
                masks[path] = torch.zeros_like(g)
    return masks


def rounded_name(threshold: float) -> str:
    """What masks rounded at a threshold are called."""
    return f"rounded_above_{threshold:g}"


def further_masks(
    importances: Mapping[str, Float[Tensor, "*rows _C"]],
    uniform: Callable[[Tensor], Tensor],
    *,
    random: bool,
    thresholds: Sequence[float],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Masks that are not among the kinds: `random`, r whatever g is, and 1 where g > τ, else 0."""
    if random:
        yield "random", {path: uniform(g) for path, g in importances.items()}
    for threshold in thresholds:
        rounded = {path: (g > threshold).to(g.dtype) for path, g in importances.items()}
        yield rounded_name(threshold), rounded


Thresholds = Annotated[tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...], Field(max_length=20)]


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

    def at(self, routed: "Routed | None") -> "SiteMask":
        """Of a mask for all positions, the rows of a site that reads some of them; None: all."""
        if routed is None:
            return self
        components, *others = (
            None if values is None else routed.rows_of(values, n_axes)
            for values, n_axes in zip(self, (1, 0, 0), strict=True)
        )
        return SiteMask(components, *others)


class Routed(NamedTuple):
    """Where a site is applied that reads some positions only, as an expert the tokens routed to it."""

    positions: Int[Tensor, " n"]
    n_positions: int
    """of the batch"""

    def spread(self, rows: Tensor) -> Tensor:
        """`[n, ...]` → `[n_positions, ...]`, 0 where the site is not applied."""
        zeros = rows.new_zeros(self.n_positions, *rows.shape[1:])
        return zeros.index_copy(0, self.positions, rows)

    def rows_of(self, values: Tensor, n_axes: int) -> Tensor:
        """The inverse; what is the same for all positions stays as it is. `n_axes`: after those of rows."""
        n_leading = values.dim() - n_axes
        if n_leading == 0:
            return values
        rows = values.flatten(0, n_leading - 1)
        assert len(rows) in (1, self.n_positions), (
            f"{len(rows)} rows for {self.n_positions} positions"
        )
        return rows if len(rows) == 1 else rows[self.positions]


class RoutedInput(NamedTuple):
    """What such a site reads. Where it is not applied, its importances are 0."""

    rows: Float[Tensor, "n d_in"]
    routed: Routed


SiteInput = Tensor | RoutedInput
"""What the target feeds to a site"""

Mask = SiteMask | Tensor | Callable[[], SiteMask | Tensor]
"""What a pass says of a site. A tensor `[..., C]` stands for `SiteMask(components=tensor)`; a function
makes either, and makes it anew in the backward pass, so that less is stored."""


def as_site_mask(mask: SiteMask | Tensor | None, routed: Routed | None = None) -> SiteMask:
    """None stands for a site whose subcomponents are all on. Of a mask for all positions those `routed`."""
    whole = mask if isinstance(mask, SiteMask) else SiteMask(components=mask)
    return whole.at(routed)


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
        self.routed: dict[str, Routed] = {}
        """of the sites that have read some positions only"""
        self.versions: dict[str, int] = {}
        """how often torch had changed the last of them in place when it was read"""
        self.copied: Set[str] = frozenset()
        """sites that read a copy, since the target overwrites what it feeds to them"""
        self.weights: dict[str, Tensor] | None = None
        """what the target's own code reads of the weights of sites, if that is watched"""

    def weight_of(self, place: Place, weight: Tensor) -> Tensor:
        """What code that reads the weight of a site, rather than call it, is given."""
        if self.weights is None or not weight.is_floating_point():
            return weight
        return self.weights.setdefault(self.key(place), weight.detach().requires_grad_())

    def key(self, place: Place) -> str:
        """Under which name this pass knows a site."""
        return place.path

    def mask_of(self, place: Place) -> Mask | None:
        """None: the site runs as in the target."""
        return self.masks.get(self.key(place))

    def read(self, place: Place, x: Tensor, routed: Routed | None = None) -> Tensor:
        """What a site that is called with `x`, at all positions or some, is to read."""
        key = self.key(place)
        if routed is not None:
            self.routed[key] = routed
        if key in self.copied:
            x = x.clone()
        if self.inputs is not None:
            self.inputs.setdefault(key, []).append(x)
            if not torch.compiler.is_compiling() and not x.is_inference():
                self.versions[key] = x._version
        return x

    def input_of(self, key: str) -> SiteInput:
        """What a site has read, of a pass that keeps it, in its first call."""
        assert self.inputs is not None, "such a pass keeps what the sites read"
        x, routed = self.inputs[key][0], self.routed.get(key)
        return x if routed is None else RoutedInput(x, routed)

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
        self.routed: Routed | None = None
        """where the sites that are called now are applied; None: everywhere"""
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

    @contextmanager
    def at(self, routed: Routed) -> Iterator[None]:
        """Sites that are called in the meantime read these positions alone."""
        before, self.routed = self.routed, routed
        try:
            yield
        finally:
            self.routed = before


OneMask = SiteMask | Tensor | float | str | None
GivenMask = OneMask | Callable[[Tensor], OneMask]
"""What a user may say of a site: see `ComponentModel.masked`."""


@runtime_checkable
class MaskedSite(Protocol):
    """What is asked of a site."""

    def mask_of_all(self, mask: Tensor | float, x: SiteInput) -> Tensor: ...


class GivenMasks(Pass):
    """A pass under masks that a user has given, over as many calls of the target as it lasts."""

    def __init__(
        self,
        given: Mapping[str, GivenMask],
        sites: Mapping[str, MaskedSite],
        importances: Callable[[str, SiteInput], Tensor],
    ) -> None:
        super().__init__({})
        self.given = given
        self.sites = sites
        self.importances = importances
        """site, its input → g_c of it"""
        self.latest: dict[str, SiteInput] = {}
        """what a site is being called with"""

    def read(self, place: Place, x: Tensor, routed: Routed | None = None) -> Tensor:
        x = super().read(place, x, routed)
        self.latest[self.key(place)] = x if routed is None else RoutedInput(x, routed)
        return x

    def mask_of(self, place: Place) -> SiteMask | None:
        path = self.key(place)
        x = self.latest.pop(path)
        if path not in self.given:
            return None
        mask = self.given[path]
        if callable(mask) and not isinstance(mask, Tensor | SiteMask):
            if isinstance(x, RoutedInput):
                return self._of_rows(path, mask(x.rows), x)
            mask = mask(x)
        return self._mask(path, mask, x)

    def _of_rows(self, path: str, mask: Any, x: RoutedInput) -> SiteMask:
        """From what a user's function gives for the rows that a site reads."""
        if isinstance(mask, str):
            return self._mask(path, mask, x)
        of_rows = self._mask(path, mask, x.rows)
        n = len(x.rows)
        delta, routed = (
            None if values is None else x.routed.spread(values.expand(n)) for values in of_rows[1:]
        )
        m = of_rows.components
        return SiteMask(None if m is None else x.routed.spread(m), delta, routed)

    def _mask(self, path: str, mask: Any, x: SiteInput) -> SiteMask:
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
