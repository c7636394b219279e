"""Sparse synthetic features, as endless iterators of plain tensors that know their position."""

from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from spd.config import BaseConfig, UserError
from spd.config.memory import NUMBER, require_memory
from spd.noise import derive_seed

DRAWN = 3
"""numbers for each of a batch: its value, whether it is active, and what becomes of both"""
Probability = Annotated[float, Field(ge=1e-6, le=1.0)]
"""below one in a million hardly an input would ever be active, and a run would be of zeros alone"""
Bound = Annotated[float, Field(ge=-1e15, le=1e15)]
"""of inputs that are float32 and squared"""
Group = Annotated[tuple[int, ...], Field(min_length=1)]


class SparseFeatureConfig(BaseConfig):
    """How toy inputs are drawn (paper, section 3): few features active at once, values uniform."""

    feature_probability: Probability = 0.05
    value_range: tuple[Bound, Bound] = (0.0, 1.0)
    generation: Literal["at_least_zero_active", "exactly_n_active"] = "at_least_zero_active"
    n_active: int | None = Field(default=None, ge=1)
    synced_inputs: tuple[Group, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.value_range[0] >= self.value_range[1]:
            raise ValueError(
                f"value_range must be (low, high) with low < high, got {self.value_range}"
            )
        if (self.generation == "exactly_n_active") != (self.n_active is not None):
            raise ValueError(
                "n_active goes with generation exactly_n_active and only with it, got generation"
                f" {self.generation!r} and n_active {self.n_active!r}"
            )
        members = [index for group in self.synced_inputs for index in group]
        if len(members) != len(set(members)):
            raise ValueError(f"synced_inputs: an input stands in two groups: {self.synced_inputs}")
        if self.n_active is not None and self.synced_inputs:
            raise ValueError("synced_inputs cannot be combined with exactly_n_active")
        return self

    def check_n_features(self, n_features: int) -> None:
        """Raise `ValueError` if the settings do not fit `n_features` inputs."""
        if self.n_active is not None and self.n_active > n_features:
            raise ValueError(f"n_active is {self.n_active}, but there are {n_features} features")
        for group in self.synced_inputs:
            for index in group:
                if not 0 <= index < n_features:
                    raise ValueError(
                        f"synced_inputs names input {index}; allowed are 0 to {n_features - 1}"
                    )


class InheritedFeatures(BaseConfig):
    """The inputs of a decomposition: whatever is null is as the target was trained on."""

    feature_probability: Probability | None = None
    value_range: tuple[Bound, Bound] | None = None
    generation: Literal["at_least_zero_active", "exactly_n_active"] | None = None
    n_active: int | None = Field(default=None, ge=1)
    synced_inputs: tuple[Group, ...] | None = None
    unlike_target: bool = False
    """what is given may differ from what the target was trained on"""

    @model_validator(mode="after")
    def _consistent_as_far_as_given(self) -> Self:
        given = self._given()
        if "n_active" in given:
            given.setdefault("generation", "exactly_n_active")
        if given.get("generation") == "exactly_n_active":
            given.setdefault("n_active", 1)
        _features(given)
        return self

    def like(self, trained: SparseFeatureConfig, n_features: int) -> SparseFeatureConfig:
        """These inputs, completed by those of the target's training; `UserError` where they differ."""
        given = self._given()
        free = {"n_active": None} if given.get("generation") == "at_least_zero_active" else {}
        try:
            joint = _features({**trained.model_dump(), **given, **free})
            joint.check_n_features(n_features)
        except ValueError as error:
            raise UserError(f"data: {error}") from None
        different = [
            f"data.{key}: {_plain(value)} here, but the target was trained with"
            f" {_plain(getattr(trained, key))}"
            for key, value in given.items()
            if value != getattr(trained, key)
        ]
        if different and not self.unlike_target:
            raise UserError(
                "\n  ".join(different)
                + "\n  left out, it is that of the target; data.unlike_target=true allows the difference"
            )
        return joint

    def check_batches(self, n_features: int, device: torch.device, **sizes: int) -> None:
        """`UserError` where a batch of one of the sizes, named by their settings, would not fit."""
        for name, size in sizes.items():
            what = f"{name}: {size}: a batch of {size} × {n_features} numbers needs"
            require_memory(DRAWN * NUMBER * size * n_features, what, device)

    def _given(self) -> dict[str, Any]:
        own = SparseFeatureConfig.model_fields
        return {key: value for key in own if (value := getattr(self, key)) is not None}


def _features(values: dict[str, Any]) -> SparseFeatureConfig:
    """`ValueError` with the reason alone if they do not go together."""
    try:
        return SparseFeatureConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _plain(value: Any) -> Any:
    """As it stands in a YAML file."""
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


class SparseFeatures:
    """Endless batches `[batch, n_features]`; batch number t depends on (seed, t) alone.

    `state_dict` holds the position, so that a resumed run sees the batches it would have seen.
    """

    def __init__(
        self,
        config: SparseFeatureConfig,
        n_features: int,
        *,
        batch_size: int,
        seed: int,
        stream: str,
        device: torch.device | str = "cpu",
    ) -> None:
        config.check_n_features(n_features)
        self.config = config
        self.n_features = n_features
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self.position = 0
        self.generator = torch.Generator(device=device)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Float[Tensor, "batch n_features"]:
        self.generator.manual_seed(derive_seed("data", self.stream, self.seed, self.position))
        self.position += 1
        return sparse_features(
            self.config, self.batch_size, self.n_features, generator=self.generator
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


def sparse_features(
    config: SparseFeatureConfig,
    batch_size: int,
    n_features: int,
    *,
    generator: torch.Generator,
) -> Float[Tensor, "batch n_features"]:
    """One batch: each feature active independently, or exactly n of them, values uniform in the range.

    If any member of a synced group is active, all its members are, each with a value of its own.
    """
    shape, device = (batch_size, n_features), generator.device
    low, high = config.value_range
    values = torch.rand(shape, generator=generator, device=device) * (high - low) + low
    chance = torch.rand(shape, generator=generator, device=device)
    if config.generation == "exactly_n_active":
        assert config.n_active is not None, "validated with the config"
        active = torch.zeros(shape, dtype=torch.bool, device=device)
        active.scatter_(-1, chance.topk(config.n_active, dim=-1).indices, True)
    else:
        active = chance < config.feature_probability
    for group in config.synced_inputs:
        any_active = torch.stack([active[:, index] for index in group]).any(dim=0)
        for index in group:  # one by one: a list of indices would be copied to a GPU, which waits
            active[:, index] = any_active
    return torch.where(active, values, torch.zeros_like(values))
