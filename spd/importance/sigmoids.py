"""Causal importances and the leaky hard sigmoids that they come from (paper, section 2)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from spd.kernels import LEAK, gradient_leak

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
