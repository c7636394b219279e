"""The toy model of superposition (paper, section 3.1), without its training or decomposition."""

import math
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from spd.config import BaseConfig
from spd.config.limits import MAX_LAYERS, Width


class TMSModelConfig(BaseConfig):
    """Sizes and initialisation of a `TMSModel`."""

    n_features: Width
    n_hidden: Width
    n_hidden_layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    hidden_init: Literal["identity", "random"] = Field(
        default="identity",
        description="hidden layers are never trained: the identity, or fixed draws from N(0, 1)",
    )
    tied_weights: bool = Field(default=True, description="linear2.weight is linear1.weight.T")
    init_bias_to_zero: bool = Field(
        default=False, description="otherwise the bias starts at U(±1/√n_hidden)"
    )

    @model_validator(mode="after")
    def _hidden_init_belongs_to_hidden_layers(self) -> Self:
        if self.hidden_init == "random" and self.n_hidden_layers == 0:
            raise ValueError("hidden_init random needs n_hidden_layers of at least 1, got 0")
        return self


class TMSModel(nn.Module):
    """`ReLU(linear2(hidden_layers(linear1(x))))`; only `linear2` has a bias."""

    def __init__(self, n_features: int, n_hidden: int, n_hidden_layers: int = 0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(n_features, n_hidden, bias=False)
        self.hidden_layers = nn.ModuleList(
            nn.Linear(n_hidden, n_hidden, bias=False) for _ in range(n_hidden_layers)
        )
        self.linear2 = nn.Linear(n_hidden, n_features, bias=True)
        self.anchors = nn.ModuleDict()
        """identity matrices in front of the modules that they are named for"""

    def forward(self, x: Float[Tensor, "... n_features"]) -> Float[Tensor, "... n_features"]:
        hidden = self.linear1(self._in_front_of("linear1", x))
        for layer in self.hidden_layers:
            hidden = layer(hidden)
        return torch.relu(self.linear2(self._in_front_of("linear2", hidden)))

    def insert_identity_(self, name: str) -> None:
        """Put an identity matrix, a module of its own, in front of `linear1` or `linear2`."""
        weight = self.get_submodule(name).get_parameter("weight")
        d = weight.shape[1]
        identity = nn.Linear(d, d, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.eye_(identity.weight)
        self.anchors[name] = identity.requires_grad_(False)

    def _in_front_of(self, name: str, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.anchors[name](x) if name in self.anchors else x


def empty_model(config: TMSModelConfig) -> TMSModel:
    """A `TMSModel` whose weights hold no memory yet, and which drew no random numbers."""
    with torch.device("meta"):
        return TMSModel(config.n_features, config.n_hidden, config.n_hidden_layers)


def initial_weights(
    config: TMSModelConfig, *, generator: torch.Generator
) -> dict[str, Float[Tensor, "..."]]:
    """The weights before training, by their names in the model, drawn on the CPU.

    `linear1.weight` [n_hidden, n_features] and a free `linear2.weight` [n_features, n_hidden] start
    as those of `nn.Linear` do, at U(±1/√d_in). A tied `linear2.weight` is left out: see `with_tie`.
    """

    def uniform(shape: tuple[int, ...], d_in: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(d_in)

    n, hidden = config.n_features, config.n_hidden
    weights = {"linear1.weight": uniform((hidden, n), n)}
    bias = uniform((n,), hidden)
    weights["linear2.bias"] = torch.zeros(n) if config.init_bias_to_zero else bias
    if not config.tied_weights:
        weights["linear2.weight"] = uniform((n, hidden), hidden)
    for i in range(config.n_hidden_layers):
        random = torch.randn((hidden, hidden), generator=generator)
        fixed = torch.eye(hidden) if config.hidden_init == "identity" else random
        weights[f"hidden_layers.{i}.weight"] = fixed
    return weights


def with_tie(weights: dict[str, Float[Tensor, "..."]]) -> dict[str, Float[Tensor, "..."]]:
    """The weights with `linear2.weight`: a transposed view of `linear1.weight` where it is tied.

    A leading axis of seeds is left alone.
    """
    if "linear2.weight" in weights:
        return weights
    return {**weights, "linear2.weight": weights["linear1.weight"].mT}
