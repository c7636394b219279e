"""Sources of masks: numbers worked out by hand, and what each is when the others are switched off."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.config import UserError
from spd.engine.sequential import Sequential
from spd.engine.step import slopes_of
from spd.losses import MaskedRecon, StepContext, loss_terms
from spd.masks import SiteMask, uniform_k_subsets
from spd.objective import Objective
from spd.sources import adam_ascent, of_slots, source_shape, to_slots
from tests.toy import MLP, MLP_SITES, decompose, make_objective

PROGRESS = torch.tensor(0.5)


def one_matrix(C: int, losses: dict[str, Any], V: list[float], U: list[float]) -> Objective:
    """x → x, one number, with C subcomponents of these reads and writes; importances are affine."""
    model = decompose(nn.Sequential(nn.Linear(1, 1, bias=False)), {"0": C}, n_hidden=0)
    site = model.sites["0"]
    with torch.no_grad():
        site.weight.fill_(1.0)
        site.subcomponents.V.copy_(torch.tensor([V]))
        site.subcomponents.U.copy_(torch.tensor(U)[:, None])
    return make_objective(model, losses)


def fix_importances(objective: Objective, g: list[float]) -> None:
    with torch.no_grad():
        for name, parameter in objective.model.subcomponent_parameters().items():
            if name.endswith("importance.weight"):
                parameter.zero_()
            if name.endswith("importance.bias"):
                parameter.copy_(torch.tensor(g))


# --- routing over random subsets of the sites ---------------------------------------------------------


@pytest.mark.parametrize("L", [4, 24])
def test_a_site_is_masked_as_often_as_the_rule_says(L: int):
    n = 200_000 if L == 4 else 20_000
    draws = torch.rand(n, L + 1, generator=torch.Generator().manual_seed(0))
    chosen = uniform_k_subsets(draws)
    k = chosen.sum(dim=1)
    assert k.min() == 1 and k.max() == L
    within = 5 / math.sqrt(n)
    assert chosen.float().mean(dim=0).tolist() == pytest.approx([(L + 1) / (2 * L)] * L, abs=within)
    assert (k == L).float().mean().item() == pytest.approx(1 / L, abs=within)
    only = [(chosen[:, s] & (k == 1)).float().mean().item() for s in range(L)]
    assert only == pytest.approx([1 / L**2] * L, abs=within)


def test_of_equal_draws_one_is_chosen():
    chosen = uniform_k_subsets(torch.tensor([[0.5, 0.5, 0.5, 0.0], [0.1, 0.1, 0.0, 0.4]]))
    assert chosen.tolist() == [[True, False, False], [True, False, True]]


def test_every_position_is_routed_by_itself_and_a_site_left_out_is_the_frozen_one():
    torch.manual_seed(0)
    source = {"type": "uniform", "routing": "uniform_k"}
    objective = make_objective(
        decompose(MLP(), MLP_SITES), {"masked_recon": {"coeff": 1.0, "source": source}}
    )
    batch = torch.randn(6, 4)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    assert noise["masked_recon.routing"].shape == (6, 4)
    noise["masked_recon.routing"] = torch.tensor([[0.9, 0.9, 0.1, 0.0]] * 6)  # `last` alone
    ctx = objective.context(batch, PROGRESS, noise)
    (value,) = loss_terms(objective.losses, ctx).values()
    site = objective.model.sites["last"]
    x, g = ctx.site_inputs["last"], ctx.ci.lower["last"]
    assert isinstance(x, Tensor) and site.bias is not None
    m = g + (1 - g) * noise["masked_recon.0.last"]
    delta = noise["masked_recon.delta.0.last"]
    V, U = site.subcomponents.V, site.subcomponents.U
    out = ((x @ V) * m) @ U + delta[:, None] * (x @ (site.target_weight - V @ U)) + site.bias
    torch.testing.assert_close(value, (out - ctx.target_out).square().mean())


def test_sites_of_other_positions_cannot_be_routed_together():
    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(7, 3), nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.tokens(ids) + self.positions(torch.arange(5))

    source = {"type": "uniform", "routing": "uniform_k"}
    model = decompose(WithPositions(), {"tokens": 4, "positions": 4})
    objective = make_objective(model, {"masked_recon": {"coeff": 1.0, "source": source}})
    with pytest.raises(UserError, match="'tokens' has 10 positions in a batch and 'positions' 5"):
        objective.noise(torch.zeros(2, 5, dtype=torch.long), stream="train", seed=0, step=0)


# --- the adversary of a step --------------------------------------------------------------------------


def pgd_errors(g: list[float], start: list[float], n_steps: int, step_size: float = 0.1) -> float:
    source = {"type": "pgd", "n_steps": n_steps, "step_size": step_size}
    losses = {"masked_recon": {"coeff": 1.0, "source": source}}
    objective = one_matrix(2, losses, [1.0, 1.0], [2.0, -1.0])
    fix_importances(objective, g)
    noise = {"masked_recon.r.0": torch.tensor([[*start, 0.3]])}
    ctx = objective.context(torch.ones(1, 1), PROGRESS, noise)
    functional = ctx._replace(functional=True)
    (own,) = loss_terms(objective.losses, ctx).values()
    (same,) = loss_terms(objective.losses, functional).values()
    torch.testing.assert_close(own, same)
    return own.item()


def test_projected_ascent_by_hand():
    found = [pgd_errors([0.0, 0.0], [0.5, 0.5], n) for n in range(1, 7)]
    assert found == pytest.approx([0.64, 1.21, 1.96, 2.89, 4.0, 4.0], abs=1e-5)
    assert pgd_errors([1.0, 0.0], [0.5, 0.5], 20) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("g", "expected"), [([0.0, 0.0], 2 / 3), ([1.0, 0.0], 1 / 3)])
def test_the_mean_over_uniform_masks_by_hand(g: list[float], expected: float):
    losses = {"masked_recon": {"coeff": 1.0, "source": {"type": "uniform"}}}
    objective = one_matrix(2, losses, [1.0, 1.0], [2.0, -1.0])
    fix_importances(objective, g)
    batch = torch.ones(100_000, 1)
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    (value,) = loss_terms(objective.losses, objective.context(batch, PROGRESS, noise)).values()
    assert value.item() == pytest.approx(expected, abs=0.01)


def test_with_all_subcomponents_the_error_is_0_and_with_none_1():
    losses = {"out_recon": {"coeff": 1.0}, "recon": {"coeff": 1.0}}
    objective = one_matrix(2, losses, [1.0, 1.0], [2.0, -1.0])
    fix_importances(objective, [0.0, 0.0])
    ctx = objective.context(torch.ones(1, 1), PROGRESS, {})
    assert [value.item() for value in loss_terms(objective.losses, ctx).values()] == [0.0, 1.0]


# --- sources that are kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.5, [0.51, 0.51, 0.505949]), (0.01, [0.51, 0.503854, 0.496767])]
)
def test_the_ascent_of_sources_by_hand(beta: float, expected: list[float]):
    r, moments = torch.tensor(0.5), (torch.tensor(0.0), torch.tensor(0.0))
    found = []
    for n, slope in enumerate((2.0, -1.0, -1.0), start=1):
        r, *both = adam_ascent(
            r,
            moments,
            torch.tensor(slope),
            powers=(torch.tensor(beta**n), torch.tensor(0.99**n)),
            lr=0.01,
            betas=(beta, 0.99),
            eps=1e-8,
        )
        moments = both[0], both[1]
        found.append(r.item())
    assert found == pytest.approx(expected, abs=2e-6)


def test_sources_stay_between_0_and_1():
    r, zero = torch.tensor([0.999, 0.001]), torch.zeros(2)
    moved, *_ = adam_ascent(
        r,
        (zero, zero),
        torch.tensor([1.0, -1.0]),
        powers=(torch.tensor(0.0), torch.tensor(0.99)),
        lr=0.01,
        betas=(0.0, 0.99),
        eps=1e-8,
    )
    assert moved.tolist() == [1.0, 0.0]


BY_HAND: dict[str, Any] = {"type": "persistent", "scope": "bc", "lr": 0.01, "lr_ramp": 0.0}


def taken_step(
    objective: Objective, inputs: Any, state: dict[str, Tensor], *, together: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is logged, and the new state; gradients are left in the parameters."""
    probes = objective.probes(state)
    if together:
        total, logged, new = objective(*inputs, None, state, None, probes)
        total.backward()
    else:
        logged, new = Sequential(objective)(*inputs, state=state, probes=probes)
    return logged, {**new, **objective.climb(new, slopes_of(probes), inputs[1])}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("coeff", [1.0, 0.3, 1e-12])
def test_a_step_in_its_order_by_hand(together: bool, coeff: float):
    """The sources do not see the coefficient of the term."""
    for n_warmup, expected in ((2, 0.331797), (0, 0.3136)):
        source = {**BY_HAND, "n_warmup": n_warmup}
        objective = one_matrix(
            1, {"masked_recon": {"coeff": coeff, "source": source}}, [1.0], [0.8]
        )
        fix_importances(objective, [0.25])
        batch = torch.ones(1, 1)
        state = dict(objective.begun(objective.initial_state(), batch, seed=0))
        state["masked_recon.r.0"] = torch.tensor([[0.2, 0.6]])
        logged, new = taken_step(objective, (batch, PROGRESS, {}), state, together=together)
        assert logged["loss/masked_recon"].item() == pytest.approx(expected, abs=2e-6)
        assert new["masked_recon.n_updates"].item() == n_warmup + 1
        if n_warmup == 0:
            continue
        assert new["masked_recon.r.0"].flatten().tolist() == pytest.approx(
            [0.169918, 0.569918], abs=2e-6
        )
        site = objective.model.sites["0"]
        grads = [site.subcomponents.V.grad, site.subcomponents.U.grad]
        grads += [dict(site.own_importance().named_parameters())["bias"].grad]
        values = [grad.item() / coeff for grad in grads if grad is not None]
        assert values == pytest.approx([0.179712, 0.224641, -0.755757], abs=2e-6)


def test_the_sources_after_the_warm_ups_by_hand():
    for n_warmup, expected in ((1, [0.19, 0.59]), (2, [0.179977, 0.579977])):
        source = {**BY_HAND, "n_warmup": n_warmup}
        objective = one_matrix(1, {"masked_recon": {"coeff": 1.0, "source": source}}, [1.0], [0.8])
        fix_importances(objective, [0.25])
        batch = torch.ones(1, 1)
        state = dict(objective.begun({}, batch, seed=0))
        state["masked_recon.r.0"] = torch.tensor([[0.2, 0.6]])
        _, _, new = objective(batch, PROGRESS, {}, None, state)
        assert new["masked_recon.r.0"].flatten().tolist() == pytest.approx(expected, abs=2e-6)


def test_the_rate_rises_over_the_first_part_of_the_run():
    ascent = (
        make_objective(
            decompose(MLP(), MLP_SITES),
            {"masked_recon": {"coeff": 1.0, "source": {"type": "persistent", "scope": "c"}}},
        )
        .losses["masked_recon"]
        .ascent
    )
    assert ascent is not None
    rates = [float(ascent.rate(torch.tensor(t))) for t in (0.0, 0.0125, 0.025, 0.5, 1.0)]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.01])


def test_what_has_a_source_of_its_own():
    text, toy = torch.Size((2, 3)), torch.Size((2,))
    shapes = {scope: source_shape(scope, text, 4) for scope in ("c", "sc", "bc", "bsc")}
    assert shapes == {"c": (1, 1, 5), "sc": (1, 3, 5), "bc": (2, 1, 5), "bsc": (2, 3, 5)}
    assert source_shape("c", toy, 4) == (1, 5) and source_shape("bc", toy, 4) == (2, 5)
    with pytest.raises(UserError, match="scope: 'sc' has a source for each position"):
        source_shape("sc", toy, 4)


def test_slots_there_and_back():
    r, slots = torch.arange(10.0).reshape(5, 2), torch.tensor([3, 0, 5])  # the last fills up
    rows = of_slots(r, slots)
    assert rows[:2].tolist() == [[6.0, 7.0], [0.0, 1.0]]
    back = to_slots(torch.tensor([[1.0, 2], [3, 4], [9, 9]]), slots, 5)
    assert back.tolist() == [[3.0, 4], [0, 0], [0, 0], [1, 2], [0, 0]]


class Tokens(nn.Module):
    """Two matrices at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("scope", ["c", "sc", "bc", "bsc"])
def test_slopes_are_those_of_the_sum_over_slots(scope: str):
    """Moments after a single ascent from 0 tell what it has climbed: (1 − β₁) times the slope."""
    torch.manual_seed(0)
    source = {"type": "persistent", "scope": scope, "n_warmup": 1, "lr_ramp": 0.0}
    losses = {"masked_recon": {"coeff": 0.7, "source": source}}
    objective = make_objective(decompose(Tokens(), {"first": 6, "last": 4}), losses)
    batch = torch.randn(3, 2, 4)
    state = objective.begun({}, batch, seed=0)
    ctx = objective.context(batch, PROGRESS, {}, state=state)
    _, _, new = objective(batch, PROGRESS, {}, None, state)
    sources = {p: state[f"masked_recon.r.{p}"].clone().requires_grad_() for p in ("first", "last")}
    masks = {}
    for path, r in sources.items():
        g = ctx.ci.lower[path].detach()
        C = g.shape[-1]
        masks[path] = SiteMask(g + (1 - g) * r[..., :C], r[..., C].expand(3, 2))
    rows = (objective.model(batch, masks) - ctx.target_out).square().mean(dim=-1)  # [3, 2]
    slots = {"c": rows.mean(), "sc": rows.mean(dim=0).sum()}
    slots |= {"bc": rows.mean(dim=1).sum(), "bsc": rows.sum()}
    expected = torch.autograd.grad(slots[scope], list(sources.values()))
    for path, slope in zip(sources, expected, strict=True):
        own = new[f"masked_recon.first_moment.{path}"]
        assert own.shape == slope.shape
        torch.testing.assert_close(own, 0.5 * slope)


# --- the merged term -------------------------------------------------------------------------------------


def merged_objective(source: dict[str, Any]) -> Objective:
    torch.manual_seed(0)
    losses = {"masked_recon": {"coeff": 1.0, "source": source}}
    return make_objective(decompose(MLP(), MLP_SITES), losses)


@pytest.mark.parametrize("together", [True, False])
def test_the_merged_term_at_both_ends(together: bool):
    settings = {"scope": "bc", "lr_ramp": 0.0}
    pairs = {
        1.0: {"type": "persistent", **settings},
        0.0: {"type": "uniform", "routing": "uniform_k"},
    }
    batch = torch.randn(5, 4)
    for fraction, alone in pairs.items():
        found = []
        for source in ({"type": "merged", "adv_fraction": fraction, **settings}, alone):
            objective = merged_objective(source)
            noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
            state = dict(objective.begun({}, batch, seed=0))
            inputs = (batch, PROGRESS, noise)
            logged, new = taken_step(objective, inputs, state, together=together)
            parameters = objective.model.subcomponent_parameters()
            grads = {n: p.grad for n, p in parameters.items()}
            found.append(({**logged, **grads}, new))
        (own, own_new), (expected, expected_new) = found
        for name, value in expected.items():
            torch.testing.assert_close(own[name], value, msg=name)
        for name, value in expected_new.items():
            torch.testing.assert_close(own_new[name], value, msg=name)


@pytest.mark.parametrize("together", [True, False])
def test_an_element_that_is_not_adversarial_gives_its_sources_nothing(together: bool):
    objective = merged_objective({"type": "merged", "scope": "bc", "n_warmup": 0, "lr_ramp": 0.0})
    batch = torch.randn(6, 4)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    noise["masked_recon.adversarial"] = torch.tensor([0.1, 0.9, 0.5, 0.49, 0.7, 0.2])
    state = dict(objective.begun({}, batch, seed=0))
    _, new = taken_step(objective, (batch, PROGRESS, noise), state, together=together)
    for path in MLP_SITES:
        moved = new[f"masked_recon.first_moment.{path}"].abs().sum(dim=1) > 0
        assert moved.tolist() == [True, False, False, True, False, True]


def test_one_kind_of_step_moves_sources_as_the_other():
    """With a fixed part of the batch adversarial, some steps on end, in one graph and one after another."""
    found = []
    for together in (True, False):
        objective = merged_objective({"type": "merged", "scope": "c", "lr_ramp": 0.0})
        batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        state = dict(objective.begun({}, batch, seed=0))
        for step in range(3):
            noise = objective.draw_noise(batch, stream="train", seed=0, step=step)
            _, state = taken_step(objective, (batch, PROGRESS, noise), state, together=together)
        grads = {n: p.grad for n, p in objective.model.subcomponent_parameters().items()}
        found.append({**state, **grads})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_sources_are_drawn_once_for_the_first_batch_and_need_batches_of_its_size():
    objective = merged_objective({"type": "merged", "scope": "bc"})
    state = objective.begun({}, torch.zeros(5, 4), seed=3)
    again = objective.begun({}, torch.ones(5, 4), seed=3)
    other = objective.begun({}, torch.ones(5, 4), seed=4)
    key = "masked_recon.r.first"
    assert state[key].shape == (5, 8) and state[key].min() >= 0 and state[key].max() < 1
    assert torch.equal(state[key], again[key]) and not torch.equal(state[key], other[key])
    assert torch.equal(objective.begun(state, torch.zeros(5, 4), seed=9)[key], state[key])
    with pytest.raises(UserError, match="after 5 a batch of 4 came; a constant size, or scope c"):
        objective.begun(state, torch.zeros(4, 4), seed=3)
    held_out = objective.begun(state, torch.zeros(7, 4), seed=3, training=False)
    assert torch.equal(held_out[key], torch.cat([state[key], state[key][:2]]))


def test_no_gradient_of_an_ascent_reaches_what_is_trained():
    objective = merged_objective({"type": "persistent", "scope": "bc", "n_warmup": 3})
    batch = torch.randn(4, 4)
    state = objective.begun({}, batch, seed=0)
    ctx = objective.context(batch, PROGRESS, {}, state=state)
    for functional in (True, False):
        own = ctx._replace(term="masked_recon", functional=functional)
        slopes = own.slopes(
            lambda r, own=own: objective.losses["masked_recon"].climbed_error(own, r), own.sources()
        )
        assert all(slope.any() and not slope.requires_grad for slope in slopes.values())
    parameters = objective.model.subcomponent_parameters().values()
    assert all(p.grad is None and p.requires_grad for p in parameters)


def context_of(objective: Objective, batch: Tensor) -> StepContext:
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    return objective.context(batch, PROGRESS, noise)


def test_the_remainder_is_a_part_of_stochastic_passes_where_that_is_wanted():
    torch.manual_seed(0)
    batch = torch.randn(6, 4)
    values = []
    for delta, kind in itertools.product(
        (False, True), ("stochastic_recon", "stochastic_recon_layerwise")
    ):
        torch.manual_seed(0)
        model = decompose(MLP(), MLP_SITES)
        objective = make_objective(model, {kind: {"coeff": 1.0, "delta": delta}})
        ctx = context_of(objective, batch)
        names = [key for key in ctx.noise if ".delta." in key]
        assert len(names) == (3 if delta else 0)
        (value,) = loss_terms(objective.losses, ctx).values()
        values.append(value.item())
    assert values[0] != values[2] and values[1] != values[3]


class OffFor(MaskedRecon):
    """A schedule has brought its coefficient to 0."""

    def coefficient(self, progress: Tensor) -> Tensor:
        return 0.0 * progress


@pytest.mark.parametrize("together", [True, False])
def test_sources_climb_on_where_a_schedule_has_switched_the_term_off(together: bool):
    source = {**BY_HAND, "n_warmup": 2}
    objective = one_matrix(1, {"masked_recon": {"coeff": 1.0, "source": source}}, [1.0], [0.8])
    objective.losses["masked_recon"] = OffFor.model_validate({"coeff": 1.0, "source": source})
    fix_importances(objective, [0.25])
    batch = torch.ones(1, 1)
    state = dict(objective.begun({}, batch, seed=0))
    state["masked_recon.r.0"] = torch.tensor([[0.2, 0.6]])
    _, new = taken_step(objective, (batch, PROGRESS, {}), state, together=together)
    expected = [0.169918, 0.569918]
    assert new["masked_recon.r.0"].flatten().tolist() == pytest.approx(expected, abs=2e-6)
    for parameter in objective.model.subcomponent_parameters().values():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-19
