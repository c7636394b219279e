"""What a decomposition has to beat, at equal L0, and the control that permutes importances."""

import pytest
import torch

from spd.analysis.adversary import ladder, lines
from spd.engine.prepare import Prepared, evaluate, prepare
from spd.masks import SiteMask
from spd.metrics import LadderMetric, climb
from spd.metrics.baselines import against, baseline, neurons, singular_vectors, strongest
from spd.metrics.ladder import permuted
from tests.experiments.lm.test_lm_metrics import language_problem
from tests.test_causes import toy
from tests.toy import make_config

L0_FROM = 0.01


def of_text() -> tuple[Prepared, torch.Tensor]:
    problem = language_problem()
    config = make_config(
        {"stochastic_recon": {"coeff": 1.0}},
        sites={"mid": 6},
        n_eval_batches=1,
        metrics={"ladder": {}},
    )
    prepared = prepare(problem, config)
    return prepared, prepared.eval_batches[0]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_parts_make_up_the_matrix(shape: tuple[int, int]):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for make, embeds in ((singular_vectors, False), (neurons, False), (neurons, True)):
        V, U = make(W, embeds)
        torch.testing.assert_close(V @ U, W)
    assert neurons(W).V.shape[1] == max(shape)
    assert neurons(W, embeds=True).V.shape[1] == shape[1]
    V, U = singular_vectors(W)
    norms = V.norm(dim=0)
    assert (norms[1:] <= norms[:-1] + 1e-6).all(), "the largest comes first"


def test_as_many_are_on_as_importances_are_and_they_do_most():
    effects = torch.tensor([[5.0, 1.0, 0.0], [4.0, 3.0, 2.0]])
    on = torch.tensor([[1, 0], [1, 1]]).bool()
    assert strongest(effects, on).tolist() == [[1, 0, 0], [1, 1, 0]]
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert not strongest(effects, none).any()
    # a row that does not count has no say in how many, and is masked by the same measure
    assert strongest(effects, on, torch.tensor([True, False])).tolist() == [[1, 0, 0], [0, 0, 0]]
    everything = torch.ones(2, 9, dtype=torch.bool)
    assert strongest(effects, everything).tolist() == [[1, 1, 0], [1, 1, 1]], "no effect, not on"


@torch.no_grad()
def test_a_baseline_computes_the_target_by_its_own_parts_and_leaves_the_model_alone():
    prepared, batch = of_text()
    model = prepared.objective.model
    output, inputs = model.target_forward(batch)
    g = {p: own.clamp(0, 1) for p, own in model.causal_importances(inputs).lower.items()}
    before = model(batch, {"mid": g["mid"]})
    site = model.sites["mid"]
    for name, make in (("svd", singular_vectors), ("neurons", neurons)):
        found = baseline(name, model, inputs, g, on_from=L0_FROM)
        torch.testing.assert_close(found.model(batch), output)
        assert found.g["mid"].sum() == (g["mid"] > L0_FROM).sum()
        assert found.g_rounded["mid"].sum() == (g["mid"] > 0.5).sum()
        # by hand: the matrix of the parts that are on, row by row
        V, U = make(site.target_weight)
        half = torch.rand(found.g["mid"].shape, generator=torch.Generator().manual_seed(0)).round()
        seen = found.model(batch, {"mid": half})
        first = half[0, 0]
        W = (V * first) @ U
        alone = model(batch[:1, :1], {"mid": SiteMask(torch.zeros(site.C))})
        assert seen.shape == output.shape and alone.shape[-1] == output.shape[-1]
        x = inputs["mid"]
        assert isinstance(x, torch.Tensor)
        own = found.model.sites["mid"].masked(x[:1, :1], SiteMask(first))
        bias = 0 if site.bias is None else site.bias
        torch.testing.assert_close(own, x[:1, :1] @ W + bias)
    assert torch.equal(model(batch, {"mid": g["mid"]}), before)
    assert model.sites["mid"].C == 6


def test_a_language_model_has_the_figures_of_both_at_its_end_and_says_who_is_better():
    prepared, _ = of_text()
    on_the_way = evaluate(prepared, at_end=False)
    assert not any(key.startswith(("eval/ladder_svd", "eval/ladder_neurons")) for key in on_the_way)
    values = {key.removeprefix("eval/"): own for key, own in evaluate(prepared).items()}
    rungs = {k.removeprefix("ladder/") for k in values if k.startswith("ladder/")}
    for name in ("svd", "neurons"):
        own = {k.removeprefix(f"ladder_{name}/") for k in values if k.startswith(f"ladder_{name}/")}
        longest = {"adversarial_80_batch", "adversarial_80_row"}
        assert own == rungs - {"unmasked", "permuted", "ablated"} - longest
    conclusion = LadderMetric().conclusion(values)
    assert (
        conclusion is not None
        and "beat" in conclusion.detail
        and "at equal L0" in conclusion.detail
    )
    table = lines(ladder(prepared, n_steps=2, n_restarts=1))
    assert "D of singular vectors" in table[0] and "D of neurons" in table[0]
    cells = {line.split()[0]: line.split() for line in table[1:]}
    assert cells["unmasked"][-2:] == ["-", "-"] and "-" not in cells["stochastic"][-2:]


def test_a_sentence_names_what_was_not_beaten():
    own = {"ladder/rounded": 1.0, "ladder/stochastic": 1.0}
    better = {"ladder_svd/rounded": 2.0, "ladder_neurons/stochastic": 1.5}
    assert against(own) == ""
    assert against(own | better).startswith("It beats singular vectors and neurons of W under all")
    worse = {**better, "ladder_svd/stochastic": 0.9, "ladder_neurons/rounded": 1.0}
    assert against(own | worse).startswith(
        "It does not beat singular vectors of W (stochastic) and neurons of W (rounded), at equal L0"
    )


def test_a_toy_has_no_baselines():
    assert not any("ladder_svd" in key for key in evaluate(with_ladder(toy())))


# --- importances permuted over inputs ----------------------------------------------------------------


def with_ladder(prepared: Prepared) -> Prepared:
    config = prepared.config.model_copy(update={"metrics": {"ladder": LadderMetric()}})
    return prepared._replace(config=config)


def test_rows_are_exchanged_alike_at_all_sites():
    g = {"a": torch.arange(12.0).reshape(6, 2), "b": torch.arange(6.0).reshape(2, 3, 1)}
    found = permuted(g, seed=0)
    assert torch.equal(found["a"][:, 0] / 2, found["b"].flatten())
    assert sorted(found["b"].flatten().tolist()) == list(range(6))
    assert not torch.equal(found["a"], g["a"])
    assert torch.equal(permuted(g, seed=0)["a"], found["a"])


def test_importances_of_other_inputs_do_far_worse():
    prepared = toy()
    rows = prepared.eval_batches[0]
    found = climb(prepared.objective.model, prepared.problem, rows, steps=(1,)).rungs
    assert found["permuted"] > 100 * found["importance_masked"]
    assert found["permuted"] > 0.3 * found["ablated"]
