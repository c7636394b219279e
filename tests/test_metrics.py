"""Figures of merit against numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine.prepare import evaluate
from spd.importance import CausalImportances
from spd.losses import StepContext, loss_terms
from spd.metrics import (
    CausesMetric,
    ColumnMatchMetric,
    HeldOutLosses,
    PatternErrorsMetric,
    SparsityMetric,
    assignment,
    collect,
    column_match,
    columns_in_use,
    probe_importances,
)
from spd.problem import Identity, Problem
from tests.solved_toy import solved_toy
from tests.toy import MLP, MLP_SITES, TiedMLP, TokenModel, decompose, make_objective


def problem_of(model: ComponentModel, **known) -> Problem:
    return Problem(model.target, iter(()), iter(()), **known)


# --- MMCS and ML2R ---------------------------------------------------------------------------------

W = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # what features 0 and 1 write: (3, 4) and (0, 2)


def match(V: list[list[float]], U: list[list[float]], min_ratio: float = 0.0):
    return column_match(W, torch.tensor(V), torch.tensor(U), min_ratio=min_ratio)


def test_exact_subcomponents_match_perfectly():
    found = match(V=[[0, 1.0], [2.0, 0]], U=[[0, 1.0], [3.0, 4.0]])
    torch.testing.assert_close(found.mmcs, torch.ones(2))
    torch.testing.assert_close(found.ml2r, torch.ones(2))
    assert found.best.tolist() == [1, 0]


def test_cosine_and_ratio_of_the_best_subcomponent():
    # feature 0: (4, 3) has cosine 24/25 and norm 5; feature 1: (0, 2)/2 is exact at half the size
    found = match(V=[[1.0, 0], [0, 0.5]], U=[[4.0, 3.0], [0, 2.0]])
    torch.testing.assert_close(found.mmcs, torch.tensor([0.96, 1.0]))
    torch.testing.assert_close(found.ml2r, torch.tensor([1.0, 0.5]))


def test_the_sign_of_V_matters():
    same, opposite = [[3.0, 4.0], [0, 2.0]], [[-3.0, -4.0], [0, -2.0]]
    assert match(V=[[-1.0, 0], [0, -1.0]], U=opposite).mmcs.tolist() == pytest.approx([1, 1])
    wrong = match(V=[[-1.0, 0], [0, 1.0]], U=same)
    # feature 0: its own subcomponent points the other way; the other one does not read it at all
    assert wrong.mmcs.tolist() == pytest.approx([0, 1])


def test_an_inert_subcomponent_wins_by_the_published_definition_only():
    V, U = [[1.0, 0, 0.01], [0, 1.0, 0]], [[4.0, 3.0], [0, 2.0], [3.0, 4.0]]
    paper, judged = match(V, U), match(V, U, min_ratio=0.1)
    assert paper.best.tolist() == [2, 1] and judged.best.tolist() == [0, 1]
    torch.testing.assert_close(paper.mmcs, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(paper.ml2r, torch.tensor([0.01, 1.0]))
    torch.testing.assert_close(judged.mmcs, torch.tensor([0.96, 1.0]))
    torch.testing.assert_close(judged.ml2r, torch.tensor([1.0, 1.0]))


def test_a_feature_without_any_eligible_subcomponent_counts_zero():
    found = match(V=[[0.05, 0], [0, 1.0]], U=[[3.0, 4.0], [0, 2.0]], min_ratio=0.1)
    assert found.mmcs.tolist() == [0, 1] and found.ml2r.tolist() == [0, 1]
    assert found.best.tolist() == [-1, 1]


def test_the_metric_reports_means_and_spreads_of_both_definitions():
    model = decompose(TiedMLP(n=2, hidden=2), {"enc": 3})
    with torch.no_grad():
        model.sites["enc"].weight.copy_(W.T)
        model.sites["enc"].subcomponents.V.copy_(torch.tensor([[1.0, 0, 0.01], [0, 0.5, 0]]))
        model.sites["enc"].subcomponents.U.copy_(torch.tensor([[4.0, 3], [0, 2], [3, 4]]))
    values = ColumnMatchMetric(site="enc").build(model, problem_of(model)).compute()
    assert values == {
        "mmcs/enc": pytest.approx(0.98),
        "mmcs_sd/enc": pytest.approx(0.02 * 2**0.5),
        "ml2r/enc": pytest.approx(0.75),
        "ml2r_sd/enc": pytest.approx(0.25 * 2**0.5),
        "mmcs_paper/enc": pytest.approx(1.0),
        "mmcs_paper_sd/enc": pytest.approx(0.0, abs=1e-6),
        "ml2r_paper/enc": pytest.approx(0.255),
        "ml2r_paper_sd/enc": pytest.approx(0.245 * 2**0.5),
    }
    with pytest.raises(UserError, match=r"'nec' is no site \(sites: enc\)"):
        ColumnMatchMetric(site="nec").build(model, problem_of(model))


# --- the assignment of subcomponents to probes -----------------------------------------------------


def test_the_assignment_maximises_the_sum_and_orders_the_rest_by_their_maximum():
    g = torch.tensor([[0.0, 0.9, 0.1, 0.8, 0.3], [0.0, 0.8, 0.1, 0.1, 0.2]])
    # greedily probe 0 takes column 1; the best sum gives it column 3 and column 1 to probe 1
    assert assignment(g).tolist() == [3, 1, 4, 2, 0]
    assert sorted(assignment(g[:, :1]).tolist()) == [0], "fewer columns than probes"


def test_columns_in_use():
    g = torch.tensor([[0.1, 0.11, 0.0, 0.0], [0.1, 0.0, 0.0, 1.0]])
    assert columns_in_use(g).tolist() == [False, True, False, True]


# --- pattern errors of a model ---------------------------------------------------------------------


def importances_become_(model: ComponentModel, path: str, wanted: Tensor) -> None:
    """Affine importances of a site read by one-hot inputs: g of probe j is `wanted[j]` where > 0."""
    site = model.sites[path]
    with torch.no_grad():
        site.subcomponents.V.copy_(wanted)
        site.own_importance().get_parameter("weight").fill_(1.0)
        site.own_importance().get_parameter("bias").zero_()


def test_errors_of_every_known_site_and_in_all():
    torch.manual_seed(0)
    model = decompose(TiedMLP(n=3, hidden=2), {"enc": 5, "dec": 4}, n_hidden=0)
    probes = 1.0 * torch.eye(3)
    perfect = torch.eye(3, 5)[:, [4, 2, 0, 1, 3]]
    importances_become_(model, "enc", perfect)
    known = problem_of(model, probes=probes, solution={"enc": Identity(3)})
    metric = PatternErrorsMetric().build(model, known)
    assert metric.compute() == {"errors/enc": 0.0, "errors/total": 0.0, "matches": 1.0}
    torch.testing.assert_close(probe_importances(model, probes)["enc"], perfect)

    perfect[0, 0] = 0.5
    importances_become_(model, "enc", perfect)
    assert metric.compute() == {"errors/enc": 1.0, "errors/total": 1.0, "matches": 0.0}

    both = problem_of(model, probes=probes, solution={"enc": Identity(3), "dec": Identity(3)})
    values = PatternErrorsMetric().build(model, both).compute()
    assert values["errors/total"] == values["errors/enc"] + values["errors/dec"]


def test_importances_on_probes_are_clipped():
    model = decompose(TiedMLP(n=3, hidden=2), {"enc": 3}, n_hidden=0)
    importances_become_(model, "enc", torch.tensor([[3.0, -5.0, 0.5]] * 3))
    expected = torch.tensor([[1.0, 0.0, 0.5]] * 3)
    torch.testing.assert_close(probe_importances(model, torch.eye(3))["enc"], expected)


def test_pattern_errors_need_a_known_solution():
    model = decompose(TiedMLP(), {"enc": 3})
    elsewhere = problem_of(model, probes=torch.eye(5), solution={"dec": Identity(5)})
    for problem in (problem_of(model), elsewhere):
        with pytest.raises(UserError, match="no known solution"):
            PatternErrorsMetric().build(model, problem)


# --- the verdict --------------------------------------------------------------------------------------


def test_what_costs_too_much_is_computed_at_the_end_alone():
    assert CausesMetric.at_end and not PatternErrorsMetric.at_end
    prepared = solved_toy()
    config = prepared.config.model_copy(update={"metrics": {"causes": CausesMetric()}})
    prepared = prepared._replace(config=config)
    on_the_way, last = evaluate(prepared, at_end=False), evaluate(prepared)
    assert "eval/solved" in last and "eval/unfaithful/linear1" in last
    assert on_the_way == {key: last[key] for key in last if key.startswith("eval/loss/")}


def test_the_verdict_names_what_is_beyond_its_limit():
    figures = {"solved": 0.0, "unfaithful/a": 0.06, "unfaithful/b": 0.05, "effect_errors/a": 0.0}
    found = CausesMetric().conclusion({**figures, "adversarial/20_steps": 0.4})
    assert found is not None and found.solved is False
    assert found.detail == (
        "beyond the limits: a: faithful: W - V U is 0.06 of W (at most 0.05); adversary: masks between"
        " g and 1 cost 0.4 of ablating everything (at most 0.1)"
    )
    assert CausesMetric().conclusion({"unfaithful/a": 1.0}) is None, "not judged yet"
    without = CausesMetric().conclusion({"solved": 1.0, "unfaithful/a": 0.0})
    assert without is not None and "without a solution" in without.headline


# --- sparsity --------------------------------------------------------------------------------------


def context_with(model: ComponentModel, lower: dict[str, Tensor]) -> StepContext:
    empty = torch.empty(0)
    ci = CausalImportances(lower, lower)
    return StepContext(model, empty, empty, {}, ci, "mse", {}, torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(40,), (8, 5)], ids=["batch", "batch and position"])
def test_counts_equal_plain_loops_for_sites_of_different_C(shape: tuple[int, ...]):
    torch.manual_seed(0)
    model = decompose(MLP(), MLP_SITES)
    values = torch.tensor([-0.01, 0.0, 0.01, 0.02, 0.1, 0.2, 1.0])  # thresholds 0.01 and 0.1
    batches = []
    for _ in range(2):
        drawn = {p: values[torch.randint(0, 7, (*shape, C))] for p, C in MLP_SITES.items()}
        for g in drawn.values():
            g[..., 0], g[..., 1] = 0.0, 0.1  # never alive
        batches.append(drawn)
    rare = batches[1]["last"]
    rare[..., 2] = 0.0
    rare[0, ..., 2] = 0.5
    batches[0]["last"][..., 2] = 0.0
    metric = SparsityMetric().build(model, problem_of(model))
    found = collect([metric], [context_with(model, drawn) for drawn in batches])

    for path, C in MLP_SITES.items():
        rows = [row for drawn in batches for row in drawn[path].reshape(-1, C).tolist()]
        l0 = sum(sum(round(g, 6) > 0.01 for g in row) for row in rows) / len(rows)
        active = [[round(row[c], 6) > 0.1 for row in rows] for c in range(C)]
        assert found[f"l0/{path}"] == pytest.approx(l0)
        assert found[f"alive/{path}"] == sum(any(column) for column in active)
        density = sum(sum(column) for column in active) / (len(rows) * C)
        assert found[f"density/{path}"] == pytest.approx(density)
    assert found["alive/first"] == MLP_SITES["first"] - 2


def test_sites_that_see_different_numbers_of_rows():
    """As the embedding of positions does, whose input has no batch axis."""
    model = decompose(TokenModel(), {"embed": 2, "mid": 2})
    lower = {"embed": torch.tensor([[[0.5, 0.0]] * 3] * 4), "mid": torch.tensor([[0.5, 0.0]] * 3)}
    found = collect(
        [SparsityMetric().build(model, problem_of(model))], [context_with(model, lower)]
    )
    for path in ("embed", "mid"):
        assert found[f"l0/{path}"] == 1.0 and found[f"alive/{path}"] == 1.0
        assert found[f"density/{path}"] == 0.5


# --- held-out losses -------------------------------------------------------------------------------


def test_held_out_losses_are_the_mean_over_the_batches():
    torch.manual_seed(0)
    model = decompose(MLP(), MLP_SITES)
    losses = {
        "faithfulness": {"coeff": 2.0},
        "stochastic_recon": {"coeff": 0.5},
        "importance_minimality": {"coeff": 0.1, "pnorm": 1.0},
    }
    objective = make_objective(model, losses)
    contexts = []
    for index in range(3):
        batch = torch.randn(8, 4)
        noise = objective.draw_noise(batch, stream="eval", seed=0, step=index)
        contexts.append(objective.context(batch, torch.tensor(1.0), noise))
    with torch.no_grad():
        found = collect([HeldOutLosses(objective.losses)], contexts)
        direct = [loss_terms(objective.losses, ctx) for ctx in contexts]
    for name in losses:
        values = [terms[name].item() for terms in direct]
        assert found[f"loss/{name}"] == pytest.approx(sum(values) / 3)
    weighted = sum(losses[name]["coeff"] * found[f"loss/{name}"] for name in losses)
    assert found["loss/total"] == pytest.approx(weighted)
    assert "loss/kl" not in found and len(found) == 4
