"""Where masks come from: importances and random draws.

A site's mask has one entry for each subcomponent, `[..., C]`.
"""

from jaxtyping import Float
from torch import Tensor


def stochastic_mask(
    g: Float[Tensor, "*rows C"], uniform: Float[Tensor, "*rows C"]
) -> Float[Tensor, "*rows C"]:
    """m = g + (1 − g) r with r ~ U(0, 1) (paper, section 2)."""
    return g + (1 - g) * uniform
