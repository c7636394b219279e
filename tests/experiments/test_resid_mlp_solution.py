"""A residual MLP decomposed by hand: the known solution has no errors, and what deviates has some."""

import pytest
import torch

from spd.component_model import ComponentModel, Site
from spd.engine.prepare import Prepared, prepare
from spd.experiments.resid_mlp.model import (
    LabelConfig,
    ResidMLP,
    ResidMLPModelConfig,
    initial_weights,
    make_labels,
    mlp_in_path,
    mlp_out_path,
)
from spd.experiments.resid_mlp.problem import ResidMLPProblem, known_solution, read_basis
from spd.importance import AffineImportanceConfig
from spd.losses import Faithfulness
from spd.metrics import PatternErrorsMetric
from spd.problem import Dense, Identity
from spd.spd_config import Execution, SPDConfig
from tests.solved_toy import PROBE, _batches, set_importance


def columns_of(layer: int, n_features: int, C: int) -> list[int]:
    """In this layer feature j is read by subcomponent `columns_of(...)[j]` of `mlp_in`."""
    return torch.randperm(C, generator=torch.Generator().manual_seed(layer))[:n_features].tolist()


def solved_resid_mlp(
    n_layers: int = 1, *, n_features: int = 6, d_embed: int = 12, d_mlp: int = 3, C: int = 10
) -> Prepared:
    """`mlp_in` by one subcomponent per feature, `mlp_out` by one per neuron: 2, 3, … ."""
    sizes = ResidMLPModelConfig(
        n_features=n_features, d_embed=d_embed, d_mlp=d_mlp, n_layers=n_layers
    )
    target = ResidMLP(sizes)
    target.load_state_dict(initial_weights(sizes, generator=torch.Generator().manual_seed(0)))
    for layer in range(n_layers):  # faint outputs: the stream stays what the embedding makes of x
        target.get_parameter(f"{mlp_out_path(layer)}.weight").data.mul_(0.02)
        weight = target.get_parameter(f"{mlp_in_path(layer)}.weight").data
        basis = read_basis(target.W_E.mT)
        weight.copy_(weight @ basis @ basis.mT)  # reads nothing but the embedding
    problem = ResidMLPProblem(
        target=target,
        train_batches=_batches(n_features, "train"),
        eval_batches=_batches(n_features, "eval"),
        probes=PROBE * torch.eye(n_features),
        solution=known_solution(target),
        labels=make_labels(LabelConfig(), sizes),
    )
    config = SPDConfig(
        sites={"layers.*.mlp_*": C},
        losses={"faithfulness": Faithfulness(coeff=1.0)},
        importance=AffineImportanceConfig(),
        steps=1,
        lr=1e-3,
        execution=Execution(compile=False),
        n_eval_batches=2,
    )
    prepared = prepare(problem, config)
    for layer in range(n_layers):
        _solve(prepared.objective.model, target, layer)
    return prepared


@torch.no_grad()
def _solve(model: ComponentModel, target: ResidMLP, layer: int) -> None:
    for path in (mlp_in_path(layer), mlp_out_path(layer)):
        site = model.sites[path]
        reads_features = path == mlp_in_path(layer)
        own = columns_of(layer, len(target.W_E), site.C) if reads_features else neurons_of(site)
        V = torch.linalg.pinv(target.W_E) if reads_features else torch.eye(len(site.target_weight))
        U = target.W_E @ site.target_weight if reads_features else site.target_weight
        site.subcomponents.V.zero_()
        site.subcomponents.U.zero_()
        site.subcomponents.V[:, own] = V
        site.subcomponents.U[own] = U
        slope, offset = torch.zeros(site.C), torch.full((site.C,), -0.05)
        slope[own] = 4.0 if reads_features else 0.0
        offset[own] = -1.0 if reads_features else 1.0
        set_importance(model, path, slope, offset)


def neurons_of(site: Site) -> list[int]:
    return list(range(2, 2 + len(site.target_weight)))


def errors(prepared: Prepared) -> dict[str, float]:
    metric = PatternErrorsMetric().build(prepared.objective.model, prepared.problem)
    return metric.compute()


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_exact_solution_has_no_errors(n_layers: int):
    prepared = solved_resid_mlp(n_layers)
    found = errors(prepared)
    sites = [f"layers.{i}.{name}" for i in range(n_layers) for name in ("mlp_in", "mlp_out")]
    assert list(prepared.objective.model.sites) == sites
    assert found == {**{f"errors/{site}": 0.0 for site in sites}, "errors/total": 0, "matches": 1}


def test_the_solution_names_every_site_and_reads_through_the_unembedding():
    target = solved_resid_mlp(2).objective.model.target
    assert isinstance(target, ResidMLP)
    solution = known_solution(
        ResidMLP(ResidMLPModelConfig(n_features=6, d_embed=12, d_mlp=3, n_layers=2))
    )
    for layer in range(2):
        assert solution[mlp_in_path(layer)] == Identity(6)
        dense = solution[mlp_out_path(layer)]
        assert isinstance(dense, Dense) and dense.k == 3
    basis = read_basis(target.W_U)
    assert basis.shape == (12, 6)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis @ basis.mT @ target.W_U, target.W_U)


def test_what_nothing_reads_may_be_left_out_of_mlp_out_and_what_is_read_may_not():
    prepared = solved_resid_mlp()
    site = prepared.objective.model.sites[mlp_out_path(0)]
    W_U = prepared.objective.model.target.W_U
    assert isinstance(W_U, torch.Tensor)
    basis = read_basis(W_U)
    unread = torch.eye(12) - basis @ basis.mT
    with torch.no_grad():
        site.subcomponents.U.copy_(site.subcomponents.U @ (torch.eye(12) - unread))
    assert (site.target_weight - site.subcomponents.V @ site.subcomponents.U).norm() > 0.3 * (
        site.target_weight.norm()
    )
    assert errors(prepared)["errors/total"] == 0
    with torch.no_grad():
        site.subcomponents.U.mul_(0.8)
    assert errors(prepared)["errors/layers.0.mlp_out"] == 1


def test_a_neuron_lost_and_a_feature_lost_are_errors():
    prepared = solved_resid_mlp()
    model = prepared.objective.model
    site = model.sites[mlp_out_path(0)]
    offset = torch.full((site.C,), -0.05)
    offset[neurons_of(site)[1:]] = (
        1.0  # one column fewer; a tenth of the matrix and its rank go too
    )
    set_importance(model, mlp_out_path(0), torch.zeros(site.C), offset)
    assert errors(prepared)["errors/layers.0.mlp_out"] == 3

    own = columns_of(0, 6, 10)
    slope, offset = torch.zeros(10), torch.full((10,), -0.05)
    slope[own[1:]], offset[own[1:]] = 4.0, -1.0
    offset[own[2]] = 1.0  # on always: an extra entry for each of the five other features
    set_importance(model, mlp_in_path(0), slope, offset)
    assert errors(prepared)["errors/layers.0.mlp_in"] in (5, 6)
