"""A residual MLP as a problem: the target, what it was trained to compute, the known solution."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.experiments.resid_mlp.model import (
    Labels,
    MLPBlock,
    ResidMLP,
    mlp_in_path,
    mlp_out_path,
)
from spd.problem import (
    Dense,
    Identity,
    Pattern,
    Problem,
)


@dataclass(frozen=True, kw_only=True)
class ResidMLPProblem(Problem):
    """A `Problem` whose target is a `ResidMLP`."""

    labels: Labels
    """what the target was trained to compute"""


def known_solution(target: ResidMLP) -> dict[str, Pattern]:
    """Every `mlp_in` reads each feature by one subcomponent; every `mlp_out` is used as a whole.

    Of what `mlp_out` writes, only the column space of `W_U` is read; the rest of the trained matrix is
    left over from its initialisation. A layer with more neurons than are read has no known `mlp_out`.
    """
    n_features = target.W_E.shape[0]
    basis = read_basis(target.W_U)
    solution: dict[str, Pattern] = {}
    for layer, block in enumerate(target.layers):
        assert isinstance(block, MLPBlock), f"a {type(block).__name__} among the layers"
        solution[mlp_in_path(layer)] = Identity(n_features, reads=target.W_E.detach())
        d_mlp = block.mlp_out.in_features
        if d_mlp <= basis.shape[1]:
            solution[mlp_out_path(layer)] = Dense(d_mlp, basis)
    return solution


@torch.no_grad()
def read_basis(W_U: Float[Tensor, "d_embed n_features"]) -> Float[Tensor, "d_embed rank"]:
    """Orthonormal columns that span the column space of `W_U`."""
    return torch.linalg.qr(W_U.detach()).Q


def need_resid_mlp(problem: Problem, place: str) -> ResidMLPProblem:
    """The problem as what it must be for `place`, an entry of the configuration."""
    if not isinstance(problem, ResidMLPProblem):
        raise UserError(f"{place}: works on residual MLPs only; remove it")
    return problem


def need_all_sites(model: ComponentModel, place: str) -> tuple[ResidMLP, list[tuple[str, str]]]:
    """The target, and (mlp_in, mlp_out) of every layer; `place` needs them all to be sites."""
    target = model.target
    assert isinstance(target, ResidMLP), f"{type(target).__name__} in a ResidMLPProblem"
    layers = [(mlp_in_path(i), mlp_out_path(i)) for i, _ in enumerate(target.layers)]
    missing = [path for layer in layers for path in layer if path not in model.sites]
    if missing:
        raise UserError(
            f"{place}: needs every matrix decomposed; no sites are {', '.join(missing)}"
        )
    return target, layers
