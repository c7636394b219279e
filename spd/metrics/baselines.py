"""What a decomposition has to beat: parts of a matrix that nobody trained, as many of them on at a time.

*Singular vectors* W = Σ_k σ_k v_k u_kᵀ, and *neurons*, the coordinates of the wider side of W (of an
embedding those that it writes). For each input those are on that do most there: the largest
‖x V_c‖ ‖U_c‖, what a part adds to the output of its matrix. How many are on is what the importances have,
summed over the inputs, so that both have the same L0.
"""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.components import subcomponents_of
from spd.masks import ROUNDING_THRESHOLD, SiteInput

NAMES = {"svd": "singular vectors", "neurons": "neurons"}
"""key of a baseline → what it is called"""
COMPARED = ("stochastic", "importance_masked", "rounded")
"""the rungs that stand beside those of the baselines, besides the adversary's"""


class Parts(NamedTuple):
    """A matrix as a sum of rank-one matrices: W = V U."""

    V: Float[Tensor, "d_in C"]
    U: Float[Tensor, "C d_out"]


def singular_vectors(weight: Float[Tensor, "d_in d_out"], embeds: bool = False) -> Parts:
    """V = left singular vectors times singular values, U = right ones."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return Parts(left * values, right)


def neurons(weight: Float[Tensor, "d_in d_out"], embeds: bool = False) -> Parts:
    """The coordinates of the wider side; of an embedding those of its output."""
    d_in, d_out = weight.shape
    if embeds or d_out >= d_in:
        return Parts(weight, torch.eye(d_out, dtype=weight.dtype, device=weight.device))
    return Parts(torch.eye(d_in, dtype=weight.dtype, device=weight.device), weight)


MAKERS: Mapping[str, Callable[[Tensor, bool], Parts]] = {
    "svd": singular_vectors,
    "neurons": neurons,
}


class Baseline(NamedTuple):
    """The same target with other subcomponents, and which of them are on, as importances of 0 and 1."""

    model: ComponentModel
    g: dict[str, Float[Tensor, "*rows _C"]]
    """as many on as importances are above 0.01"""
    g_rounded: dict[str, Float[Tensor, "*rows _C"]]
    """as many as are above 0.5"""


@torch.no_grad()
def baseline(
    name: str,
    model: ComponentModel,
    site_inputs: Mapping[str, SiteInput],
    g: Mapping[str, Float[Tensor, "*rows _C"]],
    *,
    on_from: float,
    kept: Bool[Tensor, " n"] | None = None,
) -> Baseline:
    """That of a name for a model whose sites read these inputs; the model itself stays as it is.

    Only the rows that are `kept` are counted, where some are not to count.
    """
    other = with_parts(model, MAKERS[name])
    on, rounded = {}, {}
    for path, own in g.items():
        site = other.sites[path]
        effects = site.acts(site_inputs[path]).abs() * site.subcomponents.U.norm(dim=1)
        on[path] = strongest(effects, own > on_from, kept)
        rounded[path] = strongest(effects, own > ROUNDING_THRESHOLD, kept)
    return Baseline(other, on, rounded)


def strongest(
    effects: Float[Tensor, "*rows C"],
    like: Bool[Tensor, "*rows _D"],
    kept: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, "*rows C"]:
    """1 for the largest effects, as many over all rows as are on in `like`; 0 where there is none.

    Rows that are not `kept` have no say in how many, and have on what exceeds the least of the others.
    """
    flat, on = effects.flatten(end_dim=-2), like.flatten(end_dim=-2)
    counts = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    if kept is not None and len(kept) == len(on):
        counts = kept
    n = min(int(on[counts].sum()), flat[counts].numel())
    if n == 0:
        return torch.zeros_like(effects)
    largest = flat[counts].flatten().topk(n)  # exactly so many, whatever is equal
    chosen = torch.zeros_like(flat[counts]).flatten()
    chosen[largest.indices] = 1.0
    mask = (flat > largest.values[-1]).to(flat.dtype)
    mask[counts] = chosen.reshape(-1, flat.shape[-1])
    return (mask * (flat > 0)).reshape(effects.shape)


def with_parts(model: ComponentModel, make: Callable[[Tensor, bool], Parts]) -> ComponentModel:
    """A copy on the same weights whose sites have other subcomponents."""
    shared = [*model.parameters(), *model.buffers()]
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for site in other.sites.values():
        embeds = isinstance(site.original, nn.Embedding)
        parts = make(site.target_weight.detach().float(), embeds)
        own = subcomponents_of(site.original, parts.V.shape[1])
        own.V, own.U = (nn.Parameter(part, requires_grad=False) for part in parts)
        site.subcomponents = own
    return other


def against(values: Mapping[str, float]) -> str:
    """A sentence on whether a decomposition beats its baselines, of figures by their keys; or nothing."""
    lost: dict[str, list[str]] = {}
    known = False
    for key, words in NAMES.items():
        prefix = f"ladder_{key}/"
        for rung in (k.removeprefix(prefix) for k in values if k.startswith(prefix)):
            known = True
            own = values.get(f"ladder/{rung}")
            if own is not None and not own < values[f"{prefix}{rung}"]:
                lost.setdefault(words, []).append(rung.replace("_", " "))
    how = "at equal L0, those chosen for each input that do most there"
    if not known:
        return ""
    if not lost:
        return f"It beats {' and '.join(NAMES.values())} of W under all of these masks, {how}"
    losses = " and ".join(f"{words} of W ({', '.join(rungs)})" for words, rungs in lost.items())
    return f"It does not beat {losses}, {how}"
