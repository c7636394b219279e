"""The baseline of the benchmarks computes what the package computes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.cases import Case, load
from benchmarks.naive import Naive
from spd.engine.prepare import prepare

CASES = [
    Case("tms_5-2-id", ("batch_size=64",)),
    Case(
        "resid_mlp2",
        ("batch_size=16", "sites={layers.*.mlp_in: 6, layers.*.mlp_out: 4}"),
        ("model.n_features=10", "model.d_embed=8", "model.d_mlp=5"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.experiment)
def test_naive_and_package_agree(case: Case, tmp_path: Path):
    config, problem = load(
        case, tmp_path / "target", "n_eval_batches=1", "metrics={}", "figures={}"
    )
    target = copy.deepcopy(problem.target)
    objective = prepare(problem, config).objective
    parameters = objective.model.subcomponent_parameters()
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    naive = Naive(target, copies, config.losses, problem.tied_sites)
    assert naive.paths == list(objective.model.sites)

    batch = next(problem.train_batches)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    total, _, _ = objective(batch, torch.tensor(0.0), noise)
    total.backward()
    terms = ("stochastic_recon", "stochastic_recon_layerwise")
    own = naive.total(
        batch, iter([noise[f"{term}.0.{path}"] for term in terms for path in naive.paths])
    )
    own.backward()

    torch.testing.assert_close(own, total)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(
            copies[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )
