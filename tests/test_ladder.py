"""The ladder of masks: by hand, the same every time, beside everything else without touching it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.adversary import Attack, attack
from spd.component_model import ComponentModel
from spd.engine.prepare import Prepared, evaluate, prepare
from spd.experiments.tms.tms_decomposition import build
from spd.losses import OutRecon, StepContext
from spd.masks import SiteMask, stochastic_mask
from spd.metrics import LadderMetric, SparsityMetric, climb, rung, some_rows
from spd.metrics.ladder import STEPS, STEPS_AT_END, by_example
from spd.noise import seeded, uniform
from spd.optimize import Interrupted, Member, Silent, run_side_by_side, run_steps
from spd.problem import Problem
from spd.runs.run import start
from tests.experiments.lm.test_lm_metrics import language_problem
from tests.runs.little_run import little_config, little_run
from tests.solved_toy import set_importance
from tests.test_causes import plant_pair, toy
from tests.toy import make_config

pytestmark = pytest.mark.undrawn

X = torch.tensor([[1.0], [0.5], [0.0], [2.0]])
CPU = torch.device("cpu")


def one_weight(g: float = 0.0) -> Prepared:
    """W = 1 = 2 − 1: two subcomponents, V = (1, 1), U = (2, −1), of the same importance everywhere."""
    target = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(target[0].weight)  # pyright: ignore[reportArgumentType]
    problem = Problem(target, [X], [X])
    config = make_config(
        {"out_recon": {"coeff": 1.0}},
        sites={"0": 2},
        importance={"type": "affine"},
        n_eval_batches=1,
        metrics={"ladder": {}},
    )
    prepared = prepare(problem, config)
    site = prepared.objective.model.sites["0"].subcomponents
    with torch.no_grad():
        site.V.copy_(torch.tensor([[1.0, 1.0]]))
        site.U.copy_(torch.tensor([[2.0], [-1.0]]))
    set_importance(prepared.objective.model, "0", torch.zeros(2), torch.full((2,), g))
    return prepared


def by_hand(g: float, sources: list[list[float]], shared: bool) -> list[float]:
    """Mean D on the rows with an input after 0, 1, … 80 steps of 0.1: the largest until there."""
    xs = [x for x in X.flatten().tolist() if x]
    best = [-math.inf] * (1 if shared else len(xs))
    found = []
    for _ in range(81):
        error = []
        for x, r in zip(xs, sources, strict=True):
            a, b = (g + (1 - g) * value for value in r)
            error.append(x * (2 * a - b) - x)
        squares = [e * e for e in error]
        now = [sum(squares) / len(xs)] if shared else squares
        best = [max(one, other) for one, other in zip(best, now, strict=True)]
        found.append(sum(best) / len(best))
        slopes = [(4 * e * x, -2 * e * x) for e, x in zip(error, xs, strict=True)]
        if shared:
            slopes = [tuple(map(sum, zip(*slopes, strict=True)))] * len(xs)
        sources = [
            [
                min(max(v + math.copysign(0.1, s) * (s != 0), 0), 1)
                for v, s in zip(r, slope, strict=True)
            ]
            for r, slope in zip(sources, slopes, strict=True)
        ]
    return found


@pytest.mark.parametrize("g", [0.0, 0.25, 0.75])
def test_every_rung_of_a_single_weight(g: float):
    values = {k.removeprefix("eval/"): v for k, v in evaluate(one_weight(g)).items()}
    xs = [x for x in X.flatten().tolist() if x]
    power = sum(x * x for x in xs) / len(xs)
    r = uniform((3, 2), seeded(CPU, "ladder", 0)).tolist()
    drawn = [
        (x * (2 * (g + (1 - g) * a) - (g + (1 - g) * b)) - x) ** 2
        for x, (a, b) in zip(xs, r, strict=True)
    ]
    expected = {
        "unmasked": 0.0,
        "stochastic": sum(drawn) / 3,
        "importance_masked": power * (g - 1) ** 2,
        "rounded": 0.0 if g > 0.5 else power,
        "permuted": power * (g - 1) ** 2,
        "ablated": power,
    }
    for scope, shape in (("batch", (1, 2)), ("row", (3, 2))):
        first = uniform(shape, seeded(CPU, "adversary", 0, 0, "0"))
        curve = by_hand(g, first.expand(3, 2).tolist(), shared=scope == "batch")
        expected |= {f"adversarial_{n}_{scope}": curve[n] for n in (1, 5, 20, 80)}
    found = {k.removeprefix("ladder/"): v for k, v in values.items() if k.startswith("ladder/")}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert list(found)[-1] == "ablated"
    on = {key: values[key] for key in ("ladder_l0", "ladder_C", "ladder_rows")}
    assert on == {"ladder_l0": 2.0 * (g > 0.01), "ladder_C": 2.0, "ladder_rows": 3.0}
    assert not any(key.startswith("ladder_recovered") for key in values)
    for name in ("adversarial_80_batch", "adversarial_80_row"):
        assert values[f"ladder_share/{name}"] == pytest.approx(expected[name] / power, rel=1e-4)


def test_on_the_way_the_search_is_shorter():
    prepared = one_weight()
    for at_end, steps in ((False, STEPS), (True, STEPS_AT_END)):
        keys = evaluate(prepared, at_end=at_end).keys()
        shown = {key for key in keys if key.startswith("eval/ladder/adversarial")}
        assert shown == {f"eval/ladder/{rung(n, s)}" for n in steps for s in ("batch", "row")}


def test_a_planted_pair_shows_at_random_and_is_exposed_by_the_adversary():
    """± u vᵀ at g = 0: masks that leave both on, or both off, see nothing."""

    def values(size: float) -> dict[str, float]:
        prepared = toy()
        plant_pair(prepared, size)
        config = prepared.config.model_copy(
            update={"metrics": {"ladder": LadderMetric(), "sparsity": SparsityMetric()}}
        )
        return evaluate(prepared._replace(config=config))

    clean, planted = values(0.0), values(2.0)
    for name in ("unmasked", "importance_masked", "rounded", "ablated"):
        assert abs(planted[f"eval/ladder/{name}"] - clean[f"eval/ladder/{name}"]) < 1e-6
    assert planted["eval/ladder/stochastic"] > 10 * clean["eval/ladder/stochastic"] + 1e-3
    for scope in ("batch", "row"):
        worst = f"eval/ladder/{rung(80, scope)}"
        assert planted[worst] > planted["eval/ladder/ablated"] > 10 * clean[worst]
    never = "eval/never_active/linear1"
    # two of length ‖V‖ ‖U‖ = 1 · 4 each beside a matrix of four orthonormal columns, ‖W‖ = 2
    assert planted[never] - clean[never] == pytest.approx(2 * 4 / 2, rel=1e-4)


def test_rows_are_a_seeded_choice_in_their_order():
    batch = torch.cat([torch.zeros(5, 2), torch.arange(1.0, 2001.0).reshape(1000, 2)])
    chosen = some_rows(batch, 100)
    assert isinstance(chosen, Tensor) and chosen.shape == (100, 2)
    assert torch.equal(chosen, some_rows(batch, 100))  # pyright: ignore[reportArgumentType]
    assert (chosen[1:, 0] > chosen[:-1, 0]).all() and chosen.all()
    assert not torch.equal(chosen, batch[5:105])
    assert len(some_rows(batch)) == 256 and len(some_rows(batch.long())) == 4
    assert len(some_rows(torch.zeros(3, 2))) == 3, "where no row has an input, all are as good"


def test_the_number_of_rows_is_a_setting():
    spec = LadderMetric(n_rows=2)
    prepared = one_weight()
    config = prepared.config.model_copy(update={"metrics": {"ladder": spec}})
    assert evaluate(prepared._replace(config=config))["eval/ladder_rows"] == 2


def test_errors_of_examples_whose_masks_are_shared_are_taken_together():
    errors = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    own = {"a": torch.zeros(2, 2, 3), "flat": torch.zeros(4, 3)}
    assert by_example(errors, own).tolist() == [2.0, 6.0]
    assert by_example(errors, {**own, "positions": torch.zeros(1, 2, 3)}).tolist() == [4.0]
    assert by_example(errors[0], {"a": torch.zeros(2, 3)}).tolist() == [1.0, 3.0]


# --- of language models ----------------------------------------------------------------------------


def of_text(**changes: Any) -> tuple[Prepared, Tensor]:
    problem = language_problem(**changes)
    config = make_config({"stochastic_recon": {"coeff": 1.0}}, sites={"mid": 6}, n_eval_batches=1)
    batch = torch.arange(3)[:, None]  # text that the target predicts: what is taken from it costs
    while batch.shape[1] < 4:
        batch = torch.cat([batch, problem.target(batch)[:, -1:].argmax(-1)], dim=1)
    return prepare(problem, config), batch


def seen_under(
    model: ComponentModel, batch: Tensor, masks: Mapping[str, Tensor | SiteMask | None]
) -> tuple[Tensor, Tensor]:
    """KL of each position, cross-entropy of each predicted token."""
    target, masked = model.target_forward(batch).output.log_softmax(-1), model(batch, masks)
    logp = masked.log_softmax(-1)
    kl = (target.exp() * (target - logp)).sum(-1)
    return kl, -logp[:, :-1].gather(-1, batch[:, 1:, None])[..., 0]


@torch.no_grad()
def test_cross_entropy_recovered_of_every_rung():
    prepared, batch = of_text()
    model = prepared.objective.model
    found = climb(model, prepared.problem, batch, steps=(1, 2))
    assert found.recovered.keys() == found.rungs.keys() - {"ablated"}
    assert found.baselines == {}, "where they are not asked for"
    whole = model.causal_importances(model.target_forward(batch).site_inputs).lower["mid"]
    g = whole.clamp(0, 1)
    zero = seen_under(model, batch, {"mid": torch.zeros_like(g)})[1].mean()
    target = seen_under(model, batch, {})[1].mean()
    kinds = {"unmasked": None, "importance_masked": g, "rounded": (g > 0.5).float()}
    kinds["stochastic"] = stochastic_mask(g, uniform(g.shape, seeded(CPU, "ladder", 0)))
    for kind, mask in kinds.items():
        kl, ce = seen_under(model, batch, {"mid": mask})
        assert found.rungs[kind] == pytest.approx(kl.mean().item(), rel=1e-4)
        share = ((zero - ce.mean()) / (zero - target)).item()
        assert found.recovered[kind] == pytest.approx(share, rel=1e-3)


def test_each_sequence_is_judged_at_its_own_worst_moment():
    """The recovered share belongs to the masks of which D is shown."""
    prepared, batch = of_text()
    model, steps = prepared.objective.model, 4
    found = climb(model, prepared.problem, batch, steps=(steps,))
    g = model.causal_importances(model.target_forward(batch).site_inputs).lower["mid"]
    g = g.detach().clamp(0, 1)
    r = uniform(g.shape, seeded(CPU, "adversary", 0, 0, "mid"))
    moments = []
    for _ in range(steps + 1):
        r = r.detach().requires_grad_()
        kl, ce = seen_under(model, batch, {"mid": stochastic_mask(g, r)})
        (slope,) = torch.autograd.grad(kl.sum(), r)
        moments.append((kl.detach().mean(dim=1), ce.detach()))
        r = (r + 0.1 * slope.sign()).clamp(0, 1)
    kl = torch.stack([kl for kl, _ in moments])
    worst = kl.argmax(dim=0)
    assert found.rungs[rung(steps, "row")] == pytest.approx(kl.amax(dim=0).mean().item(), rel=1e-4)
    ce = torch.stack([moments[int(at)][1][row] for row, at in enumerate(worst)]).mean()
    with torch.no_grad():
        zero = seen_under(model, batch, {"mid": torch.zeros_like(g)})[1].mean()
        target = seen_under(model, batch, {})[1].mean()
    share = ((zero - ce) / (zero - target)).item()
    assert found.recovered[rung(steps, "row")] == pytest.approx(share, rel=1e-3)


def test_positions_that_do_not_count_are_not_attacked():
    """Without the last position it is as if the text ended before: the target looks at one token."""
    last = torch.tensor([[1.0, 1.0, 1.0, 0.0]])

    def weights(batch: Tensor) -> Tensor:
        return (last[:, : batch.shape[1]] * 4 / 3).expand(batch.shape)

    prepared, batch = of_text(position_weights=weights)
    model = prepared.objective.model
    with_all = climb(model, prepared.problem, batch, steps=(3,))
    plain = language_problem()
    shorter = climb(model, plain, batch[:, :3], steps=(3,))
    for name in ("unmasked", "importance_masked", "rounded", "ablated"):
        assert with_all.rungs[name] == pytest.approx(shorter.rungs[name], rel=1e-4)
        if name != "ablated":
            assert with_all.recovered[name] == pytest.approx(shorter.recovered[name], rel=1e-3)


def test_what_predicts_no_tokens_has_no_cross_entropy():
    prepared, batch = of_text(unembed=None)
    found = climb(prepared.objective.model, prepared.problem, batch, steps=(1,))
    assert found.recovered == {} and found.rungs["ablated"] > 0


# --- within evaluations and runs -------------------------------------------------------------------


class Worst(OutRecon):
    """A loss that searches by itself, with gradients that are its own affair."""

    def parts(self, ctx: StepContext):
        masks = {p: torch.full_like(g, 0.5, requires_grad=True) for p, g in ctx.ci.lower.items()}
        with torch.enable_grad():
            error = ctx.masked_error(masks)
            slopes = torch.autograd.grad(error, list(masks.values()))
        moved = {
            path: (mask + slope.sign()).clamp(0, 1).detach()
            for (path, mask), slope in zip(masks.items(), slopes, strict=True)
        }
        yield ctx.masked_error(moved)


def test_a_loss_may_ask_for_gradients_inside_an_evaluation():
    prepared = one_weight()
    prepared.objective.losses["worst"] = Worst(coeff=1.0)
    # from r = (0.5, 0.5), where D = (x / 2)²: it rises where U V of what is on falls
    mean = sum(x * x for x in X.flatten().tolist()) / 4
    assert evaluate(prepared)["eval/loss/worst"] == pytest.approx(4 * mean)
    assert all(p.grad is None for p in prepared.objective.model.parameters())


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append({"step": step, **values})

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append({"step": step, **values})


def lines_of(folder: Path, *overrides: str, stop_at: int | None = None) -> list[dict[str, float]]:
    """What a run tells; with `stop_at` of one that is stopped before that step and goes on."""
    config = little_config(folder, "metrics={ladder: {}, sparsity: {}}", *overrides)
    told = Lines()
    where = folder / f"checkpoints-{stop_at}"
    if stop_at is not None:
        asked = iter(range(100))
        with pytest.raises(Interrupted):
            run_steps(
                prepare(build(config, CPU), config),
                told,
                checkpoints=where,
                stop_requested=lambda: next(asked) == stop_at,
            )
    prepared = prepare(build(config, CPU), config)
    run_steps(prepared, told, checkpoints=where, resume=stop_at is not None)
    return told.lines


def test_a_run_tells_the_same_lines_twice_and_resumed(tmp_path: Path):
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if "eval/ladder/ablated" in line] == [0, 4, 6]
    assert lines == lines_of(tmp_path, "seed=0")
    assert lines == lines_of(tmp_path, stop_at=3)


def test_seeds_side_by_side_have_the_figures_that_each_has_alone(tmp_path: Path):
    def prepared(seed: int) -> Prepared:
        config = little_config(tmp_path, "metrics={ladder: {}}", f"seed={seed}")
        return prepare(build(config, CPU), config)

    together, alone = [Lines(), Lines()], [Lines(), Lines()]
    run_side_by_side([Member(prepared(seed), told) for seed, told in enumerate(together)])
    for seed, told in enumerate(alone):
        run_side_by_side([Member(prepared(seed), told)])
    for one, other in zip(alone, together, strict=True):
        for line, beside in zip(one.lines, other.lines, strict=True):
            for key in (key for key in line if key.startswith("eval/ladder")):
                assert beside[key] == pytest.approx(line[key], rel=0.02, abs=1e-9), key


def test_nothing_else_of_a_run_changes(tmp_path: Path):
    """Its lines without the ladder are those of a run without it, byte for byte."""

    def logged(name: str, metrics: str) -> list[str]:
        run = little_run(tmp_path, name, metrics)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        left = [
            {k: v for k, v in json.loads(line).items() if not k.startswith("eval/ladder")}
            for line in lines
        ]
        assert [json.dumps(line) for line in left] == lines or "ladder" in metrics
        return [json.dumps(line) for line in left]

    assert logged("with", "metrics={ladder: {}, pattern_errors: {}}") == logged(
        "without", "metrics={pattern_errors: {}}"
    )


def test_the_result_has_every_rung_and_the_page_shows_it_first(tmp_path: Path):
    config = little_config(tmp_path, "metrics={ladder: {}, sparsity: {}}")
    run = start(config, build, directory=tmp_path / "shown")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    keys = {row["key"] for row in result["rows"]}
    assert {"ladder/ablated", "ladder/adversarial_80_row", "never_active/linear1"} <= keys
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.index('id="ladder"') < page.index('id="result"')
    assert "80 steps of 0.1, one start, one source for the whole batch" in page
    assert "of 12 subcomponents are on at a time (L0)" in page
    assert result["conclusion"]["headline"].startswith("masks from 80 steps of an adversary cost ")
    assert "are all there is to judge it by" in " ".join(page.split())


@pytest.mark.slow
@pytest.mark.compiled
def test_runs_that_are_compiled_are_evaluated_with_gradients_too(tmp_path: Path):
    eager, compiled = lines_of(tmp_path), lines_of(tmp_path, "compile=true")
    assert [line.keys() for line in eager] == [line.keys() for line in compiled]
    for one, other in zip(eager, compiled, strict=True):
        for key in one:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key


def test_the_largest_of_several_starts_is_told_with_its_call():
    prepared = one_weight()
    model, g = prepared.objective.model, {"0": torch.zeros(4, 2)}

    def errors(masks: Mapping[str, Tensor]) -> Tensor:
        seen.append((model(X, masks) - X).square()[:, 0])
        return seen[-1]

    for scope in ("batch", "row"):
        seen: list[Tensor] = []
        found = attack(errors, g, Attack(scope, n_steps=3, n_restarts=2))
        assert len(seen) == 8
        for n, call in enumerate(found.calls):
            met = torch.stack([seen[int(c)][row].detach() for row, c in enumerate(call.expand(4))])
            assert met.mean().item() == pytest.approx(found.by_step[n])
