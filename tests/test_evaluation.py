"""Figures of an evaluation against numbers computed by hand: divergences, patterns, L0, agreement."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from spd.analysis.agreement import cosines, match
from spd.config import UserError
from spd.engine.prepare import eval_contexts, evaluate, prepare
from spd.experiments.lm.metrics import CrossEntropyMetric, compute_recovered
from spd.experiments.lm.problem import next_token_cross_entropy
from spd.kernels import kl_per_row
from spd.metrics import (
    LadderMetric,
    identity_errors,
    l0_above,
    share_recovered,
    upstream_dense_errors,
    upstream_errors,
    upstream_identity_errors,
)
from spd.problem import Dense, Identity, Problem
from spd.reports.figures import MeanActivity
from spd.reports.ladder import described
from tests.experiments.lm.test_lm_metrics import language_problem
from tests.toy import make_config

TARGET = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 0, 0]]]).double()
MASKED = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]]).double()
TOKENS = torch.tensor([[0, 0, 1]])
CURVE = ((0.05, 3.2), (0.1, 2.98), (0.2, 2.88), (0.5, 2.78), (1.0, 2.71))


def test_divergence_and_cross_entropy_by_hand():
    rows = kl_per_row(MASKED, TARGET)
    assert rows.flatten().tolist() == pytest.approx([0.098886, 0.123284, 0.0], abs=1e-6)
    assert rows.mean().item() == pytest.approx(0.074057, abs=1e-6)
    assert kl_per_row(TARGET, MASKED).mean().item() == pytest.approx(0.077161, abs=1e-6)
    target, masked, zero = (
        next_token_cross_entropy(logits, TOKENS).mean().item()
        for logits in (TARGET, MASKED, torch.zeros_like(TARGET))
    )
    assert [target, masked, zero] == pytest.approx([0.395495, 0.825029, 1.098612], abs=1e-6)
    recovered = share_recovered(masked, zero=zero, target=target)
    assert recovered == pytest.approx(0.389101, abs=1e-6)


def test_compute_recovered():
    assert compute_recovered(CURVE, 2.99) == pytest.approx(0.0977, abs=1e-4)
    assert compute_recovered(CURVE, 2.84) == pytest.approx(0.32)
    assert compute_recovered(CURVE, 2.5) == 1.0 and compute_recovered(CURVE, 2.71) == 1.0
    assert compute_recovered(CURVE, 3.3) is None and compute_recovered(CURVE, 3.2) == 0.05
    with pytest.raises(ValueError, match="up to 1 and each above the one before it"):
        CrossEntropyMetric(target_curve=((0.5, 3.0), (0.2, 2.0)))


# --- patterns as the authors count them -------------------------------------------------------------


def test_identity_patterns():
    g = torch.tensor([[0, 0.95, 0, 0], [1, 0, 0, 0.15], [0, 0, 0.85, 0]])
    assert upstream_identity_errors(g, 0.1) == 2 and upstream_identity_errors(g, 0.2) == 0
    shared = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
    assert upstream_identity_errors(shared, 0.1) == 3
    assert upstream_identity_errors(torch.zeros(5, 20), 0.1) == 5
    assert upstream_identity_errors(torch.eye(3)[:, :2], 0.1) == 1, "no column for the third"
    assert upstream_errors(Identity(3), g, 0.1) == 2
    assert identity_errors(g, 3) == 2


def test_a_large_identity_is_paired_greedily():
    g = torch.eye(501)[:, torch.randperm(501, generator=torch.Generator().manual_seed(0))]
    assert upstream_identity_errors(g, 0.1) == 0
    g[0, 0] = 0.6  # an entry off the diagonal, or a lower one on it
    assert upstream_identity_errors(g, 0.1) == 1


def test_dense_patterns():
    columns = [[1, 0.95, 0.2], [0.3, 0.92, 0], [0.15, 0.12, 0], [0, 0, 0]]
    g = torch.tensor(columns).mT
    assert upstream_dense_errors(g, 2, 0.1) == 2 and upstream_dense_errors(g, 2, 0.2) == 0
    weaker = torch.where(g == 0.92, 0.85, g)
    assert upstream_dense_errors(weaker, 2, 0.1) == 3
    assert upstream_dense_errors(torch.zeros(3, 4), 2, 0.1) == 2
    assert upstream_errors(Dense(2), g, 0.1) == 2


# --- how many are on --------------------------------------------------------------------------------

ROWS = torch.tensor([[0, 0.005, 0.2, 1], [0, 0, 0.6, 1], [0, 0.02, 0, 1], [0, 0, 0, 0.4]])


def of_rows(metrics: dict[str, Any], **changes: Any) -> Any:
    """A run whose only site has the importances that it reads."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 4, bias=False))
    config = make_config(
        {"recon": {"coeff": 1.0}},
        sites={"0": 4},
        importance={"type": "affine"},
        n_eval_batches=1,
        metrics=metrics,
        **changes,
    )
    prepared = prepare(Problem(target, [ROWS], [ROWS]), config)
    site = prepared.objective.model.sites["0"]
    with torch.no_grad():
        site.subcomponents.V.copy_(torch.eye(4))
        site.importance.get_parameter("weight").fill_(1.0)  # pyright: ignore
    return prepared


def test_how_many_are_on_above_each_threshold_and_alive_by_both_definitions():
    for threshold, expected in ((0.0, 2.0), (0.01, 1.75), (0.1, 1.5), (0.5, 1.0)):
        assert l0_above(ROWS, threshold) == expected
    values = evaluate(of_rows({"usage": {"thresholds": [0, 0.01, 0.1, 0.5]}}))
    own = {key.removeprefix("eval/"): v for key, v in values.items() if "loss" not in key}
    expected = {"l0_above_0": 2.0, "l0_above_0.01": 1.75, "l0_above_0.1": 1.5, "l0_above_0.5": 1.0}
    expected |= {"alive_by_mean": 3.0, "alive_by_largest": 2.0}
    assert own == {f"{name}/{place}": v for place in ("0", "total") for name, v in expected.items()}
    with pytest.raises(UserError, match=r"metrics.usage.thresholds.0: .*less than 1"):
        of_rows({"usage": {"thresholds": [1.0]}})


def test_the_figure_shows_alive_by_mean():
    prepared = of_rows({})
    model, problem = prepared.objective.model, prepared.problem
    titles = {}
    for alive in ("largest", "mean"):
        maker = MeanActivity(alive=alive).build(model, problem)
        for ctx in eval_contexts(prepared):
            maker.update(ctx)
        (figure,) = maker.compute().values()
        titles[alive] = figure.axes[0].get_title()
        heights = [line.get_ydata() for line in figure.axes[0].lines]
        highest = max(torch.as_tensor(y).max().item() for y in heights)
        assert highest == pytest.approx(0.85), "the mean of the last column"
    assert titles == {"largest": "0: 2 of 4 alive", "mean": "0: 3 of 4 alive"}


def test_agreement_of_directions():
    axes = torch.eye(2)
    other = torch.tensor([[1.0, 1.0], [0.0, -1.0], [1.0, 0.0]])
    similarity = cosines(axes, other)
    assert match(similarity).best.mean().item() == pytest.approx(0.853553, abs=1e-6)
    assert match(similarity.abs()).best.mean().item() == pytest.approx(1.0)


# --- further masks ----------------------------------------------------------------------------------


def test_further_rungs_of_the_ladder_move_no_other():
    plain = evaluate(of_rows({"ladder": {}}), at_end=False)
    options = {"random": True, "thresholds": [0, 0.1, 0.5]}
    more = evaluate(of_rows({"ladder": options}), at_end=False)
    names = {"random", "rounded_above_0", "rounded_above_0.1", "rounded_above_0.5"}
    added = {key: v for key, v in more.items() if key not in plain}
    assert set(added) == {f"eval/ladder/{name}" for name in names}
    assert {key: more[key] for key in plain} == plain
    assert added["eval/ladder/rounded_above_0.5"] == plain["eval/ladder/rounded"]
    assert len(set(added.values())) > 2
    for name in names:
        assert described(name) != (name, ""), name
    assert described("rounded_above_0.1") == ("1 where g > 0.1, else 0", "none")


def test_how_long_the_adversary_searches_at_the_end():
    spec = LadderMetric(steps_at_end=(1, 3))
    values = evaluate(of_rows({"ladder": spec.model_dump()}), at_end=True)
    shown = {key for key in values if key.startswith("eval/ladder/adv")}
    assert shown == {f"eval/ladder/adversarial_{n}_{s}" for n in (1, 3) for s in ("batch", "row")}


def test_rounded_and_random_masks_of_a_language_model():
    def values(**options: Any) -> dict[str, float]:
        config = make_config(
            {"recon": {"coeff": 1.0}},
            sites={"mid": 6},
            n_eval_batches=2,
        )
        problem = language_problem()
        spec = CrossEntropyMetric.model_validate(options)
        prepared = prepare(problem, config)
        metric = spec.build(prepared.objective.model, problem)
        with torch.no_grad():
            for ctx in eval_contexts(prepared):
                metric.update(ctx)
        return metric.compute()

    plain = values()
    more = values(
        random=True,
        thresholds=(0.0, 0.5),
        differences=True,
        target_curve=((0.01, 1e9), (0.5, 1e-9), (1.0, 0.0)),
    )
    assert {key: more[key] for key in plain} == plain
    masks = {"random", "rounded_above_0", "rounded_above_0.5"}
    known = {"unmasked", "masked", "stochastic", "rounded"}
    added = {key for key in more if key not in plain}
    recovered = {f"recovered/{name}" for name in masks} if "recovered/rounded" in plain else set()
    assert added == recovered | {
        *(f"{kind}/{name}" for kind in ("ce", "kl") for name in masks),
        *(f"ce_difference/{name}" for name in masks | known),
        *(f"compute_recovered/{name}" for name in masks | known),
    }
    assert more["ce/rounded_above_0.5"] == more["ce/rounded"]
    for name in masks | known:
        difference = more[f"ce/{name}"] - more["ce/target"]
        assert more[f"ce_difference/{name}"] == pytest.approx(difference)
        share = 0.01 + (1e9 - more[f"ce/{name}"]) / 1e9 * 0.49
        assert more[f"compute_recovered/{name}"] == pytest.approx(share)
    assert all(math.isfinite(value) for value in more.values())
