"""Adversarial masks: the sources r of m = g + (1 − g) r that make a masked pass as wrong as it can be.

Projected gradient ascent ("fresh PGD" of the VPD paper, Bushnaq et al. 2026): r starts at U(0, 1), then
r ← clamp(r + η sign ∂D/∂r, 0, 1). V, U and g are fixed. Knows no model: what is attacked is a function.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd.masks import stochastic_mask
from spd.noise import seeded, uniform

Scope = Literal["batch", "row"]
Masks = Mapping[str, Tensor]
Errors = Callable[[Masks], Float[Tensor, "*rows"]]
"""masks of all sites, shaped like g → D of every row, or of every example, its positions taken together"""
STEP_SIZE = 0.1


class Attack(NamedTuple):
    """How hard the masks are searched for."""

    scope: Scope
    """one source for the whole batch, or one for each row (each position of a text)"""
    n_steps: int = 20
    n_restarts: int = 1
    step_size: float = STEP_SIZE
    seed: int = 0


class Found(NamedTuple):
    """The largest errors that were met, over the restarts."""

    by_step: list[float]
    """mean D after so many steps of ascent, 0 first: the largest up to there"""
    rows: Float[Tensor, "*rows"]
    """D of each row at its worst: with one source for each row that of the row, else that of the batch"""
    calls: list[Int[Tensor, " n"]]
    """for each of `by_step`, in which call of the errors it was met, 0 first: of each row, or one of all"""


def attack(errors: Errors, g: Mapping[str, Float[Tensor, "*rows C"]], how: Attack) -> Found:
    """Search for the worst masks between g, clipped to [0, 1], and 1.

    The same every time, from seeds by restart and site. With scope `row` the errors of one row must not
    depend on the masks of another, so that each row's worst moment can be taken by itself.
    """
    clipped = {path: own.detach().clamp(0, 1) for path, own in g.items()}
    curves = torch.stack(
        [torch.stack(_ascend(errors, clipped, how, restart)) for restart in range(how.n_restarts)]
    )  # [restarts, 1 + steps, *rows]
    compared = curves.flatten(start_dim=2)
    if how.scope == "batch":
        compared = compared.mean(dim=2, keepdim=True)
    best, calls = _worst_until(compared)
    by_step = best.mean(dim=1).tolist()
    if how.scope == "row":
        return Found(by_step, best[-1].reshape(curves.shape[2:]), list(calls))
    return Found(by_step, curves.flatten(end_dim=1)[int(calls[-1])], list(calls))


def _worst_until(
    curves: Float[Tensor, "restarts moments n"],
) -> tuple[Float[Tensor, "moments n"], Int[Tensor, "moments n"]]:
    """The largest value until each moment, over all restarts, and which of all values that is."""
    n_moments = curves.shape[1]
    largest, restarts = curves.max(dim=0)
    best, moments = largest.cummax(dim=0)
    return best, restarts.gather(0, moments) * n_moments + moments


def _ascend(errors: Errors, g: Mapping[str, Tensor], how: Attack, restart: int) -> list[Tensor]:
    """The errors of all rows before the first step and after each."""
    sources = {path: _start(own, how, restart, path) for path, own in g.items()}
    curve = []
    for _ in range(how.n_steps):
        with torch.enable_grad():
            leaves = {path: source.requires_grad_(True) for path, source in sources.items()}
            rows = errors(_masks(g, leaves))
            slopes = torch.autograd.grad(rows.sum(), list(leaves.values()), allow_unused=True)
        curve.append(rows.detach())
        sources = {
            path: _moved(source, slope, how.step_size)
            for (path, source), slope in zip(leaves.items(), slopes, strict=True)
        }
    with torch.no_grad():
        curve.append(errors(_masks(g, sources)))
    return curve


def _masks(g: Masks, sources: Masks) -> Masks:
    return {path: stochastic_mask(g[path], r.expand_as(g[path])) for path, r in sources.items()}


def _start(g: Tensor, how: Attack, restart: int, path: str) -> Tensor:
    shape = g.shape if how.scope == "row" else [1] * (g.dim() - 1) + [g.shape[-1]]
    generator = seeded(g.device, "adversary", how.seed, restart, path)
    return uniform(shape, generator, dtype=g.dtype)


def _moved(source: Tensor, slope: Tensor | None, step_size: float) -> Tensor:
    if slope is None:
        return source.detach()
    return (source.detach() + step_size * slope.sign()).clamp(0, 1)
