"""The residual MLP (paper, section 3.2) and what it is trained to compute, without its training."""

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from spd.config import BaseConfig
from spd.config.limits import Layers, Seed, Width
from spd.noise import derive_seed

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}

Labels = Callable[[Float[Tensor, "... n_features"]], Float[Tensor, "... n_features"]]


class ResidMLPModelConfig(BaseConfig):
    """Sizes, activation function and embedding of a `ResidMLP`."""

    n_features: Width
    d_embed: Width
    d_mlp: Width = Field(description="neurons per layer")
    n_layers: Layers
    act_fn: Literal["relu", "gelu"] = "relu"
    in_bias: bool = False
    out_bias: bool = False
    embedding: Literal["fixed", "identity", "trained"] = Field(
        default="fixed",
        description="fixed random unit rows W_E with W_U = W_Eᵀ; both the identity; both trained",
    )

    @model_validator(mode="after")
    def _identity_is_square(self) -> Self:
        if self.embedding == "identity" and self.n_features != self.d_embed:
            raise ValueError(
                "embedding identity needs n_features = d_embed, got"
                f" {self.n_features} and {self.d_embed}"
            )
        return self


class LabelConfig(BaseConfig):
    """What the outputs should be: `x + act(c ⊙ x)`, or `|c ⊙ x|`."""

    type: Literal["act_plus_resid", "abs"] = "act_plus_resid"
    coeff_seed: Seed | None = Field(
        default=None, description="c ~ U[1, 2] from this seed of its own; null: all ones"
    )
    coeffs: tuple[float, ...] | None = Field(
        default=None, description="c one by one, as of a target that was trained elsewhere"
    )

    @model_validator(mode="after")
    def _one_way_to_c(self) -> Self:
        if self.coeffs is not None and self.coeff_seed is not None:
            raise ValueError("coeffs and coeff_seed both say what c is; one of them must be null")
        return self


class MLPBlock(nn.Module):
    """`mlp_out(act(mlp_in(residual)))`: what one layer adds to the residual stream."""

    def __init__(self, config: ResidMLPModelConfig) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(config.d_embed, config.d_mlp, bias=config.in_bias)
        self.mlp_out = nn.Linear(config.d_mlp, config.d_embed, bias=config.out_bias)
        self.act = ACTIVATIONS[config.act_fn]

    def forward(self, residual: Float[Tensor, "... d_embed"]) -> Float[Tensor, "... d_embed"]:
        return self.mlp_out(self.act(self.mlp_in(residual)))


class ResidMLP(nn.Module):
    """Blocks on a residual stream between `W_E` and `W_U`, which are no sites."""

    W_E: Float[Tensor, "n_features d_embed"]
    W_U: Float[Tensor, "d_embed n_features"]

    def __init__(self, config: ResidMLPModelConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(config.n_features, config.d_embed))
        self.W_U = nn.Parameter(torch.empty(config.d_embed, config.n_features))
        self.layers = nn.ModuleList(MLPBlock(config) for _ in range(config.n_layers))

    def residual(self, x: Float[Tensor, "... n_features"]) -> Float[Tensor, "... d_embed"]:
        """The residual stream after the last block."""
        residual = x @ self.W_E
        for layer in self.layers:
            residual = residual + layer(residual)
        return residual

    def forward(self, x: Float[Tensor, "... n_features"]) -> Float[Tensor, "... n_features"]:
        return self.residual(x) @ self.W_U


def mlp_in_path(layer: int) -> str:
    return f"layers.{layer}.mlp_in"


def mlp_out_path(layer: int) -> str:
    return f"layers.{layer}.mlp_out"


def empty_model(config: ResidMLPModelConfig) -> ResidMLP:
    """A `ResidMLP` whose weights hold no memory yet, and which drew no random numbers."""
    with torch.device("meta"):
        return ResidMLP(config)


def initial_weights(
    config: ResidMLPModelConfig, *, generator: torch.Generator
) -> dict[str, Float[Tensor, "..."]]:
    """The weights before training, by their names in the model, drawn on the CPU.

    The blocks start as `nn.Linear` does, at U(±1/√d_in). `W_E` and `W_U`: see `embedding`; trained
    ones start with standard deviations 1/√n_features and 1/√d_embed.
    """

    def uniform(shape: tuple[int, ...], d_in: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(d_in)

    n, d_embed, d_mlp = config.n_features, config.d_embed, config.d_mlp
    match config.embedding:
        case "fixed":
            W_E = F.normalize(torch.randn((n, d_embed), generator=generator), dim=1)
            weights = {"W_E": W_E, "W_U": W_E.mT.contiguous()}
        case "identity":
            weights = {"W_E": torch.eye(n), "W_U": torch.eye(n)}
        case "trained":
            W_E = torch.randn((n, d_embed), generator=generator) / math.sqrt(n)
            W_U = torch.randn((d_embed, n), generator=generator) / math.sqrt(d_embed)
            weights = {"W_E": W_E, "W_U": W_U}
    for layer in range(config.n_layers):
        for path, d_in, d_out, bias in (
            (mlp_in_path(layer), d_embed, d_mlp, config.in_bias),
            (mlp_out_path(layer), d_mlp, d_embed, config.out_bias),
        ):
            weights[f"{path}.weight"] = uniform((d_out, d_in), d_in)
            if bias:
                weights[f"{path}.bias"] = uniform((d_out,), d_in)
    return weights


def make_labels(
    config: LabelConfig, model: ResidMLPModelConfig, device: torch.device | str = "cpu"
) -> Labels:
    """The function of the input that the model is trained to compute."""
    c = label_coefficients(config, model.n_features).to(device)
    act = ACTIVATIONS[model.act_fn]
    if config.type == "abs":
        return lambda x: (c * x).abs()
    return lambda x: x + act(c * x)


def label_coefficients(config: LabelConfig, n_features: int) -> Float[Tensor, " n_features"]:
    """c: all ones, as given, or U[1, 2] from a seed of its own."""
    if config.coeffs is not None:
        return torch.tensor(config.coeffs)
    if config.coeff_seed is None:
        return torch.ones(n_features)
    generator = torch.Generator().manual_seed(derive_seed("labels", config.coeff_seed))
    return 1 + torch.rand(n_features, generator=generator)
