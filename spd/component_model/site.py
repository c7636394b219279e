"""What stands in the target in place of a decomposed module."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd.components import LinearSubcomponents, input_output_weight
from spd.config import UserError
from spd.importance import Importance, InputImportance
from spd.masks import Place, RoutedInput, Running, SiteInput, SiteMask, as_site_mask


class Site(nn.Module):
    """Stands in the target in place of one module, for good; computes exactly what that module did.

    In a pass that has a mask for it, it uses its subcomponents instead. `weight`, `bias` and numbers such
    as `num_embeddings` are the original's, for target code that reads them directly; so is its
    `state_dict`, so that the target is saved, and loaded into, as if it had never been decomposed.
    """

    def __init__(
        self,
        original: nn.Module,
        subcomponents: LinearSubcomponents,
        importance: Importance | None,
        place: Place,
        running: Running,
    ) -> None:
        super().__init__()
        self.original = original
        self.subcomponents = subcomponents
        self.importance = importance
        """None: that of all sites together has the importances of this one"""
        self.place = place
        self.running = running
        for name, value in vars(original).items():
            if isinstance(value, int | float | str) and not hasattr(self, name):
                setattr(self, name, value)
        self._register_load_state_dict_pre_hook(_as_original, with_module=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The original's."""
        return self.original.state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        d_in, d_out = self.subcomponents.V.shape[0], self.subcomponents.U.shape[1]
        return f"d_in={d_in}, d_out={d_out}, C={self.C}"

    @property
    def C(self) -> int:
        return self.subcomponents.V.shape[1]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.original.weight  # pyright: ignore[reportAssignmentType]
        current = self.running.current
        return weight if current is None else current.weight_of(self.place, weight)

    @property
    def dtype(self) -> torch.dtype:
        """In which the original computes."""
        return self.original.weight.dtype  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.original, "bias", None)

    @property
    def target_weight(self) -> Float[Tensor, "d_in d_out"]:
        """The original matrix, mapping inputs to outputs from the left: `x @ target_weight`."""
        return input_output_weight(self.original)

    def rows(self, x: SiteInput) -> torch.Size:
        """The shape of what a site has for each of its positions, such as an importance, without C."""
        if isinstance(x, RoutedInput):
            return torch.Size((x.routed.n_positions,))
        return self.subcomponents.rows(x)

    def acts(self, x: SiteInput) -> Float[Tensor, "*rows C"]:
        """h_c(x); 0 where the site is not applied."""
        if isinstance(x, RoutedInput):
            return x.routed.spread(self.subcomponents.acts(x.rows))
        return self.subcomponents.acts(x)

    def own_importance(self) -> Importance:
        """Its importance function; there has to be one."""
        assert self.importance is not None, "a function of all sites has the importances"
        return self.importance

    def importance_logits(self, x: SiteInput) -> Float[Tensor, "*rows C"]:
        """What the hard sigmoids are applied to, from what the target feeds to this site.

        Where the site is not applied it is 0, whose sigmoids are 0.
        """
        function = self.own_importance()
        if isinstance(x, RoutedInput):
            return x.routed.spread(self.importance_logits(x.rows))
        if isinstance(function, InputImportance):
            return function(self.vectors(x))
        return function(self.subcomponents.acts(self._in_own_type(x)))

    def vectors(self, x: Tensor) -> Float[Tensor, "*rows d_in"]:
        """Its input vectors; that of a token id is the row that the target's embedding has for it."""
        if self.subcomponents.reads_ids:
            return self.original(x).to(self.subcomponents.V.dtype)
        return self._in_own_type(x)

    def _in_own_type(self, x: Tensor) -> Tensor:
        """From lower precision, where the target ran in it."""
        return x if self.subcomponents.reads_ids else x.to(self.subcomponents.V.dtype)

    def forward(self, x: Tensor) -> Tensor:
        current = self.running.current
        if current is None:
            return self.original(x)
        routed = self.running.routed
        x = current.read(self.place, x, routed)
        mask = current.mask_of(self.place)
        if mask is None:
            return self.original(x)
        if isinstance(mask, SiteMask | Tensor):
            return self.masked(x, as_site_mask(mask, routed))
        make_mask = mask

        def run(x: Tensor) -> Tensor:
            return self.masked(x, as_site_mask(make_mask(), routed))

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)

    def mask_of_all(self, mask: Tensor | float, x: SiteInput) -> Float[Tensor, "*rows C"]:
        """A mask that may be the same for many inputs, for each of the inputs `x`."""
        V = self.subcomponents.V
        wanted = (*self.rows(x), self.C)
        tensor = torch.as_tensor(mask, dtype=V.dtype, device=V.device)
        try:
            return tensor.expand(wanted)
        except RuntimeError:
            raise UserError(
                f"masks: that of {self.place.path!r} has the shape {tuple(tensor.shape)}; one that"
                f" broadcasts to {wanted} is needed (the last axis is that of the {self.C} subcomponents)"
            ) from None

    def masked(self, x: Tensor, mask: SiteMask) -> Tensor:
        """What the site gives out where it is replaced, in the type in which the target computes."""
        read = x
        own, given = self.subcomponents.V.dtype, self.dtype
        mixed = given != own and not torch.is_autocast_enabled(x.device.type)
        if mixed and not self.subcomponents.reads_ids:
            read = x.to(own)
        h = self.subcomponents.acts(read)
        if mask.components is not None and not torch.compiler.is_compiling():
            self._check_rows(h.shape, mask.components.shape)
        out = self.subcomponents.write(h, mask.components)
        if mask.delta is not None:
            remainder = self._original_without_bias(read) - self.subcomponents.write(h, None)
            out = out + mask.delta.to(out.dtype)[..., None] * remainder
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        if mixed:
            out = out.to(given)
        if mask.routed is None:
            return out
        return torch.where(mask.routed[..., None], out, self.original(x))

    def _check_rows(self, read: torch.Size, masked: torch.Size) -> None:
        """`UserError` where a mask is for another number of rows than the site reads."""
        pairs = zip(reversed(read), reversed(masked), strict=False)
        if any(n != m and 1 not in (n, m) for n, m in pairs):
            raise UserError(
                f"masks: {self.place.path!r} reads {tuple(read[:-1])} rows in a masked pass, for masks of"
                f" {tuple(masked[:-1])}; if the target chooses these rows by what it computes, it cannot"
                " be a site"
            )

    def _original_without_bias(self, x: Tensor) -> Tensor:
        if self.subcomponents.reads_ids:
            return self.original(x)
        return x @ self.target_weight.to(x.dtype)


def _as_original(site: Site, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Make of the state of what a site stands for that of the site, whose own part stays as it is."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}original.{key.removeprefix(prefix)}"] = state.pop(key)
    for part, module in (("subcomponents", site.subcomponents), ("importance", site.importance)):
        for name, own in nn.Module.state_dict(module).items() if module is not None else ():
            state[f"{prefix}{part}.{name}"] = own
