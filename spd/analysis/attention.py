"""What subcomponents make of an attention score, and how those of an MLP share neurons."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd.components import LinearSubcomponents


class HeadOf(NamedTuple):
    """Which entries of queries and keys one head reads."""

    query: slice
    key: slice


def rotation(
    position: float, d_head: int, base: float = 10_000.0
) -> Float[Tensor, "d_head d_head"]:
    """R of rotary embeddings at a position, of halves (i, i + d/2): q → R q; R_sᵀ R_t is R of t − s."""
    half = d_head // 2
    angles = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cosines, sines = angles.cos(), angles.sin()
    R = torch.zeros(d_head, d_head, dtype=torch.float64)
    places = torch.arange(half)
    R[places, places] = R[places + half, places + half] = cosines
    R[places, places + half], R[places + half, places] = -sines, sines
    return R


def score_parts(
    query: LinearSubcomponents,
    key: LinearSubcomponents,
    x: tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]],
    positions: tuple[int, int],
    head: HeadOf,
    base: float = 10_000.0,
) -> Float[Tensor, "C_query C_key"]:
    """The score of one head before its scale, of x at position t and x′ at t′, by pairs of subcomponents.

    (V_Q,c·x) (U_Q,c R_tᵀ R_t′ U_K,c′ᵀ) (V_K,c′·x′): the sum over all pairs is the score, if nothing is left
    over of either matrix (VPD paper, section 4.4).
    """
    (U_query, U_key), (t, t_key) = _of_head(query, key, head), positions
    R = rotation(t_key - t, U_query.shape[1], base)
    bracket = U_query @ R @ U_key.mT
    a, b = (x_ @ part.V.detach().double() for x_, part in zip(x, (query, key), strict=True))
    return a[:, None] * bracket * b


def static_strength(
    query: LinearSubcomponents,
    key: LinearSubcomponents,
    head: HeadOf,
    offset: int,
    signs: tuple[Float[Tensor, " C_query"], Float[Tensor, " C_key"]],
    base: float = 10_000.0,
) -> Float[Tensor, "C_query C_key"]:
    """The bracket above × ‖V_Q‖ ‖V_K‖ × the signs of the mean activations, at an offset t − t′.

    To compare heads, divide by the standard deviation over all pairs and offsets of each.
    """
    U_query, U_key = _of_head(query, key, head)
    bracket = U_query @ rotation(-offset, U_query.shape[1], base) @ U_key.mT
    sizes = [
        part.V.detach().double().norm(dim=0) * s
        for part, s in zip((query, key), signs, strict=True)
    ]
    return sizes[0][:, None] * bracket * sizes[1]


def _of_head(
    query: LinearSubcomponents, key: LinearSubcomponents, head: HeadOf
) -> tuple[Tensor, Tensor]:
    return query.U.detach().double()[:, head.query], key.U.detach().double()[:, head.key]


def interaction(
    U: Float[Tensor, "C n_neurons"], contributions: Float[Tensor, "rows C"]
) -> Float[Tensor, "C C"]:
    """I_cc′ = (Σ_i |U_ic| |U_ic′| / Σ_i U_ic²) (Σ |g_c a_c| |g_c′ a_c′| / Σ (g_c a_c)²), not symmetric.

    How far c′ shares the neurons of c, on the rows where c is at work; 1 on the diagonal. `contributions`
    are g_c a_c (VPD paper, section 4.3). 0 where c does nothing.
    """
    sizes, work = U.abs(), contributions.abs()
    shared, together = sizes @ sizes.mT, work.mT @ work
    own = shared.diagonal()[:, None] * together.diagonal()[:, None]
    return torch.where(own > 0, shared * together / own.clamp(min=1e-30), 0.0)
