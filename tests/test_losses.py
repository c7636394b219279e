"""Every loss against plain loops over rows, sites and subcomponents, values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError, parse
from spd.losses import (
    importance_minimality,
    kl_divergence,
    recon_error,
    safe_power,
    schatten,
)
from spd.problem import ReconKind
from spd.spd_config import SPDConfig
from tests import naive
from tests.toy import (
    ALL_LOSSES,
    MLP,
    MLP_SITES,
    N_SAMPLES,
    TokenModel,
    decompose,
    make_objective,
    terms_of,
)


@pytest.fixture
def model() -> ComponentModel:
    """In float64, with importances below 0, between 0 and 1, and above 1."""
    torch.manual_seed(0)
    return decompose(MLP(), MLP_SITES).double()


def naive_terms(
    model: ComponentModel, batch: Tensor, noise: dict[str, Tensor], recon: ReconKind
) -> dict[str, Tensor]:
    """All of `ALL_LOSSES`, by their definitions."""
    rows = batch.reshape(-1, batch.shape[-1])
    draws = {key: value.reshape(len(rows), -1) for key, value in noise.items()}
    error = naive.mean_squared_error if recon == "mse" else naive.kl
    paths = list(model.sites)
    lower = [naive.importances(model, row, naive.lower) for row in rows]
    upper = [naive.importances(model, row, naive.upper) for row in rows]
    target = [naive.forward(model, row, {}) for row in rows]

    def mean_error(masks: Callable[[int], dict[str, Tensor]]) -> Tensor:
        return naive.mean_of(
            error(naive.forward(model, rows[r], masks(r)), target[r]) for r in range(len(rows))
        )

    def stochastic(term: str, sample: int, row: int, path: str) -> Tensor:
        g = lower[row][path]
        return g + (1 - g) * draws[f"{term}.{sample}.{path}"][row]

    weights = {path: naive.target_weight(site) for path, site in model.sites.items()}
    ones = {path: torch.ones(site.C).double() for path, site in model.sites.items()}
    sums = {path: naive.masked_weight(model.sites[path], ones[path]) for path in paths}
    V = {path: site.subcomponents.V for path, site in model.sites.items()}
    U = {path: site.subcomponents.U for path, site in model.sites.items()}
    samples = range(N_SAMPLES)
    return {
        "faithfulness": naive.sum_of(((weights[p] - sums[p]) ** 2).sum() for p in paths)
        / sum(weights[p].numel() for p in paths),
        "importance_minimality": naive.mean_of(
            naive.sum_of(g**0.7 for p in paths for g in row[p] if g > 0) for row in upper
        ),
        "schatten": naive.mean_of(
            naive.sum_of(
                row[p][c] ** 1.3 * ((V[p][:, c] ** 2).sum() + (U[p][c] ** 2).sum())
                for p in paths
                for c in range(model.sites[p].C)
            )
            for row in upper
        ),
        "out_recon": mean_error(lambda r: ones),
        "recon": mean_error(lambda r: lower[r]),
        "recon_layerwise": naive.mean_of(
            mean_error(lambda r, p=p: {p: lower[r][p]}) for p in paths
        ),
        "stochastic_recon": naive.mean_of(
            mean_error(lambda r, s=s: {p: stochastic("stochastic_recon", s, r, p) for p in paths})
            for s in samples
        ),
        "stochastic_recon_layerwise": naive.mean_of(
            mean_error(lambda r, s=s, p=p: {p: stochastic("stochastic_recon_layerwise", s, r, p)})
            for s in samples
            for p in paths
        ),
    }


@pytest.mark.parametrize("recon", ["mse", "kl"])
@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["batch", "batch and position"])
def test_terms_and_gradients_equal_plain_loops(
    model: ComponentModel, shape: tuple[int, ...], recon: ReconKind
):
    batch = 2 * torch.randn(*shape, 4).double()
    objective = make_objective(model, ALL_LOSSES, recon)
    drawn = objective.draw_noise(batch, stream="train", seed=0, step=0)
    noise = {key: value.double() for key, value in drawn.items()}
    parameters = model.subcomponent_parameters()

    expected = naive_terms(model, batch, noise, recon)
    total, logged, _ = objective(batch, torch.tensor(0.0), noise)
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"loss/{name}"], value.detach(), msg=name)
    weighted = torch.stack(
        [ALL_LOSSES[name]["coeff"] * term for name, term in expected.items()]
    ).sum()
    torch.testing.assert_close(total, weighted)
    own = torch.autograd.grad(total, list(parameters.values()))
    other = torch.autograd.grad(weighted, list(parameters.values()))
    for name, left, right in zip(parameters, own, other, strict=True):
        torch.testing.assert_close(left, right, msg=name)


def test_the_test_model_covers_every_branch_of_the_sigmoids(model: ComponentModel):
    g = model.causal_importances(model.target_forward(2 * torch.randn(4, 4).double()).site_inputs)
    lower, upper = (torch.cat([x.flatten() for x in part.values()]) for part in g)
    assert (lower < 0).any() and ((lower > 0) & (lower < 1)).any() and (upper > 1).any()


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("faithfulness", {"V", "U"}),
        ("importance_minimality", {"V", "importance"}),
        ("schatten", {"V", "U", "importance"}),
        ("out_recon", {"V", "U"}),
        ("recon", {"V", "U", "importance"}),
        ("recon_layerwise", {"V", "U", "importance"}),
        ("stochastic_recon", {"V", "U", "importance"}),
        ("stochastic_recon_layerwise", {"V", "U", "importance"}),
    ],
)
def test_which_parameters_a_loss_moves(model: ComponentModel, name: str, reached: set[str]):
    batch = torch.randn(64, 4).double()
    (term,) = terms_of(make_objective(model, {name: ALL_LOSSES[name]}), batch).values()
    term.backward()
    for parameter_name, parameter in model.subcomponent_parameters().items():
        last = parameter_name.rpartition(".")[2]
        kind = last if last in ("V", "U") else "importance"
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == (kind in reached), parameter_name


def test_a_loss_with_coefficient_zero_costs_nothing():
    torch.manual_seed(0)
    target = MLP()
    model = decompose(target, MLP_SITES)
    off = {name: {**spec, "coeff": 0} for name, spec in ALL_LOSSES.items()}
    batch = torch.randn(6, 4)

    def calls(losses: dict[str, Any]) -> tuple[int, set[str], int]:
        objective = make_objective(model, losses)
        noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
        before = target.n_calls
        _, logged, _ = objective(batch, torch.tensor(0.0), noise)
        terms = {key for key in logged if key.startswith("loss/")}
        return target.n_calls - before, terms, len(noise)

    assert calls({**off, "faithfulness": {"coeff": 1.0}}) == (
        1,  # the target's own pass, which the importances need
        {"loss/total", "loss/faithfulness"},
        0,
    )
    n_calls, _, n_draws = calls({**off, "stochastic_recon": {"coeff": 1.0, "n_samples": 2}})
    assert (n_calls, n_draws) == (1 + 2, 2 * 3)
    n_calls, _, _ = calls({"stochastic_recon_layerwise": {"coeff": 1.0, "n_samples": 2}})
    assert n_calls == 1 + 2 * 3


@pytest.mark.parametrize("spec", [None, {"coeff": None}], ids=["null", "coeff null"])
def test_a_null_coefficient_is_one_clear_error(spec: Any):
    raw = {"sites": {"a": 1}, "steps": 1, "lr": 1.0, "losses": {"stochastic_recon": spec}}
    with pytest.raises(UserError, match=r"losses\.stochastic_recon.*coeff"):
        parse(SPDConfig, raw, "test")


def test_powers_below_one_have_finite_gradients_at_zero(model: ComponentModel):
    g = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    power = safe_power(g, 0.5)
    torch.testing.assert_close(power, torch.tensor([0.0, 0.5, 1.0]))
    (slope,) = torch.autograd.grad(power.sum(), g)
    torch.testing.assert_close(slope, torch.tensor([0.0, 1.0, 0.5]))

    upper = {  # sites of different C, one of them without any importance at all
        path: torch.rand(5, C).double().requires_grad_()
        if path == "last"
        else torch.zeros(5, C).double().requires_grad_()
        for path, C in MLP_SITES.items()
    }
    for term in (importance_minimality(upper, 0.5), schatten(upper, model.sites, 0.5)):
        grads = torch.autograd.grad(term, list(upper.values()))
        assert term.isfinite() and all(grad.isfinite().all() for grad in grads)
        assert grads[-1].abs().sum() > 0


@pytest.mark.parametrize("pnorm", [1.0, 2.0])
def test_whole_powers(pnorm: float):
    x = torch.tensor([0.0, 0.3, 1.2], requires_grad=True)
    (slope,) = torch.autograd.grad(safe_power(x, pnorm).sum(), x)
    torch.testing.assert_close(safe_power(x, pnorm), x**pnorm)
    torch.testing.assert_close(slope, pnorm * x.detach() ** (pnorm - 1))


def test_the_layerwise_loss_has_noise_of_its_own(model: ComponentModel):
    names = ("stochastic_recon", "stochastic_recon_layerwise")
    objective = make_objective(model, {name: ALL_LOSSES[name] for name in names})
    batch = torch.randn(6, 4).double()
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    joint, layerwise = ([v for k, v in noise.items() if k.startswith(f"{n}.")] for n in names)
    assert len(joint) == len(layerwise) == N_SAMPLES * len(MLP_SITES)
    assert not any(torch.equal(a, b) for a, b in zip(joint, layerwise, strict=True))

    before = terms_of(objective, batch, noise)
    other = {k: 1 - v if k.startswith(f"{names[1]}.") else v for k, v in noise.items()}
    after = terms_of(objective, batch, other)
    assert torch.equal(before[names[0]], after[names[0]])
    assert not torch.equal(before[names[1]], after[names[1]])


def test_two_losses_of_one_type_under_names_of_their_own(model: ComponentModel):
    losses = {
        "importance_minimality": {"coeff": 1.0, "pnorm": 1.0},
        "squared": {"type": "importance_minimality", "coeff": 1.0, "pnorm": 2.0},
    }
    terms = terms_of(make_objective(model, losses), torch.randn(6, 4).double())
    assert list(terms) == list(losses) and terms["squared"] != terms["importance_minimality"]


@pytest.mark.parametrize("unembed", [None, "lm_head"])
def test_embedding_reconstruction_equals_a_plain_loop(unembed: str | None):
    torch.manual_seed(0)
    model = decompose(TokenModel(), {"embed": 6}).double()
    spec = {"coeff": 1.0, "n_samples": 2, "unembed": unembed}
    objective = make_objective(model, {"embedding_recon": spec}, recon="kl")
    tokens = torch.randint(0, 11, (2, 3))
    noise = objective.draw_noise(tokens, stream="train", seed=0, step=0)
    (own,) = terms_of(objective, tokens, noise).values()

    site = model.sites["embed"]
    g = model.causal_importances({"embed": tokens}).lower["embed"]
    head = model.target.get_submodule("lm_head")
    errors = []
    for sample in range(2):
        for b in range(2):
            for t in range(3):
                m = g[b, t] + (1 - g[b, t]) * noise[f"embedding_recon.{sample}.embed"][b, t]
                masked = naive.masked_weight(site, m)[tokens[b, t]]
                original = site.weight[tokens[b, t]]
                errors.append(
                    ((masked - original) ** 2).sum()
                    if unembed is None
                    else naive.kl(head(masked), head(original))
                )
    torch.testing.assert_close(own, naive.mean_of(errors))
    grads = torch.autograd.grad(own, list(model.subcomponent_parameters().values()))
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_embedding_reconstruction_needs_one_embedding_and_a_known_unembedding():
    spec = {"embedding_recon": {"coeff": 1.0, "unembed": "lm_hed"}}
    for sites, message in (({"embed": 3}, "lm_head"), ({"embed": 3, "mid": 3}, "one site")):
        model = decompose(TokenModel(), sites)
        objective = make_objective(model, spec)
        with pytest.raises(UserError, match=message):
            objective.losses["embedding_recon"].check(model)


def test_reconstruction_errors_on_hand_computed_numbers():
    target = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    prediction = torch.tensor([[[1.0, 0.0], [1.0, 5.0]]])
    assert recon_error(prediction, target, "mse") == pytest.approx((1 + 9) / 4)

    p = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    q = torch.tensor([[[0.9, 0.1], [0.25, 0.75]]])
    first = 0.5 * torch.log(torch.tensor([0.5 / 0.9, 0.5 / 0.1])).sum()
    shifted = q.log() + torch.tensor([[[3.0], [-2.0]]])  # logits: a constant does not matter
    torch.testing.assert_close(kl_divergence(shifted, p.log()), first / 2)
    assert kl_divergence(p.log(), p.log()) == 0
