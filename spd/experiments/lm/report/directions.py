"""What a subcomponent reads and writes in terms of tokens, where its site stands at the residual stream."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spd.component_model import ComponentModel, Site
from spd.components import input_output_weight
from spd.masks import RoutedInput, SiteInput

NOT_FROM_STREAM = (
    "its input is not the residual stream, so token embeddings do not tell what it reads"
)
NOT_TO_STREAM = (
    "its output is not added to the residual stream, so logits do not tell what it writes"
)
NO_UNEMBEDDING = "the model has no unembedding"


class Place(NamedTuple):
    """How the matrix of a site stands to the token embedding and to the unembedding."""

    reads: str
    """`tokens`: it is the token embedding; `stream`: its input is a normalised residual stream; else
    why tokens do not say what it reads"""
    writes: str
    """`stream`: its output is added to the residual stream; `logits`: it is the output itself; else
    why tokens do not say what it writes"""


class Surroundings(NamedTuple):
    """What one pass of the target shows about its sites."""

    places: dict[str, Place]
    norms: dict[str, nn.Module]
    """of a site that reads the residual stream: the layer that normalises it for the site"""
    embedding: Float[Tensor, "vocab width"]
    unembedding: Float[Tensor, "width vocab"] | None
    """what a change of the final residual stream does to the logits: with the last norm's gain"""

    @property
    def n_vocab(self) -> int:
        """The number of token ids."""
        n_out = 0 if self.unembedding is None else self.unembedding.shape[1]
        return max(len(self.embedding), n_out)


class Extremes(NamedTuple):
    """The n tokens with the largest values and the n with the smallest, for each subcomponent."""

    highest: Int[Tensor, "C n"]
    highest_values: Float[Tensor, "C n"]
    lowest: Int[Tensor, "C n"]
    lowest_values: Float[Tensor, "C n"]


@torch.no_grad()
def look_around(
    model: ComponentModel, batch: Int[Tensor, "batch position"], unembed: str | None
) -> Surroundings | None:
    """Find by one pass what the sites read and write; None if no module embeds the tokens.

    A site reads the residual stream if its input is, number by number, what a normalisation layer has
    put out and has the stream's width. It writes to the stream if its output has that width and its
    input is nothing normalised (as that of queries, keys and values is).
    """
    embeddings: list[nn.Module] = []
    normalised: list[tuple[nn.Module, Tensor]] = []
    before_logits: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module is head:
            before_logits.append(inputs[0])
        elif not isinstance(module, nn.Embedding):
            normalised.append((module, output))
        elif inputs[0].shape == batch.shape and torch.equal(inputs[0], batch):
            embeddings.append(module)

    head = None if unembed is None else model.target.get_submodule(unembed)
    watched = [m for m in model.target.modules() if m is head or _embeds_or_normalises(m)]
    handles = [module.register_forward_hook(look) for module in watched]
    try:
        site_inputs = model.target_forward(batch).site_inputs
    finally:
        for handle in handles:
            handle.remove()
    if not embeddings:
        return None
    embedding = input_output_weight(embeddings[0])
    width = embedding.shape[1]
    places, norms = {}, {}
    for path, site in model.sites.items():
        d_in, d_out = site.target_weight.shape
        before = [norm for norm, output in normalised if _same(site_inputs[path], output)]
        if site.original in embeddings:
            reads = "tokens"
        elif before and d_in == width:
            reads, norms[path] = "stream", before[0]
        else:
            reads = NOT_FROM_STREAM
        if path == unembed:
            writes = "logits"
        elif head is None:
            writes = NO_UNEMBEDDING
        else:
            writes = "stream" if not before and d_out == width else NOT_TO_STREAM
        places[path] = Place(reads, writes)
    if head is None:
        return Surroundings(places, norms, embedding, None)
    unembedding = head.target_weight if isinstance(head, Site) else input_output_weight(head)
    for norm, output in normalised:
        if before_logits and _same(output, before_logits[0]):
            unembedding = _gain(norm, output)[:, None] * unembedding
            break
    return Surroundings(places, norms, embedding, unembedding)


def _embeds_or_normalises(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()


def _same(x: SiteInput, y: Tensor) -> bool:
    if isinstance(x, RoutedInput):
        rows = y.flatten(0, -2)
        own = len(rows) == x.routed.n_positions and len(x.rows) > 0
        return own and _same(x.rows, rows[x.routed.positions])
    return x.shape == y.shape and torch.equal(x, y)


def _gain(norm: nn.Module, like: Float[Tensor, "batch position width"]) -> Float[Tensor, " width"]:
    """What a normalisation layer multiplies each feature by, whatever it calls it and wherever it is.

    Of an input of mean 0 and mean square 1 the layer changes nothing but by its gain and its bias.
    """
    ones = torch.ones_like(like[:1, :1])
    ones[..., 1::2] = -1.0
    return ((norm(ones) - norm(-ones)) / 2 * ones).flatten()


def token_extremes(
    scores: Float[Tensor, "C vocab"], n: int, readable: Bool[Tensor, " vocab"]
) -> Extremes:
    """The extremes of every subcomponent among the tokens that are readable."""
    (tokens,) = readable.nonzero(as_tuple=True)
    scores, n = scores[:, tokens], min(n, len(tokens))
    highest, lowest = scores.topk(n, dim=1), scores.topk(n, dim=1, largest=False)
    return Extremes(tokens[highest.indices], highest.values, tokens[lowest.indices], lowest.values)


@torch.no_grad()
def token_directions(
    model: ComponentModel,
    path: str,
    columns: Int[Tensor, " some"],
    around: Surroundings,
    *,
    n: int,
    sign: Float[Tensor, " some"],
    readable: Bool[Tensor, " vocab"] | None = None,
) -> dict[str, Extremes]:
    """`reads`: the inner activation if nothing but the token's embedding were in the stream.

    `writes`: what U_c adds to each token's logit, for an inner activation of 1. Both multiplied by
    `sign`; what makes no sense for the site (see `Place`) is left out. `readable`: which tokens may be
    named; None: all.
    """
    subcomponents, place = model.sites[path].subcomponents, around.places[path]
    V, U = subcomponents.V[:, columns], subcomponents.U[columns]
    signs = sign.to(V.device)[:, None]
    if readable is None:
        readable = torch.ones(around.n_vocab, dtype=torch.bool)
    scores = {}
    if place.reads == "tokens":
        scores["reads"] = V.mT
    elif place.reads == "stream":
        scores["reads"] = (around.norms[path](around.embedding) @ V).mT
    if place.writes == "logits":
        scores["writes"] = U
    elif place.writes == "stream" and around.unembedding is not None:
        scores["writes"] = U @ around.unembedding
    readable = readable.to(V.device)
    return {
        name: token_extremes(x * signs, n, readable[: x.shape[1]]) for name, x in scores.items()
    }
