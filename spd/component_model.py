"""A frozen target whose chosen matrices can be replaced, call by call, by masked subcomponents."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd.components import (
    EmbeddingSubcomponents,
    LinearSubcomponents,
    TiedSubcomponents,
    init_subcomponents_,
    input_output_weight,
    resolve_sites,
)
from spd.config import UserError
from spd.importance import (
    CausalImportances,
    Importance,
    ImportanceConfig,
    InputImportance,
    LowerLeak,
)
from spd.noise import derive_seed

Mask = Tensor | Callable[[], Tensor]
"""`[..., C]`, or a function that makes it, and makes it anew in the backward pass: less is stored"""


class TargetOutput(NamedTuple):
    """What the unchanged target computes on a batch."""

    output: Tensor
    """the target's output"""
    site_inputs: dict[str, Tensor]
    """what it feeds to each site: `[..., d_in]`, or token ids for an embedding"""


class Site(nn.Module):
    """Stands in the target in place of one module, for good; computes exactly what that module did.

    Within `ComponentModel.forward` it may instead use its subcomponents under a mask. `weight` and
    `bias` are the original's, for target code that reads them directly.
    """

    def __init__(
        self,
        original: nn.Module,
        subcomponents: LinearSubcomponents | EmbeddingSubcomponents | TiedSubcomponents,
        importance: Importance,
    ) -> None:
        super().__init__()
        self.original = original
        self.subcomponents = subcomponents
        self.importance = importance
        self.replaced = False
        self.mask: Mask | None = None
        self.kept_inputs: list[Tensor] | None = None

    @property
    def C(self) -> int:
        return self.subcomponents.V.shape[1]

    @property
    def weight(self) -> Tensor:
        return self.original.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.original, "bias", None)

    @property
    def target_weight(self) -> Float[Tensor, "d_in d_out"]:
        """The original matrix, mapping inputs to outputs from the left: `x @ target_weight`."""
        return input_output_weight(self.original)

    def importance_logits(self, x: Tensor) -> Float[Tensor, "*rows C"]:
        """What the hard sigmoids are applied to, from what the target feeds to this site.

        The input vector of a token id is the row that the target's embedding has for it.
        """
        if x.is_floating_point():
            x = x.to(self.subcomponents.V.dtype)  # from lower precision, where the target ran in it
        if not isinstance(self.importance, InputImportance):
            return self.importance(self.subcomponents.acts(x))
        return self.importance(x if x.is_floating_point() else self.original(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.kept_inputs is not None:
            self.kept_inputs.append(x)
        if not self.replaced:
            return self.original(x)
        out = self._masked(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _masked(self, x: Tensor) -> Tensor:
        if self.mask is None or isinstance(self.mask, Tensor):
            return self.subcomponents(x, self.mask)
        make_mask = self.mask  # since by the backward pass the site has another

        def run(x: Tensor) -> Tensor:
            return self.subcomponents(x, make_mask())

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


class ComponentModel(nn.Module):
    """The target with a `Site` in place of every decomposed module. Changes `target` in place.

    Trainable are only `V`, `U` and the importance functions: `subcomponent_parameters()`. With
    `autocast` the target and its replaced sites run in that type where torch deems it safe; outputs and
    importances are float32 nevertheless.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Mapping[str, int],
        importance: ImportanceConfig,
        *,
        tied_sites: Sequence[tuple[str, str]] = (),
        lower_leak: LowerLeak = "both",
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        C_of = resolve_sites(target, sites)
        target.requires_grad_(False).eval()
        self.target = target
        self.lower_leak: LowerLeak = lower_leak
        source_of = _check_ties(target, C_of, tied_sites)
        self.sites: dict[str, Site] = {}
        for path in sorted(C_of, key=lambda path: path in source_of):  # sources before their ties
            original = target.get_submodule(path)
            generator = torch.Generator().manual_seed(derive_seed("init", seed, path))
            tie = self.sites[source_of[path]] if path in source_of else None
            subcomponents = _make_subcomponents(original, C_of[path], tie, generator)
            weight = input_output_weight(original)
            d_in = weight.shape[1 if isinstance(original, nn.Embedding) else 0]
            function = importance.build(C_of[path], d_in, generator=generator)
            site = Site(original, subcomponents, function.to(weight.device))
            target.set_submodule(path, site)
            self.sites[path] = site
        self.sites = {path: self.sites[path] for path in C_of}

    def subcomponent_parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of everything that is trained, each once."""
        return {
            f"{path}.{name}": parameter
            for path, site in self.sites.items()
            for part in ("subcomponents", "importance")
            for name, parameter in site.get_submodule(part).named_parameters(prefix=part)
        }

    def load_subcomponents(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved parameters in; names and shapes must be exactly those of this model."""
        own = self.subcomponent_parameters()
        if own.keys() != tensors.keys():
            raise ValueError(f"parameters differ: {sorted(own.keys() ^ tensors.keys())}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != tensors[name].shape:
                    raise ValueError(
                        f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])

    def target_forward(self, batch: Tensor) -> TargetOutput:
        """Run the unchanged target, without gradient, and keep what it feeds to each site."""
        kept: dict[str, list[Tensor]] = {path: [] for path in self.sites}
        for path, site in self.sites.items():
            site.kept_inputs = kept[path]
        try:
            with torch.no_grad():
                output = self._run_target(batch)
        finally:
            for site in self.sites.values():
                site.kept_inputs = None
        for path, inputs in kept.items():
            if len(inputs) != 1:
                raise UserError(
                    f"sites: the target calls {path!r} {len(inputs)} times in one pass; a site must"
                    " be called once"
                )
        return TargetOutput(output, {path: inputs[0] for path, inputs in kept.items()})

    def forward(self, batch: Tensor, masks: Mapping[str, Mask | None] | None = None) -> Tensor:
        """Run with the sites named in `masks` replaced by their subcomponents; `None`: all on.

        `masks` itself `None` replaces every site, all subcomponents on.
        """
        chosen = dict.fromkeys(self.sites) if masks is None else masks
        unknown = [path for path in chosen if path not in self.sites]
        assert not unknown, f"masks for {unknown}, which are no sites"
        for path, mask in chosen.items():
            self.sites[path].replaced = True
            self.sites[path].mask = mask
        try:
            return self._run_target(batch)
        finally:
            for path in chosen:
                self.sites[path].replaced = False
                self.sites[path].mask = None

    def _run_target(self, batch: Tensor) -> Tensor:
        if self.autocast is None:
            return self.target(batch)
        with torch.autocast(batch.device.type, self.autocast):
            return self.target(batch).float()

    def causal_importances(self, site_inputs: Mapping[str, Tensor]) -> CausalImportances:
        """g_c(x) of every site from what the *target* feeds to it.

        Gradients reach V through h_c, if the importance functions read h_c.
        """
        return CausalImportances.of_logits(self.importance_logits(site_inputs), self.lower_leak)

    def importance_logits(self, site_inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the hard sigmoids are applied to, for every site."""
        return {
            path: site.importance_logits(site_inputs[path]) for path, site in self.sites.items()
        }


def _check_ties(
    target: nn.Module, C_of: Mapping[str, int], tied_sites: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Tied path → source path, after checking that the target's matrices are transposes indeed."""
    source_of: dict[str, str] = {}
    for source, tied in tied_sites:
        for path in (source, tied):
            if path not in C_of:
                raise UserError(f"tied_sites: {path!r} is no site (sites: {', '.join(C_of)})")
        if C_of[source] != C_of[tied]:
            raise UserError(
                f"tied_sites: {source!r} has C = {C_of[source]} and {tied!r} has {C_of[tied]};"
                " tied sites share their subcomponents, so C must be equal"
            )
        weights = [input_output_weight(target.get_submodule(path)) for path in (source, tied)]
        if weights[0].shape != weights[1].mT.shape or not torch.equal(weights[0], weights[1].mT):
            raise UserError(
                f"tied_sites: the weight of {tied!r} is not the transpose of that of {source!r}"
            )
        if tied in source_of or source in source_of:
            raise UserError(f"tied_sites: {tied!r} or {source!r} is tied twice")
        if isinstance(target.get_submodule(tied), nn.Embedding):
            raise UserError(
                f"tied_sites: {tied!r} is an embedding, which cannot share the subcomponents of another"
                " site; name it first"
            )
        source_of[tied] = source
    return source_of


def _make_subcomponents(
    original: nn.Module, C: int, tie: Site | None, generator: torch.Generator
) -> LinearSubcomponents | EmbeddingSubcomponents | TiedSubcomponents:
    if tie is not None:
        assert not isinstance(tie.subcomponents, TiedSubcomponents), "its source is no tied site"
        return TiedSubcomponents(tie.subcomponents)
    weight = input_output_weight(original)
    kind = EmbeddingSubcomponents if isinstance(original, nn.Embedding) else LinearSubcomponents
    subcomponents = kind(weight.shape[0], weight.shape[1], C)
    init_subcomponents_(subcomponents.V, subcomponents.U, weight.float().cpu(), generator=generator)
    return subcomponents.to(weight.device)
