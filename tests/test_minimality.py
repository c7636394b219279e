"""Penalties of importances, the cost of frequencies, faithfulness: against numbers computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine.compilation import CompiledStep
from spd.engine.distributed import mean_over_processes
from spd.engine.members import warm_up
from spd.engine.prepare import Prepared, evaluate, prepare
from spd.importance import AffineImportanceConfig
from spd.losses import (
    StepContext,
    faithfulness,
    mean_of_columns,
    relative_faithfulness,
    state_key,
)
from spd.losses.minimality import (
    RunningMean,
    SmoothL0Penalty,
    cost_of_estimate,
    frequency_cost,
    frequency_cost_slope,
    smooth_l0,
)
from spd.objective import Objective
from spd.optimize import Member, Silent, run_side_by_side, run_steps
from spd.problem import Problem
from spd.spd_config import SPDConfig, WarmupConfig
from tests.carried_state import prepared, result_of
from tests.toy import make_config

U = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).double()
LP1 = {"type": "lp", "p": 1.0, "eps": 1e-300}
GAMMA = {"peak": 1.0, "segments": [{"to": 0.01}]}


def objective(losses: dict[str, Any], C: int = 2) -> Objective:
    """One site, whose C importances are what it reads, in float64."""
    target = nn.Sequential(nn.Linear(C, C, bias=False)).double()
    model = ComponentModel(target, {"0": C}, AffineImportanceConfig())
    config = make_config(losses, sites={"0": C}, importance={"type": "affine"})
    with torch.no_grad():
        model.sites["0"].subcomponents.V.copy_(torch.eye(C))
        model.sites["0"].importance.get_parameter("weight").fill_(1.0)  # pyright: ignore
    return Objective(model.double(), config.losses, "mse")


def context(made: Objective, batch: Tensor, progress: float = 0.0, **changes: Any) -> StepContext:
    state = changes.pop("state", None) or made.initial_state()
    at = torch.tensor(progress).double()
    return made.context(batch, at, {}, state=state)._replace(**changes)


def term(made: Objective, batch: Tensor, **changes: Any) -> float:
    """The only loss, of importances equal to the batch."""
    ((name, spec),) = made.losses.items()
    ctx = context(made, batch, **changes)._replace(term=name)
    return sum(part.item() for part in spec.parts(ctx))


# --- C: the smooth count ---------------------------------------------------------------------------


def test_the_smooth_count():
    u = torch.tensor([0.05, 0.1, 1.0], dtype=torch.float64)
    assert smooth_l0(u, 0.1).tolist() == pytest.approx([0.2, 0.5, 0.990099], abs=1e-6)
    assert smooth_l0(u, 0.1, normalize_at_one=True).tolist() == pytest.approx([0.202, 0.505, 1.0])
    grid = torch.linspace(0, 1, 1_000_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(smooth_l0(grid, 0.1).sum(), grid)
    assert slope.max().item() == pytest.approx(6.495190, abs=1e-6)
    assert grid[slope.argmax()].item() == pytest.approx(0.057735, abs=1e-6)
    assert slope[0] == 0


# --- D: activity and frequency ---------------------------------------------------------------------


def test_activity_and_frequency():
    assert term(objective({"activity": {"coeff": 1.0, "penalty": LP1}}), U) == pytest.approx(1.0)
    for count, expected in ((4, 1.75), (8, 2.501757)):
        losses = {"frequency": {"coeff": 1.0, "penalty": LP1, "reference_count": count}}
        assert term(objective(losses), U) == pytest.approx(expected, abs=1e-6)
    fused = {
        "activity": {"coeff": 1.0, "penalty": LP1},
        "frequency": {"coeff": 0.5, "penalty": LP1, "reference_count": 4},
    }
    total, *_ = objective(fused)(U, torch.tensor(0.0).double(), {})
    assert total.item() == pytest.approx(1.875)


def test_two_that_share_the_work_cost_less_than_one():
    one, two = torch.tensor([0.5]).double(), torch.tensor([0.25, 0.25]).double()
    assert frequency_cost(one, 8).sum().item() == pytest.approx(1.160964, abs=1e-6)
    assert frequency_cost(two, 8).sum().item() == pytest.approx(0.792481, abs=1e-6)


def test_the_mean_over_processes_comes_before_the_logarithm():
    """Four positions over two processes, of which one has a sum of 2 and one of 1 (check D)."""
    column = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)[:, None]
    losses = {"frequency": {"coeff": 1.0, "penalty": LP1, "reference_count": 4}}
    shares = column[:2], column[2:]
    means = [share.mean(dim=0) for share in shares]

    def of_both(own: Tensor) -> Tensor:
        return sum(means, torch.zeros(1).double()) / 2

    found = [term(objective(losses, C=1), share, over_processes=of_both) for share in shares]
    assert found == pytest.approx([1.5, 1.5])
    gradients = []
    for share in shares:
        u = share.clone().requires_grad_()
        made = objective(losses, C=1)
        ctx = context(made, share, over_processes=of_both, term="frequency")
        ctx = ctx._replace(ci=ctx.ci._replace(upper={"0": u}))
        (part,) = made.losses["frequency"].parts(ctx)
        gradients.append(torch.autograd.grad(part, u)[0])
    slope = frequency_cost_slope(column.mean(), 4).item() / 4
    averaged = torch.cat(gradients) / 2  # as the loop does
    assert averaged.flatten().tolist() == pytest.approx([slope] * 4)
    apart = [term(objective(losses, C=1), share) for share in shares]
    assert sum(apart) / 2 != pytest.approx(1.5, abs=0.01), "each by itself is something else"
    ranks = [frequency_cost(mean, 2).item() for mean in means]
    assert sum(ranks) / 2 == pytest.approx(1.042481, abs=1e-6)


def test_rows_that_stand_for_several_count_as_often():
    losses = {
        "frequency": {"coeff": 1.0, "penalty": LP1, "reference_count": 4},
    }
    merged = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).double()
    weights = torch.tensor([2.0, 1.0, 1.0]).double() * 3 / 4
    assert term(objective(losses), merged, row_weights=weights) == pytest.approx(1.75)
    positions = torch.rand(2, 3, 4).double()
    of_positions = torch.rand(2, 3).double()
    expected = torch.einsum("bt,btc->c", of_positions, positions) / 6
    torch.testing.assert_close(mean_of_columns(positions, of_positions), expected)
    torch.testing.assert_close(mean_of_columns(positions.flatten(0, 1), of_positions), expected)
    of_rows = torch.rand(2).double()
    expected = torch.einsum("b,btc->c", of_rows, positions) / 6
    torch.testing.assert_close(mean_of_columns(positions, of_rows), expected)


# --- E: the running mean ---------------------------------------------------------------------------


def test_the_running_mean_and_its_slope():
    mean, e = RunningMean(1.0), torch.zeros(1).double()
    estimates, values, slopes = [], [], []
    for n, f in enumerate((0.5, 0.25)):
        own = torch.tensor([f], dtype=torch.float64, requires_grad=True)
        e = mean.updated(e, own.detach())
        estimate = mean.estimate(e, torch.tensor(n + 1.0).double())
        cost = cost_of_estimate(own, estimate, 4)
        slopes.append(torch.autograd.grad(cost.sum(), own)[0].item())
        estimates.append(estimate.item())
        values.append(cost.item())
    assert estimates == pytest.approx([0.5, 1 / 3])
    assert values == pytest.approx([0.792481, 0.407464], abs=1e-6)
    assert slopes == pytest.approx([2.546759, 2.046790], abs=1e-6)


def test_a_loss_carries_its_running_mean():
    losses = {
        "frequency": {"coeff": 1.0, "penalty": LP1, "reference_count": 4, "half_life": 1.0},
    }
    made = objective(losses, C=1)
    halves = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[1.0], [0], [0], [0]]).double()
    state, found = made.initial_state(), []
    assert set(state) == {state_key("frequency", "mean.0"), state_key("frequency", "n_updates")}
    for batch in halves:
        found.append(term(made, batch, state=state))
        ctx = context(made, batch, state=state)
        assert made.next_state(ctx).keys() == state.keys()
        state = made.next_state(ctx)
    assert found == pytest.approx([0.792481, 0.407464], abs=1e-6)
    assert state["frequency.n_updates"] == 2
    half_life = torch.tensor([1e9]).double()
    assert RunningMean(1e9).updated(0 * half_life, half_life).item() == pytest.approx(math.log(2))


RUNNING = {
    "faithfulness": {"coeff": 1.0},
    "frequency": {
        **{"coeff": 1.0, "penalty": {"type": "smooth_l0", "gamma": 0.5}},
        **{"reference_count": 16, "half_life": 2.0},
    },
}


def test_runs_side_by_side_have_a_running_mean_each(tmp_path: Path):
    def ready(seed: int) -> Prepared:
        return prepared(make_config(RUNNING, steps=4, lr=1e-2, save_every=4, seed=seed))

    runs, folders = [ready(seed) for seed in (0, 1)], [tmp_path / "0", tmp_path / "1"]
    run_side_by_side([Member(r, Silent(), f) for r, f in zip(runs, folders, strict=True)])
    own = [result_of(run, folder) for run, folder in zip(runs, folders, strict=True)]
    assert not torch.equal(own[0]["frequency.mean.first"], own[1]["frequency.mean.first"])
    alone = ready(1)
    run_steps(alone, Silent(), checkpoints=tmp_path / "alone")
    for name, value in result_of(alone, tmp_path / "alone").items():
        torch.testing.assert_close(own[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert own[1]["frequency.n_updates"] == 4


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_with_the_exchange_between_processes():
    run = prepared(make_config(RUNNING))
    made, batch = run.objective, run.eval_batches[0]
    made.over_processes = mean_over_processes  # of one process here: an operation in the graph
    args = (batch, torch.tensor(0.5), {}, None, made.initial_state())
    expected, terms, state = made(*args)
    found, own, new = CompiledStep(made, True, 10)(*args)
    torch.testing.assert_close(found, expected)
    for name, value in {**terms, **state}.items():
        torch.testing.assert_close({**own, **new}[name], value, msg=name)
    found.backward()
    assert any(p.grad is not None for p in made.model.subcomponent_parameters().values())


# --- F: the gradient of both with L_p --------------------------------------------------------------


def test_the_gradient_of_the_fused_form():
    penalty = {"type": "lp", "p": 0.4}
    losses = {
        "activity": {"coeff": 1.0, "penalty": penalty},
        "frequency": {"coeff": 0.5, "penalty": penalty, "reference_count": 4},
    }
    u = torch.tensor([0.2, 0.7, 0.05, 1.0], dtype=torch.float64, requires_grad=True)
    made = objective(losses, C=1)
    ctx = context(made, u.detach()[:, None])
    ctx = ctx._replace(ci=ctx.ci._replace(upper={"0": u[:, None]}))
    parts = {
        name: next(iter(spec.parts(ctx._replace(term=name)))) for name, spec in made.losses.items()
    }
    loss = parts["activity"] + 0.5 * parts["frequency"]
    (gradient,) = torch.autograd.grad(loss, u)
    assert 4 * parts["activity"].item() == pytest.approx(2.694055, abs=1e-6)
    assert loss.item() == pytest.approx(1.308369, abs=1e-6)
    expected = [0.648405, 0.305778, 1.489644, 0.246868]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-6)


# --- H: faithfulness -------------------------------------------------------------------------------


def of_two_sites() -> ComponentModel:
    """Sites 2 × 2 and 2 × 3 with ‖W‖² = 4, off by ‖Δ‖² = 1 and 2."""
    target = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    with torch.no_grad():
        for layer in target:
            layer.weight.fill_(0.0)  # pyright: ignore
            layer.weight[0, 0] = 2.0  # pyright: ignore
    model = ComponentModel(target, {"0": 1, "1": 1}, AffineImportanceConfig()).double()
    with torch.no_grad():
        for site, off in zip(model.sites.values(), (1.0, math.sqrt(2)), strict=True):
            for parameter in (site.subcomponents.V, site.subcomponents.U):
                parameter.zero_()
            site.subcomponents.V[0, 0] = 1.0
            site.subcomponents.U[0, 0] = 2.0
            site.subcomponents.U[0, 1] = off
    return model


def test_faithfulness_in_both_normalisations():
    model = of_two_sites()
    assert faithfulness(model.sites).item() == pytest.approx(0.3)
    assert relative_faithfulness(model.sites).item() == pytest.approx(0.375)
    for normalization, expected in (("entries", 0.3), ("relative", 0.375)):
        losses = {"faithfulness": {"coeff": 1.0, "normalization": normalization}}
        made = Objective(model, make_config(losses).losses, "mse")
        assert term(made, torch.ones(1, 2).double()) == pytest.approx(expected)


@pytest.mark.parametrize(("norm", "clip"), [(0.01, 0.99990001), (1.0, 0.0099999900)])
def test_the_factor_of_a_clip(norm: float, clip: float):
    parameter = nn.Parameter(torch.zeros(1).double())
    parameter.grad = torch.full((1,), norm).double()
    nn.utils.clip_grad_norm_([parameter], 0.01)
    assert parameter.grad.item() / norm == pytest.approx(clip, rel=1e-8)


def problem() -> Problem:
    torch.manual_seed(0)
    batch = torch.rand(4, 3)
    target = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        target[1].weight *= 100  # pyright: ignore
    return Problem(target, iter([batch] * 20), iter([batch] * 4))


def little(losses: dict[str, Any], **changes: Any) -> SPDConfig:
    return make_config(losses, sites={"*": 3}, n_eval_batches=1, **changes)


def test_the_warm_up_is_on_the_normalisation_of_the_run():
    """Over all entries, a matrix that small has a gradient far below the ε of AdamW."""
    moved = {}
    for normalization in ("entries", "relative"):
        losses = {"faithfulness": {"coeff": 1.0, "normalization": normalization}}
        small = problem()
        with torch.no_grad():
            small.target[0].weight *= 1e-5  # pyright: ignore
        run = prepare(small, little(losses))
        V = run.objective.model.sites["0"].subcomponents.V
        before = V.detach().clone()
        warm_up(run, WarmupConfig(steps=1, lr=1e-3))
        moved[normalization] = (V.detach() - before).abs().max().item()
    assert moved["entries"] < 1e-5 and moved["relative"] == pytest.approx(1e-3, rel=0.01)


def test_relative_faithfulness_needs_weights():
    silent = problem()
    nn.init.zeros_(silent.target[1].weight)  # pyright: ignore
    losses = {"faithfulness": {"coeff": 1.0, "normalization": "relative"}}
    with pytest.raises(UserError, match=r"relative divides by ‖W‖², and the weight of '1' is all"):
        prepare(silent, little(losses))


# --- what moves over a run -------------------------------------------------------------------------


class Recorder(Silent):
    def __init__(self) -> None:
        self.trained: list[dict[str, float]] = []
        self.held_out: list[dict[str, float]] = []

    def stepped(self, step: int, values: Any) -> None:
        self.trained.append(dict(values))

    def evaluated(self, step: int, values: Any) -> None:
        self.held_out.append(dict(values))


def test_a_step_and_the_evaluation_before_it_are_of_the_same_quantity():
    """One batch everywhere, parameters that hardly move: what differs is the schedule alone."""
    losses = {
        "activity": {
            "coeff": {"peak": 1.0, "segments": [{"to": 0.5}]},
            "penalty": {"type": "smooth_l0", "gamma": GAMMA},
        },
        "frequency": {
            "coeff": 1.0,
            "penalty": {"type": "lp", "p": {"peak": 2.0, "segments": [{"to": 0.2}]}},
            "reference_count": 100,
            "half_life": 2.0,
        },
    }
    config = little(losses, lr=1e-12, steps=5, log_every=1, eval_every=1)
    recorder = Recorder()
    run_steps(prepare(problem(), config), recorder)
    names = ["loss/total", "loss/activity", "loss/frequency"]
    for trained, held_out in zip(recorder.trained, recorder.held_out, strict=False):
        assert [held_out[f"eval/{name}"] for name in names] == pytest.approx(
            [trained[name] for name in names], rel=1e-5
        )
    course = [row["loss/activity"] for row in recorder.trained]
    assert course[-1] > 1.2 * course[0] > 0, "the count grows as γ falls"
    last = recorder.trained[-1]
    total = 0.5 * last["loss/activity"] + last["loss/frequency"]
    assert last["loss/total"] == pytest.approx(total, rel=1e-5)


def test_without_a_step_an_evaluation_is_of_the_end():
    losses = {
        "activity": {"coeff": 1.0, "penalty": {"type": "smooth_l0", "gamma": GAMMA}},
    }
    run = prepare(problem(), little(losses))
    spec = SmoothL0Penalty(gamma=0.01)
    upper = run.objective.model.importances(run.eval_batches[0]).upper
    expected = sum(spec(u, torch.tensor(0.0)).sum(dim=-1).mean().item() for u in upper.values())
    assert evaluate(run)["eval/loss/activity"] == pytest.approx(expected, rel=1e-4)
