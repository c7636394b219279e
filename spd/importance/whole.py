"""Importance functions of a whole model: from what all sites read at a position, or at all of them.

Sites may be parted into chunks, each with a network of its own.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from spd.config import BaseConfig, UserError, nearest
from spd.config.limits import Layers, Width
from spd.importance.functions import SharedMLPImportance


class SiteSize(NamedTuple):
    """What a network needs to know of a site."""

    d_in: int
    C: int


class _Part(NamedTuple):
    """A chunk of sites, all of whose subcomponents one network has."""

    sites: tuple[str, ...]
    reads: tuple[str, ...]


class WholeImportance(nn.Module):
    """From the input vectors of all sites, by path, to the logits of each."""

    def __init__(
        self,
        parts: Sequence[_Part],
        networks: Sequence[nn.Module],
        sizes: Mapping[str, SiteSize],
        *,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.parts, self.sizes, self.normalize = tuple(parts), dict(sizes), normalize

    def forward(self, inputs: Mapping[str, Float[Tensor, "*rows _d"]]) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = {}
        for part, network in zip(self.parts, self.networks, strict=True):
            read = [inputs[path] for path in part.reads]
            vectors = [F.rms_norm(x, x.shape[-1:]) for x in read] if self.normalize else read
            together = network(torch.cat(vectors, dim=-1))
            counts = [self.sizes[path].C for path in part.sites]
            logits |= zip(part.sites, together.split(counts, dim=-1), strict=True)
        return {path: logits[path] for path in self.sizes}


class TransformerImportance(nn.Module):
    """Linear, pre-norm blocks, linear, over the positions of each sequence.

    RMSNorm without weights; attention without biases, with rotary positions; exact GELU; no last norm.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        size: "TransformerImportanceConfig",
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.w_in = _normal(d_in, size.d_model, 2.0, generator)
        self.b_in = nn.Parameter(torch.zeros(size.d_model))
        self.blocks = nn.ModuleList(_Block(size, generator) for _ in range(size.n_layers))
        self.w_out = _normal(size.d_model, d_out, 1.0, generator)
        self.b_out = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """The first of the axes of rows is that of examples, the others are its positions in order."""
        h = x.reshape(x.shape[0], -1, x.shape[-1]) @ self.w_in + self.b_in
        for block in self.blocks:
            h = block(h)
        return (h @ self.w_out + self.b_out).reshape(*x.shape[:-1], -1)


class _Block(nn.Module):
    """h + attention(norm h), then h + mlp(norm h)."""

    frequencies: Tensor

    def __init__(self, size: "TransformerImportanceConfig", generator: torch.Generator) -> None:
        super().__init__()
        d, self.n_heads, self.causal = size.d_model, size.n_heads, size.causal
        self.w_q, self.w_k, self.w_v, self.w_o = (_uniform(d, d, generator) for _ in range(4))
        self.w_up = _normal(d, size.d_ff, 2.0, generator)
        self.b_up = nn.Parameter(torch.zeros(size.d_ff))
        self.w_down = _normal(size.d_ff, d, 1.0, generator)
        self.b_down = nn.Parameter(torch.zeros(d))
        powers = torch.arange(0, d // size.n_heads, 2) / (d // size.n_heads)
        self.register_buffer("frequencies", size.rotary_base**-powers, persistent=False)

    def forward(self, h: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        x = F.rms_norm(h, h.shape[-1:])
        values = x @ self.w_v
        h = h + (values if h.shape[1] == 1 else self._attended(x, values)) @ self.w_o
        x = F.rms_norm(h, h.shape[-1:])
        return h + F.gelu(x @ self.w_up + self.b_up) @ self.w_down + self.b_down

    def _attended(
        self, x: Float[Tensor, "B T d"], values: Float[Tensor, "B T d"]
    ) -> Float[Tensor, "B T d"]:
        """Of every head the mean of its values by attention; where T is 1 these are the values themselves."""
        q, k, v = (self._heads(own) for own in (x @ self.w_q, x @ self.w_k, values))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        attended = F.scaled_dot_product_attention(
            rotated(q, angles), rotated(k, angles), v, is_causal=self.causal
        )
        return attended.transpose(1, 2).flatten(start_dim=2)

    def _heads(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B heads T d_head"]:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def rotated(
    x: Float[Tensor, "B heads T d_head"], angles: Float[Tensor, "T half"]
) -> Float[Tensor, "B heads T d_head"]:
    """Rotary positions: coordinates i and i + d_head/2 turned by the angle of position and i."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _normal(n_in: int, n_out: int, gain: float, generator: torch.Generator) -> nn.Parameter:
    """Of variance gain / n_in."""
    return nn.Parameter(
        torch.empty(n_in, n_out).normal_(std=math.sqrt(gain / n_in), generator=generator)
    )


def _uniform(n_in: int, n_out: int, generator: torch.Generator) -> nn.Parameter:
    bound = 1 / math.sqrt(n_in)
    return nn.Parameter(torch.empty(n_in, n_out).uniform_(-bound, bound, generator=generator))


def check_together(name: str, shapes: Mapping[str, torch.Size], n_examples: int) -> None:
    """`UserError` unless all sites have the same rows, the first axis of which is that of examples.

    `shapes` are those of rows, by site.
    """
    (first, expected), *others = shapes.items()
    for path, shape in others:
        if shape != expected:
            raise UserError(
                f"importance: {name} joins what all sites read at a position, and {first!r} has rows of the"
                f" shape {tuple(expected)}, but {path!r} of {tuple(shape)}; leave one of them out, or"
                " choose functions of single sites (mlp, shared_mlp, vector_mlp)"
            )
    if expected[:1] != (n_examples,):
        raise UserError(
            f"importance: {name} needs the examples of a batch on the first axis of what a site reads, and"
            f" of {n_examples} examples {first!r} has rows of the shape {tuple(expected)}; choose functions"
            " of single sites (mlp, shared_mlp, vector_mlp)"
        )


# --- the specs -------------------------------------------------------------------------------------


class Chunk(BaseConfig):
    """Sites whose subcomponents one network has; patterns (`fnmatch`) of module paths."""

    sites: tuple[str, ...] = Field(min_length=1)
    reads: tuple[str, ...] | None = Field(default=None, min_length=1)
    """sites whose inputs it reads; null: its own"""


class WholeImportanceSpec(BaseConfig):
    """An importance function of all sites as a configuration names it, by the field `type` of its class."""

    chunks: tuple[Chunk, ...] = ()
    """which sites share a network; none given: all of them"""

    def build(
        self, sizes: Mapping[str, SiteSize], *, generator: torch.Generator
    ) -> WholeImportance:
        """For sites by path. `UserError` where the chunks do not have every site once."""
        parts = parts_of(self.chunks, list(sizes))
        networks = [self.network(*_widths(part, sizes), generator=generator) for part in parts]
        return WholeImportance(parts, networks, sizes, normalize=self.normalized)

    def n_parameters(self, sizes: Mapping[str, SiteSize]) -> int:
        """How many of them what is built will have."""
        parts = parts_of(self.chunks, list(sizes))
        return sum(self.size_of(*_widths(part, sizes)) for part in parts)

    @property
    def normalized(self) -> bool:
        """Whether each site's input is divided by its root mean square before they are joined."""
        raise NotImplementedError

    def network(self, d_in: int, d_out: int, *, generator: torch.Generator) -> nn.Module:
        """From joined inputs `[..., d_in]` to the logits `[..., d_out]` of all subcomponents of a chunk."""
        raise NotImplementedError

    def size_of(self, d_in: int, d_out: int) -> int:
        """The number of parameters of such a network."""
        raise NotImplementedError


class GlobalMLPImportanceConfig(WholeImportanceSpec):
    """One MLP of the joined inputs of all sites: GELU layers → a scalar for each subcomponent."""

    type: Literal["global_mlp"] = "global_mlp"
    hidden_widths: tuple[Width, ...] = Field(default=(128,), min_length=1, max_length=100)
    normalize: bool = False
    """divide what each site reads by its root mean square first"""

    @property
    def normalized(self) -> bool:
        return self.normalize

    def network(self, d_in: int, d_out: int, *, generator: torch.Generator) -> nn.Module:
        return SharedMLPImportance(
            d_out, d_in, self.hidden_widths, normalize=False, generator=generator
        )

    def size_of(self, d_in: int, d_out: int) -> int:
        widths = [d_in, *self.hidden_widths, d_out]
        return sum((n_in + 1) * n_out for n_in, n_out in pairwise(widths))


class TransformerImportanceConfig(WholeImportanceSpec):
    """One transformer over the positions of a sequence, which reads the normalised inputs of all sites."""

    type: Literal["transformer"] = "transformer"
    d_model: Width
    n_layers: Layers
    n_heads: Width
    d_ff: Width
    causal: bool = False
    """whether a position sees itself and those before it alone"""
    rotary_base: float = Field(default=10_000.0, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model is {self.d_model} and n_heads {self.n_heads}; each head needs the same even"
                " number of entries"
            )
        return self

    @property
    def normalized(self) -> bool:
        return True

    def network(self, d_in: int, d_out: int, *, generator: torch.Generator) -> nn.Module:
        return TransformerImportance(d_in, d_out, self, generator=generator)

    def size_of(self, d_in: int, d_out: int) -> int:
        d, d_ff = self.d_model, self.d_ff
        block = 4 * d * d + (d + 1) * d_ff + (d_ff + 1) * d
        return (d_in + 1) * d + self.n_layers * block + (d + 1) * d_out


def _widths(part: _Part, sizes: Mapping[str, SiteSize]) -> tuple[int, int]:
    return sum(sizes[p].d_in for p in part.reads), sum(sizes[p].C for p in part.sites)


def parts_of(chunks: Sequence[Chunk], paths: Sequence[str]) -> list[_Part]:
    """The chunks with the sites that their patterns name, each site in one of them."""
    if not chunks:
        return [_Part(tuple(paths), tuple(paths))]
    parts, chunk_of = [], {}
    for index, chunk in enumerate(chunks):
        place = f"importance.chunks.{index}"
        sites = _matching(chunk.sites, paths, f"{place}.sites")
        for path in sites:
            if path in chunk_of:
                raise UserError(
                    f"{place}.sites: {path!r} is in chunk {chunk_of[path]} already; a site has one chunk"
                )
            chunk_of[path] = index
        reads = sites if chunk.reads is None else _matching(chunk.reads, paths, f"{place}.reads")
        parts.append(_Part(sites, reads))
    missing = [path for path in paths if path not in chunk_of]
    if missing:
        raise UserError(f"importance.chunks: {missing[0]!r} is in no chunk; every site needs one")
    return parts


def _matching(patterns: Sequence[str], paths: Sequence[str], place: str) -> tuple[str, ...]:
    """In the order of the paths."""
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise UserError(
                f"{place}: {pattern!r} matches no site{nearest(pattern, paths)} (sites: {', '.join(paths)})"
            )
    return tuple(p for p in paths if any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns))
