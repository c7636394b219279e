"""Causal importance functions and the leaky hard sigmoids (paper, section 2)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spd.config import BaseConfig

LEAK = 0.01
BLOCK_ELEMENTS = 2**17
"""of (batch, C, n_hidden), held at a time on the CPU where nothing is compiled: they stay in the cache"""

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


class MLPImportanceConfig(BaseConfig):
    """One small MLP per subcomponent: its inner activation → `n_hidden` GELU neurons → a scalar."""

    type: Literal["mlp"] = "mlp"
    n_hidden: int = Field(default=16, ge=1)


class AffineImportanceConfig(BaseConfig):
    """One affine map of the inner activation per subcomponent (the published "0 hidden neurons")."""

    type: Literal["affine"] = "affine"


class SharedMLPImportanceConfig(BaseConfig):
    """One MLP per site, shared by its subcomponents: the whole input vector → GELU layers → C scalars."""

    type: Literal["shared_mlp"] = "shared_mlp"
    hidden_widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(128,), min_length=1)
    normalize: bool = False
    """divide every input vector by its root mean square first, which evens out sites but hides its size"""


class VectorMLPImportanceConfig(BaseConfig):
    """One small MLP per subcomponent: the whole input vector → `n_hidden` GELU neurons → a scalar."""

    type: Literal["vector_mlp"] = "vector_mlp"
    n_hidden: int = Field(default=16, ge=1)
    normalize: bool = False
    """as in `SharedMLPImportanceConfig`"""


ImportanceConfig = Annotated[
    MLPImportanceConfig
    | AffineImportanceConfig
    | SharedMLPImportanceConfig
    | VectorMLPImportanceConfig,
    Field(discriminator="type"),
]


class MLPImportance(nn.Module):
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
        out = _scalar_mlps(rows, self.mlp_in, self.in_bias, self.mlp_out)
        return out.reshape(h.shape) + self.out_bias


class AffineImportance(nn.Module):
    """weight_c · h_c + bias_c."""

    def __init__(self, C: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, generator=generator))
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, h: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        return h * self.weight + self.bias


class SharedMLPImportance(nn.Module):
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


class VectorMLPImportance(nn.Module):
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


InputImportance = SharedMLPImportance | VectorMLPImportance
"""Importance functions of the site's whole input vector; the others see the inner activations h alone."""

Importance = MLPImportance | AffineImportance | InputImportance


def rms_normalized(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """x over its root mean square; a vector of zeros stays one."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


def make_importance(
    config: ImportanceConfig, C: int, d_in: int, *, generator: torch.Generator
) -> Importance:
    """For a site with C subcomponents whose input vectors have `d_in` entries."""
    match config:
        case SharedMLPImportanceConfig(hidden_widths=widths, normalize=normalize):
            return SharedMLPImportance(C, d_in, widths, normalize=normalize, generator=generator)
        case VectorMLPImportanceConfig(n_hidden=n_hidden, normalize=normalize):
            return VectorMLPImportance(C, d_in, n_hidden, normalize=normalize, generator=generator)
        case MLPImportanceConfig():
            return MLPImportance(C, config.n_hidden, generator=generator)
        case AffineImportanceConfig():
            return AffineImportance(C, generator=generator)


def lower_leaky_hard_sigmoid(
    x: Float[Tensor, "*shape"], leak: LowerLeak = "both"
) -> Float[Tensor, "*shape"]:
    """0.01 x below 0, x in [0, 1], 1 above (published form, `leak="both"`). At 0 the slope is 0.01.

    `leak="gradient"` clamps the forward value at 0 and leaks the gradient alone, and only where a
    descent step would raise the importance.
    """
    if leak == "gradient":
        return _gradient_leak(x)
    return torch.where(x > 0, x.clamp(max=1.0), LEAK * x)


def upper_leaky_hard_sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 below 0, x in [0, 1], 1 + 0.01 (x − 1) above. At 0 the slope is 0."""
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.relu())


class _ScalarMLPs(torch.autograd.Function):
    """Σ_k w2_ck gelu(w1_ck h_bc + b1_ck) for `h` [B, C] and weights [C, n_hidden], and its slope in h.

    The backward pass is written out so that, compiled, no tensor of shape (B, C, n_hidden) is ever
    stored, and Φ is computed twice for every element instead of three times: the slope comes with the
    value, and the gradients of the weights are reductions over the batch that recompute what they need.
    `exp2` stands for `exp`, which the compiler would store for reuse. Not compiled, such tensors are made
    for a block of subcomponents at a time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        blocks = _blocks(h, w1.shape[1])
        parts = [_values_and_slopes(h[:, c], w1[c], b1[c], w2[c]) for c in blocks]
        values, slopes = _joined(parts, dim=1)
        return values, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, w1, b1, w2, slope_in_h = ctx.saved_tensors
        # the batch last: reductions over it then run along memory
        h_t, grad_t = h.mT.contiguous(), grads[0].mT.contiguous()
        blocks = _blocks(h, w1.shape[1])
        parts = [_weight_gradients(h_t[c], grad_t[c], w1[c], b1[c], w2[c]) for c in blocks]
        grad_w1, grad_b1, grad_w2 = _joined(parts, dim=0)
        return grads[0] * slope_in_h, grad_w1, grad_b1, grad_w2


def _blocks(h: Float[Tensor, "B C"], n_hidden: int) -> list[slice]:
    """Of subcomponents; all at once where the compiler or a GPU's memory makes that cheap."""
    B, C = h.shape
    whole = torch.compiler.is_compiling() or h.device.type != "cpu"
    size = C if whole else max(1, BLOCK_ELEMENTS // (B * n_hidden))
    return [slice(start, start + size) for start in range(0, C, size)]


def _joined(parts: Sequence[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(pieces, dim) for pieces in zip(*parts, strict=True))


def _values_and_slopes(
    h: Float[Tensor, "B C"],
    w1: Float[Tensor, "C n_hidden"],
    b1: Float[Tensor, "C n_hidden"],
    w2: Float[Tensor, "C n_hidden"],
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    z = h[..., None] * w1 + b1
    cdf, gelu_slope = normal_cdf_and_gelu_slope(z)
    slope = (gelu_slope * (w1 * w2)).sum(dim=-1)
    # the empty summand has the compiler compute both sums in one loop, in the forward pass
    return (z * cdf * w2).sum(dim=-1) + 0.0 * slope, slope


def _weight_gradients(
    h_t: Float[Tensor, "C B"],
    grad_t: Float[Tensor, "C B"],
    w1: Float[Tensor, "C n_hidden"],
    b1: Float[Tensor, "C n_hidden"],
    w2: Float[Tensor, "C n_hidden"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of w1, b1 and w2, from what arrives at the output."""
    h_t, grad_t = h_t[:, None], grad_t[:, None]
    z = h_t * w1[..., None] + b1[..., None]
    cdf, slope = normal_cdf_and_gelu_slope(z)
    grad_z = grad_t * slope
    grad_b1 = grad_z.sum(dim=-1) * w2
    grad_w1 = (grad_z * h_t).sum(dim=-1) * w2
    return grad_w1, grad_b1, (grad_t * z * cdf).sum(dim=-1)


def normal_cdf_and_gelu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """Φ(z), and d/dz [z Φ(z)] = Φ(z) + z φ(z)."""
    bell = torch.exp2(z * z * (-0.5 / math.log(2)))
    if z.dtype == torch.float32 and torch.compiler.is_compiling():
        cdf = _normal_cdf_in_float32(z, bell)
    else:
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return cdf, cdf + z * bell / math.sqrt(2 * math.pi)


def _normal_cdf_in_float32(z: Tensor, bell: Tensor) -> Tensor:
    """Φ(z) from exp(−z²/2), to 3e-7: as good as float32 is (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * z.abs())
    series = torch.full_like(t, 0.0)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + 0.5 * coefficient) * t
    tail = series * bell
    return torch.where(z >= 0, 1 - tail, tail)


class _GradientLeak(torch.autograd.Function):
    """clamp(x, 0, 1) whose gradient at and below 0 is 0.01 of the incoming one where that is negative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        below = torch.where(grad < 0, LEAK * grad, torch.zeros_like(grad))
        inside = torch.where(x <= 1, grad, torch.zeros_like(grad))
        return torch.where(x > 0, inside, below)


def _scalar_mlps(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return _ScalarMLPs.apply(h, w1, b1, w2)[0]


def _gradient_leak(x: Tensor) -> Tensor:
    return _GradientLeak.apply(x)


WITH_OWN_GRADIENT = (_scalar_mlps, _gradient_leak)
"""Functions whose backward pass is written out. Below `torch.func.vmap` the compiler looks through them
and differentiates what they compute instead, unless it is told not to."""
