"""Cross-entropy and KL of a language model under every kind of mask, against sums written out."""

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spd.config import UserError
from spd.engine.prepare import eval_contexts, evaluate, prepare
from spd.experiments.lm.metrics import (
    CrossEntropyMetric,
    entropy_bias,
    entropy_of_counts,
)
from spd.experiments.lm.problem import LMProblem, next_token_cross_entropy, weights_without
from spd.masks import MaskKind, masks_of
from spd.metrics import Metric, share_recovered
from spd.objective import Objective
from spd.problem import Problem
from spd.reports.evaluations import result_of
from spd.reports.results import format_result
from tests.toy import TokenModel, make_config, tensors

KINDS = ("unmasked", "masked", "stochastic", "rounded", "zero")
VOCAB, SITES = 11, {"mid": 6}
LOSSES = {"stochastic_recon": {"coeff": 1.0}}


def batches(seed: int, sizes: tuple[int, ...] = (3, 5)) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for size in sizes:
            yield torch.randint(0, VOCAB, (size, 4), generator=generator)


def language_problem(**changes: Any) -> LMProblem:
    torch.manual_seed(0)
    target = TokenModel(VOCAB, d=8)
    torch.nn.init.normal_(target.lm_head.weight, std=1.0)
    values: dict[str, Any] = {"target": target, "recon": "kl"}
    values |= {"train_batches": batches(0), "eval_batches": batches(1)}
    return LMProblem(**{**values, "tokenizer": None, "unembed": "lm_head", **changes})


def measured(problem: LMProblem) -> tuple[Objective, list[Tensor], dict[str, float]]:
    config = make_config(LOSSES, sites=SITES, n_eval_batches=2)
    prepared = prepare(problem, config)
    metric: Metric = CrossEntropyMetric().build(prepared.objective.model, problem)
    with torch.no_grad():
        for ctx in eval_contexts(prepared):
            metric.update(ctx)
    return prepared.objective, tensors(prepared.eval_batches), metric.compute()


# --- the formulas ----------------------------------------------------------------------------------


def test_cross_entropy_of_two_known_sequences():
    """Probabilities 1/2, 1/4, 1/4 for tokens 0, 1, 2 at every position."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 3, 3)
    tokens = torch.tensor([[2, 0, 1], [0, 0, 0]])
    expected = torch.tensor([[math.log(2), math.log(4)], [math.log(2), math.log(2)]])
    torch.testing.assert_close(next_token_cross_entropy(logits, tokens), expected)


def test_the_last_token_is_not_scored_on_the_next_sequence():
    """A model that is certain of the right token everywhere but at the last positions."""
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    logits = torch.zeros(3, 2, 7)
    for sequence, (_, second) in enumerate(tokens.tolist()):
        logits[sequence, 0, second] = 100.0
        logits[sequence, 1, 0] = 100.0  # no sequence begins with 0
    assert next_token_cross_entropy(logits, tokens).tolist() == [[0.0], [0.0], [0.0]]
    flat = torch.nn.functional.cross_entropy(logits.reshape(-1, 7)[:-1], tokens.reshape(-1)[1:])
    assert flat > 10, "flattened, the borders would be scored"


def test_entropy_of_frequencies():
    assert entropy_of_counts(torch.tensor([2, 0, 1, 1])) == pytest.approx(1.5 * math.log(2))
    assert entropy_of_counts(torch.tensor([0, 7])) == 0


def test_share_recovered():
    assert share_recovered(5.0, zero=6.0, target=2.0) == 0.25
    assert share_recovered(2.0, zero=6.0, target=2.0) == 1
    assert share_recovered(8.0, zero=6.0, target=2.0) == -0.5


def test_masks_by_kind():
    ci = {"a": torch.tensor([[-0.05, 0.2, 0.5, 0.6, 1.0]])}
    g = [0.0, 0.2, 0.5, 0.6, 1.0]
    expected: dict[MaskKind, list[float]] = {
        "importance_masked": g,
        "stochastic": [0.5 + value / 2 for value in g],
        "rounded": [0.0, 0.0, 0.0, 1.0, 1.0],
        "ablated": [0.0] * 5,
    }
    for kind, values in expected.items():
        masks = masks_of(kind, ci, lambda like: torch.full_like(like, 0.5))
        assert masks["a"] is not None
        torch.testing.assert_close(masks["a"], torch.tensor([values]))
    assert masks_of("unmasked", ci, torch.rand_like) == {"a": None}


# --- over held-out batches -------------------------------------------------------------------------


def by_hand(
    objective: Objective, batches: list[Tensor], mask_of: Any, excluded: tuple[int, ...] = ()
) -> tuple[float, float]:
    """Cross-entropy and KL, one position after another; `mask_of` is given g."""
    model = objective.model
    ce, kl = [], []
    for tokens in batches:
        out, inputs = model.target_forward(tokens)
        masks = {p: mask_of(g) for p, g in model.causal_importances(inputs).lower.items()}
        log_q, log_p = model(tokens, masks).log_softmax(-1), out.log_softmax(-1)
        for row in range(len(tokens)):
            for position in range(4):
                if int(tokens[row, position]) in excluded:
                    continue
                q, p = log_q[row, position], log_p[row, position]
                kl.append(
                    sum(math.exp(b) * (b - a) for a, b in zip(q.tolist(), p.tolist(), strict=True))
                )
                if position < 3 and int(tokens[row, position + 1]) not in excluded:
                    ce.append(-q[int(tokens[row, position + 1])].item())
    return sum(ce) / len(ce), sum(kl) / len(kl)


@torch.no_grad()
def test_every_kind_of_mask_over_batches_of_unequal_size():
    objective, held_out, values = measured(language_problem())
    assert [len(batch) for batch in held_out] == [3, 5]
    mask_of = {
        "unmasked": lambda g: None,
        "masked": lambda g: g.clamp(0, 1),
        "rounded": lambda g: (g > 0.5).float(),
        "zero": torch.zeros_like,
    }
    for kind, mask in mask_of.items():
        ce, kl = by_hand(objective, held_out, mask)
        assert values[f"ce/{kind}"] == pytest.approx(ce, rel=1e-5)
        assert values[f"kl/{kind}"] == pytest.approx(kl, rel=1e-4)
    assert len({round(values[f"ce/{kind}"], 6) for kind in KINDS}) == len(KINDS)
    assert values["scored"] == 24 and "ce/unigram" not in values, "so few tell nothing of it"


def test_the_entropy_of_the_tokens_is_told_where_there_are_enough_of_them():
    texts = [
        torch.randint(VOCAB, (40, 4), generator=torch.Generator().manual_seed(seed))
        for seed in (5, 6)
    ]
    _, held_out, values = measured(language_problem(eval_batches=texts))
    predicted = torch.cat([batch[:, 1:].flatten() for batch in held_out]).tolist()
    shares = [predicted.count(token) / len(predicted) for token in set(predicted)]
    assert values["scored"] == len(predicted) == 240
    assert values["ce/unigram"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert entropy_bias(torch.tensor([3, 0, 1, 4])) == 2 / 16


def test_a_conclusion_from_few_tokens_says_so():
    values = {"recovered/masked": 0.9, "recovered/rounded": 0.8, "scored": 128.0}
    few = CrossEntropyMetric().conclusion(values)
    assert few is not None and "g > 0.5; from 128 tokens only;" in few.detail
    many = CrossEntropyMetric().conclusion({**values, "scored": 5000.0})
    assert many is not None and "g > 0.5; the metric ladder" in many.detail


def test_what_a_recipe_trains_on_is_no_headline():
    """A run with 900 of 1,200 subcomponents on everywhere avoids most of the cost of ablation."""
    values = {"recovered/masked": 0.78, "recovered/rounded": 0.7, "l0/a": 500.0, "l0/b": 400.0}
    found = CrossEntropyMetric().conclusion(values)
    assert found is not None and found.headline == "not tested against an adversary"
    assert found.detail.startswith("L0 900, and of the cost of ablation 78.0% avoided")
    assert CrossEntropyMetric().conclusion({**values, "ladder/ablated": 1.0}) is None


EXCLUDED = (3, 7)


@torch.no_grad()
def test_excluded_tokens_are_neither_scored_nor_predicted():
    weights = partial(weights_without, excluded=EXCLUDED)
    objective, held_out, values = measured(language_problem(position_weights=weights))
    assert any(int(token) in EXCLUDED for batch in held_out for token in batch.flatten())
    ce, kl = by_hand(objective, held_out, torch.zeros_like, EXCLUDED)
    assert values["ce/zero"] == pytest.approx(ce, rel=1e-5)
    assert values["kl/zero"] == pytest.approx(kl, rel=1e-4)


def test_excluded_tokens_count_in_no_loss_gradient_or_sparsity():
    """The target works on every token by itself: without them is as if they had never been there."""
    losses = {
        **{"recon": {"coeff": 1.0}, "recon_layerwise": {"coeff": 1.0}},
        **{"importance_minimality": {"coeff": 0.1, "pnorm": 1.0}, "schatten": {"coeff": 0.1}},
    }
    losses["schatten"]["pnorm"] = 1.0
    batch = next(batches(1))
    left = torch.tensor([[token] for token in batch.flatten().tolist() if token not in EXCLUDED])
    assert 0 < len(left) < batch.numel()
    found = []
    for tokens, excluded in ((batch, EXCLUDED), (left, ())):
        problem = language_problem(
            eval_batches=iter([tokens]),
            position_weights=partial(weights_without, excluded=excluded) if excluded else None,
        )
        config = make_config(losses, sites=SITES, n_eval_batches=1, metrics={"sparsity": {}})
        prepared = prepare(problem, config)
        total, logged, *_ = prepared.objective(tokens, torch.tensor(0.0), {})
        total.backward()
        grads = {n: p.grad for n, p in prepared.objective.named_parameters() if p.requires_grad}
        found.append((logged, grads, {k: torch.tensor(v) for k, v in evaluate(prepared).items()}))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys() and len(one) > 1
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-7)


def test_weights_without_tokens_have_mean_1():
    weights = weights_without(torch.tensor([[1, 2, 3, 2]]), (2,))
    assert weights.tolist() == [[2.0, 0.0, 2.0, 0.0]]
    assert weights_without(torch.tensor([[2, 2]]), (2,)).tolist() == [[0.0, 0.0]]


@torch.no_grad()
def test_cross_entropy_of_the_target():
    objective, held_out, values = measured(language_problem())
    logp = [objective.model.target_forward(tokens).output.log_softmax(-1) for tokens in held_out]
    scored = [
        -row[position, tokens[i, position + 1]].item()
        for out, tokens in zip(logp, held_out, strict=True)
        for i, row in enumerate(out)
        for position in range(3)
    ]
    assert values["ce/target"] == pytest.approx(sum(scored) / len(scored), rel=1e-5)


def test_nothing_is_recovered_where_ablation_costs_nothing():
    problem = language_problem()
    problem.target.get_parameter("lm_head.weight").data.zero_()
    values = measured(problem)[2]
    assert values["ce/zero"] == values["ce/target"] == pytest.approx(math.log(VOCAB))
    assert not any(key.startswith("recovered") for key in values)


def test_exact_subcomponents_recover_everything():
    """Identity V, U = W: unmasked they are the target; with g = 1 every other mask is too."""
    problem = language_problem()
    config = make_config(LOSSES, sites={"mid": 8}, n_eval_batches=1, importance={"type": "affine"})
    prepared = prepare(problem, config)
    model = prepared.objective.model
    site = model.sites["mid"]
    with torch.no_grad():
        site.subcomponents.V.copy_(torch.eye(8))
        site.subcomponents.U.copy_(site.target_weight)
        site.own_importance().get_parameter("weight").zero_()
        site.own_importance().get_parameter("bias").fill_(2.0)
        # text that the target predicts: what is taken from it can only make it worse
        batch = torch.zeros(8, 6, dtype=torch.long)
        for position in range(5):
            batch[:, position + 1] = model.target(batch)[:, position].argmax(-1)
            batch[:, 0] = torch.arange(8)
        metric = CrossEntropyMetric().build(model, problem)
        metric.update(next(iter(eval_contexts(prepared._replace(eval_batches=[batch])))))
    values = metric.compute()
    assert values["ce/zero"] > values["ce/target"] + 0.01
    for kind in KINDS[:-1]:
        assert values[f"kl/{kind}"] == pytest.approx(0, abs=1e-6)
        assert values[f"ce/{kind}"] == pytest.approx(values["ce/target"], rel=1e-5)
        assert values[f"recovered/{kind}"] == pytest.approx(1, abs=1e-3)
    assert values["kl/zero"] > 0.01


def test_each_evaluation_draws_the_same_masks_and_leaves_the_global_generator_alone():
    first, second = language_problem(), language_problem()
    state = torch.get_rng_state()
    values = measured(first)[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert measured(second)[2] == values
    assert values["ce/stochastic"] != values["ce/masked"]


# --- in a run --------------------------------------------------------------------------------------


def test_a_reader_sees_it():
    values = {"ce/target": 3.0, "ce/masked": 3.5, "kl/masked": 0.25, "recovered/masked": 0.9}
    values["recovered/rounded"] = 0.8
    line = {"step": 1, **{f"eval/{key}": value for key, value in values.items()}}
    config = SimpleNamespace(experiment="none", seed=0, steps=1, metrics={"": CrossEntropyMetric()})
    text = format_result(result_of(config, [line], 1.0))
    for label in (
        *("cross-entropy target", "cross-entropy masked", "KL from the target masked"),
        "cross-entropy recovered masked",
        "not tested against an adversary (and of the cost of ablation 90.0% avoided with the importances as"
        " masks, 80.0% with rounded ones",
    ):
        assert label in text


@pytest.mark.parametrize("kind", ["toy", "no logits"])
def test_what_is_no_language_model_is_refused(kind: str):
    lm = language_problem(unembed=None)
    toy = Problem(lm.target, lm.train_batches, lm.eval_batches)
    problem = toy if kind == "toy" else lm
    prepared = prepare(problem, make_config(LOSSES, sites=SITES))
    with pytest.raises(UserError, match="metrics.cross_entropy"):
        CrossEntropyMetric().build(prepared.objective.model, problem)
