"""Solved by causes: the known solution is, and whatever is wrong with a decomposition is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from spd.adversary import Attack
from spd.component_model import ComponentModel
from spd.engine.prepare import Prepared
from spd.importance import AffineImportance
from spd.metrics.causes import Causes, causes_of, identity_effects
from spd.problem import Problem
from tests.solved_toy import columns_of, set_importance, solved_toy

N, C = 4, 8
OWN = columns_of(N, C)
QUICK = Attack("row", n_steps=10, n_restarts=2)


def toy(*, hidden_layer: bool = False) -> Prepared:
    """Features in orthogonal directions: they do not interfere, and the known solution is exact."""
    prepared = solved_toy(N, N, C, hidden_layer=hidden_layer)
    model = prepared.objective.model
    turned = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        model.sites["linear1"].target_weight.copy_(turned)
        model.sites["linear2"].target_weight.copy_(turned.mT)
        model.get_submodule("target.linear2").original.bias.zero_()  # pyright: ignore
        model.sites["linear1"].subcomponents.U[OWN] = turned
    for path in ("linear1", "linear2"):  # on from the smallest input that matters
        slope, offset = torch.zeros(C), torch.full((C,), -0.05)
        slope[OWN], offset[OWN] = 40.0, -1.0
        set_importance(model, path, slope, offset)
    return prepared


def plant_pair(prepared: Prepared, size: float) -> None:
    """± u vᵀ in two subcomponents of `linear1` that are never on."""
    V, U = parts(prepared.objective.model)
    one, other = [c for c in range(C) if c not in OWN][:2]
    with torch.no_grad():
        V[:, [one, other]] = 0.5
        U[one], U[other] = size, -size


def judge(prepared: Prepared, **options: object) -> Causes:
    problem = options.pop("problem", prepared.problem)
    assert isinstance(problem, Problem)
    model = prepared.objective.model
    return causes_of(model, problem, prepared.eval_batches, how=QUICK, **options)  # pyright: ignore


def points(prepared: Prepared) -> set[str]:
    """Which points fail."""
    lines = judge(prepared).failures()
    return {line.split(": ")[0 if line.startswith("adversary") else 1] for line in lines}


def parts(model: ComponentModel) -> tuple[torch.Tensor, torch.Tensor]:
    site = model.sites["linear1"].subcomponents
    return site.V, site.U


def importance_of(model: ComponentModel, path: str) -> AffineImportance:
    function = model.sites[path].importance
    assert isinstance(function, AffineImportance)
    return function


def no_U(model: ComponentModel) -> None:
    parts(model)[1].zero_()


def flipped(model: ComponentModel) -> None:
    parts(model)[1].neg_()


def random(model: ComponentModel) -> None:
    parts(model)[1].normal_(generator=torch.Generator().manual_seed(2))


def exchanged(model: ComponentModel) -> None:
    U = parts(model)[1]
    U[OWN] = U[OWN].roll(1, dims=0)


def rotated_pair(model: ComponentModel) -> None:
    """The same matrix in another basis: two features share two subcomponents."""
    V, U = parts(model)
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    pair = OWN[:2]
    V[:, pair], U[pair] = V[:, pair] @ turn, turn.mT @ U[pair]


def split(model: ComponentModel) -> None:
    """One feature in two halves."""
    V, U = parts(model)
    unused = next(c for c in range(C) if c not in OWN)
    V[:, unused], U[unused] = V[:, OWN[0]], U[OWN[0]] / 2
    U[OWN[0]] /= 2
    for path in ("linear1", "linear2"):
        function = importance_of(model, path)
        function.weight[unused], function.bias[unused] = 40.0, -1.0


def idle(model: ComponentModel) -> None:
    for path in ("linear1", "linear2"):
        unused = torch.tensor([c for c in range(C) if c not in OWN])
        importance_of(model, path).bias[unused] = 0.0999


def off_on_data(model: ComponentModel) -> None:
    """Importances are right at the probes alone, from 0.74 on."""
    for path in ("linear1", "linear2"):
        function = importance_of(model, path)
        function.weight[OWN], function.bias[OWN] = 100.0, -74.0


WRONG: dict[Callable[[ComponentModel], None], set[str]] = {
    no_U: {"faithful", "mechanisms", "weights"},
    flipped: {"faithful", "weights", "data"},
    random: {"faithful", "weights"},
    exchanged: {"faithful", "weights"},
    rotated_pair: {"mechanisms", "weights"},
    split: {"mechanisms", "weights"},
    idle: {"data"},
    off_on_data: {"data", "adversary"},
}


def test_the_known_solution_is_solved():
    causes = judge(toy())
    assert causes.failures() == [] and causes.solved and causes.judged_by_solution
    for own in causes.sites.values():
        assert own.unfaithful < 1e-6 and own.lost < 0.05 and own.idle == 0
        assert (own.effect_errors, own.wrong_weights) == (0, 0)
        assert own.n_measured == C
    assert causes.adversarial < 0.01


def test_a_hidden_layer_is_used_as_a_whole():
    prepared = toy(hidden_layer=True)
    assert judge(prepared).solved
    with torch.no_grad():
        site = prepared.objective.model.sites["hidden_layers.0"].subcomponents
        site.U[3] *= 0.5
    found = judge(prepared).failures()
    assert any(line.startswith("hidden_layers.0: mechanisms") for line in found), found


@pytest.mark.parametrize(("spoil", "expected"), WRONG.items(), ids=[f.__name__ for f in WRONG])
def test_what_is_wrong_is_named(spoil: Callable[[ComponentModel], None], expected: set[str]):
    prepared = toy()
    with torch.no_grad():
        spoil(prepared.objective.model)
    found = points(prepared)
    assert expected <= found, found


@pytest.mark.parametrize("factor", [0.90, 0.85])
def test_importances_that_are_a_little_lower_are_right_too(factor: float):
    prepared = toy()
    with torch.no_grad():
        for path in ("linear1", "linear2"):
            function = importance_of(prepared.objective.model, path)
            function.weight.mul_(factor)
            function.bias.mul_(factor)
    assert judge(prepared).solved


def test_without_a_known_solution_the_other_points_are_judged():
    prepared = toy()
    unknown = Problem(
        prepared.problem.target, prepared.eval_batches, prepared.eval_batches, recon="mse"
    )
    causes = judge(prepared, problem=unknown)
    assert causes.solved and not causes.judged_by_solution
    with torch.no_grad():
        off_on_data(prepared.objective.model)
    assert not judge(prepared, problem=unknown).solved


def test_rows_that_do_not_count_are_not_looked_at():
    """What is wrong on them alone is no fault, and what is wrong on the others is not diluted by them."""
    prepared = toy()
    with torch.no_grad():
        off_on_data(prepared.objective.model)
    problem = prepared.problem
    batch = torch.cat([own for own in prepared.eval_batches if isinstance(own, torch.Tensor)])
    counts = batch.amax(dim=1) > 0.5
    assert 0.1 < counts.float().mean() < 0.95
    weighed = replace(
        problem,
        independent_rows=False,
        position_weights=lambda rows: (rows.amax(dim=1) > 0.5).float() / counts.float().mean(),
    )
    model = prepared.objective.model
    own = causes_of(model, weighed, [batch], how=QUICK, n_rows=len(batch))
    only = causes_of(model, problem, [batch[counts]], how=QUICK, n_rows=len(batch))
    assert own.n_rows == only.n_rows == counts.sum()
    for path, site in only.sites.items():
        assert own.sites[path][:6] == pytest.approx(site[:6], rel=1e-5)


def test_effects_of_large_sites_are_measured_on_a_seeded_sample():
    prepared = toy()
    first, again = (judge(prepared, n_sampled=3, seed=1) for _ in range(2))
    assert first == again
    assert {(own.n_measured, own.C) for own in first.sites.values()} == {(3, C)}


def test_effects_that_are_no_bijection():
    share = torch.tensor([[1.0, 0.0, 0.01], [0.6, 0.03, 0.0]])
    partner, errors = identity_effects(share)
    assert partner.tolist() == [0, 1]
    assert errors == 2, "0.03 is no half, and 0.6 belongs to another probe"
    assert identity_effects(torch.eye(3, 5))[1] == 0
    assert identity_effects(torch.eye(3, 2))[1] == 1, "one probe has none"
