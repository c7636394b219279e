"""Neuron contributions against loops over their definition; performance on the labels by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine.prepare import eval_contexts
from spd.experiments.resid_mlp.metrics import (
    Contributions,
    LabelPerformanceMetric,
    NeuronContributionsMetric,
    agreement,
    neuron_contributions,
)
from spd.experiments.resid_mlp.model import ResidMLP, mlp_in_path, mlp_out_path
from spd.metrics import collect
from spd.problem import Problem
from tests.experiments.test_resid_mlp_solution import columns_of, solved_resid_mlp
from tests.solved_toy import set_importance, solved_toy
from tests.toy import tensors


def disturb(model: ComponentModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.subcomponent_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def test_contributions_against_a_loop_over_the_definition():
    model = solved_resid_mlp(2).objective.model
    disturb(model)
    target = model.target
    assert isinstance(target, ResidMLP)
    W_E, W_U = target.W_E, target.W_U
    for layer, found in enumerate(neuron_contributions(model, "here")):
        in_site, out_site = model.sites[mlp_in_path(layer)], model.sites[mlp_out_path(layer)]
        W_in, W_out = in_site.weight, out_site.weight  # [d_mlp, d_embed] and [d_embed, d_mlp]
        parts, sum_out = in_site.subcomponents, torch.zeros_like(W_out)
        for c in range(out_site.C):
            sum_out += torch.outer(out_site.subcomponents.U[c], out_site.subcomponents.V[:, c])
        for i in range(6):
            of_target = (W_U[:, i] @ W_out) * (W_in @ W_E[i])
            torch.testing.assert_close(found.target[i], of_target)
            singles = []
            for c in range(in_site.C):
                own_in = torch.outer(parts.U[c], parts.V[:, c])
                singles.append((W_U[:, i] @ sum_out) * (own_in @ W_E[i]))
            largest = [float(single.max()) for single in singles]
            best = largest.index(max(largest))
            assert int(found.chosen[i]) == best
            torch.testing.assert_close(found.subcomponents[i], singles[best])


def test_the_exact_solution_agrees_and_picks_each_features_own_subcomponent():
    prepared = solved_resid_mlp(2)
    layers = neuron_contributions(prepared.objective.model, "here")
    for layer, found in enumerate(layers):
        positive = (found.target.max(dim=1).values > 0).tolist()
        own = columns_of(layer, 6, 10)
        chosen = found.chosen.tolist()
        assert [c for c, p in zip(chosen, positive, strict=True) if p] == [
            c for c, p in zip(own, positive, strict=True) if p
        ]
    metric = NeuronContributionsMetric().build(prepared.objective.model, prepared.problem)
    values = metric.compute()
    assert values.keys() == {"correlation/neuron_contributions", "slope/neuron_contributions"}


def test_correlation_and_slope_against_numpy():
    def layer(seed: int) -> Contributions:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, generator=generator)
        y = 1.3 * x + 0.2 + 0.1 * torch.randn(4, 3, generator=generator)
        return Contributions(x, y, torch.zeros(4, dtype=torch.long))

    layers = [layer(0), layer(1)]
    x = np.concatenate([part.target.numpy().ravel() for part in layers])
    y = np.concatenate([part.subcomponents.numpy().ravel() for part in layers])
    found = agreement(layers)
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.slope == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])


def test_a_decomposition_without_anything_correlates_with_nothing():
    x = torch.randn(4, 3)
    found = agreement([Contributions(x, torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))])
    assert found == (0.0, 0.0)


def performance(prepared) -> dict[str, float]:
    with torch.no_grad():
        metric = LabelPerformanceMetric().build(prepared.objective.model, prepared.problem)
        return collect([metric], eval_contexts(prepared))


def test_performance_of_the_exact_solution_is_the_targets():
    prepared = solved_resid_mlp()
    model = prepared.objective.model
    set_importance(model, mlp_in_path(0), torch.zeros(10), torch.ones(10))
    set_importance(model, mlp_out_path(0), torch.zeros(10), torch.ones(10))
    found = performance(prepared)
    x = torch.cat(tensors(prepared.eval_batches))
    expected = float((model.target(x) - x - x.relu()).square().mean())
    assert found.keys() == {
        f"mse_to_labels/{name}"
        for name in ("target", "unmasked", "importance_masked", "stochastic")
    }
    assert list(found.values()) == pytest.approx([expected] * 4, rel=1e-4)


def test_performance_with_everything_masked_is_that_of_idle_mlps():
    prepared = solved_resid_mlp()
    model = prepared.objective.model
    target = model.target
    assert isinstance(target, ResidMLP)
    for path in model.sites:
        set_importance(model, path, torch.zeros(10), torch.zeros(10))
    found = performance(prepared)
    x = torch.cat(tensors(prepared.eval_batches))
    idle = float((x @ target.W_E @ target.W_U - x - x.relu()).square().mean())
    assert found["mse_to_labels/importance_masked"] == pytest.approx(idle, rel=1e-5)
    assert found["mse_to_labels/target"] == pytest.approx(found["mse_to_labels/unmasked"], rel=1e-4)
    assert found["mse_to_labels/stochastic"] not in (idle, found["mse_to_labels/target"])
    assert performance(prepared) == found, "the noise is the same at every evaluation"


def test_the_metrics_need_a_residual_mlp_with_every_matrix_decomposed():
    prepared = solved_resid_mlp(2)
    model, problem = prepared.objective.model, prepared.problem
    toy = solved_toy()
    for spec in (NeuronContributionsMetric(), LabelPerformanceMetric()):
        with pytest.raises(UserError, match="metrics.*works on residual MLPs only"):
            spec.build(toy.objective.model, toy.problem)
    del model.sites["layers.1.mlp_out"]
    with pytest.raises(UserError, match=r"no sites are layers\.1\.mlp_out"):
        NeuronContributionsMetric().build(model, problem)
    assert isinstance(replace(problem, probes=None, solution={}), Problem)
