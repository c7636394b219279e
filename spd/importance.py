"""Causal importance functions and the leaky hard sigmoids (paper, section 2)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spd.config import BaseConfig
from spd.config.limits import Width
from spd.kernels import LEAK, gradient_leak, scalar_mlps

LowerLeak = Literal["both", "gradient"]


class CausalImportances(NamedTuple):
    """Causal importances of every site on one batch; each tensor is `[..., C]` of that site."""

    lower: Mapping[str, Float[Tensor, "... _C"]]
    """lower-leaky hard sigmoid: what the forward masks are made of"""
    upper: Mapping[str, Float[Tensor, "... _C"]]
    """upper-leaky hard sigmoid: what the minimality losses penalise"""

    @classmethod
    def of_logits(
        cls, logits: Mapping[str, Float[Tensor, "... _C"]], leak: LowerLeak, *, lazy: bool = False
    ) -> Self:
        """Both sigmoids of what the importance functions give out.

        `lazy` computes each whenever it is asked for, so that only the logits are kept.
        """
        lower = Mapped(lambda x: lower_leaky_hard_sigmoid(x, leak), logits)
        upper = Mapped(upper_leaky_hard_sigmoid, logits)
        return cls(lower, upper) if lazy else cls(dict(lower), dict(upper))


class Mapped(Mapping[str, Tensor]):
    """`function` of every value of a mapping, called whenever one is asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor], values: Mapping[str, Tensor]) -> None:
        self.function, self.arguments = function, values

    def __getitem__(self, key: str) -> Tensor:
        return self.function(self.arguments[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.arguments)

    def __len__(self) -> int:
        return len(self.arguments)


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


def lower_leaky_hard_sigmoid(
    x: Float[Tensor, "*shape"], leak: LowerLeak = "both"
) -> Float[Tensor, "*shape"]:
    """0.01 x below 0, x in [0, 1], 1 above (published form, `leak="both"`). At 0 the slope is 0.01.

    `leak="gradient"` clamps the forward value at 0 and leaks the gradient alone, and only where a
    descent step would raise the importance.
    """
    if leak == "gradient":
        return gradient_leak(x)
    return torch.where(x > 0, x.clamp(max=1.0), LEAK * x)


def upper_leaky_hard_sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 below 0, x in [0, 1], 1 + 0.01 (x − 1) above. At 0 the slope is 0."""
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.relu())


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
    """One MLP per site, shared by its subcomponents: the whole input vector → GELU layers → C scalars."""

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


ImportanceConfig = Annotated[
    MLPImportanceConfig
    | AffineImportanceConfig
    | SharedMLPImportanceConfig
    | VectorMLPImportanceConfig,
    Field(discriminator="type"),
]
