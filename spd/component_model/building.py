"""What the sites of a model are made of, and what is checked before."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spd.component_model.site import Site
from spd.components import (
    LinearSubcomponents,
    TiedSubcomponents,
    init_subcomponents_,
    input_output_weight,
    subcomponents_of,
)
from spd.config import UserError
from spd.config.memory import NUMBER, require_memory
from spd.importance import ImportanceConfig, SiteSize, WholeImportanceSpec


def check_ties(
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


def width_of_input(module: nn.Module) -> int:
    """d_in of the vectors that an importance function reads, of an embedding the rows that it gives out."""
    return input_output_weight(module).shape[1 if isinstance(module, nn.Embedding) else 0]


def sizes_of(sites: Mapping[str, Site]) -> dict[str, SiteSize]:
    return {path: SiteSize(width_of_input(site.original), site.C) for path, site in sites.items()}


def check_size(target: nn.Module, C_of: Mapping[str, int], importance: ImportanceConfig) -> None:
    """`UserError` where the parameters of a site would not fit into memory."""
    of_one = None if isinstance(importance, WholeImportanceSpec) else importance.n_parameters
    weights: dict[str, Tensor] = {}
    for path, C in C_of.items():
        weight = target.get_submodule(path).weight
        assert isinstance(weight, Tensor), "checked before"
        weights[path] = weight
        n = C * sum(weight.shape) + (0 if of_one is None else of_one(C, min(weight.shape)))
        what = f"sites: {path!r} with C = {C} has {n} parameters, with those of its importances, which need"
        require_memory(NUMBER * n, what, weight.device)
    if isinstance(importance, WholeImportanceSpec):
        least = {path: SiteSize(min(w.shape), C_of[path]) for path, w in weights.items()}
        n = importance.n_parameters(least)
        what = f"importance: {importance.type} has {n} parameters, which need"  # pyright: ignore
        require_memory(NUMBER * n, what, next(iter(weights.values())).device)


def make_subcomponents(
    original: nn.Module, C: int, tie: Site | None, generator: torch.Generator
) -> LinearSubcomponents:
    if tie is not None:
        assert not isinstance(tie.subcomponents, TiedSubcomponents), "its source is no tied site"
        return TiedSubcomponents(tie.subcomponents)
    weight = input_output_weight(original)
    subcomponents = subcomponents_of(original, C)
    init_subcomponents_(subcomponents.V, subcomponents.U, weight.float().cpu(), generator=generator)
    return subcomponents.to(weight.device)
