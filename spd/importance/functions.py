"""Importance functions of one site: from what it reads to the logits of its subcomponents."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spd.config import BaseConfig
from spd.config.limits import Width
from spd.kernels import scalar_mlps


class Importance(nn.Module):
    """Base of all functions: from the inner activations h `[…, C]` to logits of the same shape."""


class InputImportance(Importance):
    """Base of those that see the whole input vectors of a site instead, `[…, d_in]`."""


class MLPImportance(Importance):
    """For each subcomponent c alone: Σ_k mlp_out_ck · gelu(mlp_in_ck h_c + in_bias_ck) + out_bias_c."""

    def __init__(self, C: int, n_hidden: int, *, generator: torch.Generator) -> None:
        super().__init__()
        shape = (C, n_hidden)
        self.mlp_in = nn.Parameter(torch.randn(shape, generator=generator) * math.sqrt(2))
        self.in_bias = nn.Parameter(torch.zeros(shape))
        self.mlp_out = nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(n_hidden))
        self.out_bias = nn.Parameter(torch.zeros(C))

    def forward(self, h: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        rows = h.reshape(-1, h.shape[-1])
        out = scalar_mlps(rows, self.mlp_in, self.in_bias, self.mlp_out)
        return out.reshape(h.shape) + self.out_bias


class AffineImportance(Importance):
    """weight_c · h_c + bias_c."""

    def __init__(self, C: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, generator=generator))
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, h: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        return h * self.weight + self.bias


class SharedMLPImportance(InputImportance):
    """All C scalars from one MLP of the site's input vector: x → gelu(x W_1 + b_1) → … → W_n + b_n.

    Initialised by the rule of `MLPImportance`, there with one input per neuron: hidden weights have
    the standard deviation √(2 / inputs), the last ones √(1 / inputs), biases are 0.
    """

    def __init__(
        self,
        C: int,
        d_in: int,
        hidden_widths: Sequence[int],
        *,
        normalize: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        widths = [d_in, *hidden_widths, C]
        gains = [2.0] * len(hidden_widths) + [1.0]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out, gain in zip(widths[:-1], widths[1:], gains, strict=True):
            drawn = torch.randn(n_in, n_out, generator=generator)
            self.weights.append(nn.Parameter(drawn * math.sqrt(gain / n_in)))
            self.biases.append(nn.Parameter(torch.zeros(n_out)))

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows C"]:
        x = rms_normalized(x) if self.normalize else x
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = F.gelu(x @ weight + bias)
        weight, bias = last
        return x @ weight + bias


class VectorMLPImportance(InputImportance):
    """For each subcomponent c alone: Σ_k mlp_out_ck · gelu(x · mlp_in_c,k + in_bias_ck) + out_bias_c.

    `x` is the site's input vector. Initialised by the rule of `SharedMLPImportance`.
    """

    def __init__(
        self, C: int, d_in: int, n_hidden: int, *, normalize: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.normalize = normalize
        drawn_in = torch.randn((C, d_in, n_hidden), generator=generator)
        drawn_out = torch.randn((C, n_hidden), generator=generator)
        self.mlp_in = nn.Parameter(drawn_in * math.sqrt(2 / d_in))
        self.in_bias = nn.Parameter(torch.zeros(C, n_hidden))
        self.mlp_out = nn.Parameter(drawn_out / math.sqrt(n_hidden))
        self.out_bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows C"]:
        x = rms_normalized(x) if self.normalize else x
        z = torch.einsum("...d,cdk->...ck", x, self.mlp_in) + self.in_bias
        return (F.gelu(z) * self.mlp_out).sum(dim=-1) + self.out_bias


def rms_normalized(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """x over its root mean square; a vector of zeros stays one."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


# --- the specs -------------------------------------------------------------------------------------


class ImportanceSpec(BaseConfig):
    """An importance function as a configuration names it, by the field `type` of its class."""

    def build(self, C: int, d_in: int, *, generator: torch.Generator) -> Importance:
        """For a site with C subcomponents whose input vectors have `d_in` entries."""
        raise NotImplementedError

    def n_parameters(self, C: int, d_in: int) -> int:
        """How many of them what is built will have, at least."""
        return 0


class MLPImportanceConfig(ImportanceSpec):
    """One small MLP per subcomponent: its inner activation → `n_hidden` GELU neurons → a scalar."""

    type: Literal["mlp"] = "mlp"
    n_hidden: Width = 16

    def build(self, C: int, d_in: int, *, generator: torch.Generator) -> Importance:
        return MLPImportance(C, self.n_hidden, generator=generator)

    def n_parameters(self, C: int, d_in: int) -> int:
        return C * (3 * self.n_hidden + 1)


class AffineImportanceConfig(ImportanceSpec):
    """One affine map of the inner activation per subcomponent (the published "0 hidden neurons")."""

    type: Literal["affine"] = "affine"

    def build(self, C: int, d_in: int, *, generator: torch.Generator) -> Importance:
        return AffineImportance(C, generator=generator)

    def n_parameters(self, C: int, d_in: int) -> int:
        return 2 * C


class SharedMLPImportanceConfig(ImportanceSpec):
    """One MLP per site, shared by its subcomponents: the whole input vector → GELU layers → C scalars.

    The layerwise MLP of the method of 2026.
    """

    type: Literal["shared_mlp"] = "shared_mlp"
    hidden_widths: tuple[Width, ...] = Field(default=(128,), min_length=1, max_length=100)
    normalize: bool = False
    """divide every input vector by its root mean square first, which evens out sites but hides its size"""

    def build(self, C: int, d_in: int, *, generator: torch.Generator) -> Importance:
        return SharedMLPImportance(
            C, d_in, self.hidden_widths, normalize=self.normalize, generator=generator
        )

    def n_parameters(self, C: int, d_in: int) -> int:
        widths = [d_in, *self.hidden_widths, C]
        return sum((n_in + 1) * n_out for n_in, n_out in pairwise(widths))


class VectorMLPImportanceConfig(ImportanceSpec):
    """One small MLP per subcomponent: the whole input vector → `n_hidden` GELU neurons → a scalar."""

    type: Literal["vector_mlp"] = "vector_mlp"
    n_hidden: Width = 16
    normalize: bool = False
    """as in `SharedMLPImportanceConfig`"""

    def build(self, C: int, d_in: int, *, generator: torch.Generator) -> Importance:
        return VectorMLPImportance(
            C, d_in, self.n_hidden, normalize=self.normalize, generator=generator
        )

    def n_parameters(self, C: int, d_in: int) -> int:
        return C * (self.n_hidden * (d_in + 2) + 1)
