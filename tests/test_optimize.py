"""The step as a pure callable, and the loop around it as a library."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import spd
from spd import kernels
from spd.component_model import ComponentModel
from spd.config import UserError, parse
from spd.engine.compilation import CompiledStep
from spd.engine.members import step_inputs
from spd.engine.prepare import eval_contexts, evaluate, prepare
from spd.experiments.targets import TrainedTarget, save_target
from spd.experiments.tms.model import TMSModel
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.experiments.tms.train_tms import TMSTrainConfig
from spd.objective import Objective
from spd.optimize import NonFiniteError, due
from spd.problem import Problem
from spd.schedule import ScheduleConfig, schedule_factor
from tests.toy import (
    ALL_LOSSES,
    MLP,
    MLP_SITES,
    TiedMLP,
    decompose,
    make_config,
    make_objective,
    tensors,
)

pytestmark = pytest.mark.undrawn

PROGRESS = torch.tensor(0.5)
TRAIN = {"faithfulness": {"coeff": 1.0}, "stochastic_recon": {"coeff": 1.0}}


def objective_of(losses: dict[str, Any] = ALL_LOSSES) -> Objective:
    torch.manual_seed(0)
    return make_objective(decompose(MLP(), MLP_SITES), losses)


def batches(seed: int, batch_size: int = 32, n: int = 4) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.rand(batch_size, n, generator=generator)


def problem(**changes: Any) -> Problem:
    torch.manual_seed(0)
    values = {"target": MLP(), "train_batches": batches(0), "eval_batches": batches(1)}
    return Problem(**{**values, **changes})


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def started(self, step: int, steps: int) -> None: ...
    def ended(self) -> None: ...

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append((step, dict(values)))

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.stepped(step, values)

    def steps_with(self, key: str) -> list[int]:
        return [step for step, values in self.lines if key in values]


# --- noise -----------------------------------------------------------------------------------------


def test_noise_depends_on_seed_step_term_sample_and_site_alone():
    alone = objective_of({"stochastic_recon": ALL_LOSSES["stochastic_recon"]})
    everything = objective_of()
    batch = torch.randn(5, 4)

    def draw(objective: Objective, stream: str = "train", seed: int = 3, step: int = 7):
        return objective.draw_noise(batch, stream=stream, seed=seed, step=step)

    some, all_of_them = draw(alone), draw(everything)
    assert len(some) == 3 * 3 and len(all_of_them) == 2 * 3 * 3
    assert all(torch.equal(all_of_them[key], value) for key, value in some.items())
    for key, value in all_of_them.items():
        term, sample, site = key.split(".", 2)
        assert term in ALL_LOSSES and sample in "012"
        assert value.shape == (5, MLP_SITES[site]) and value.min() >= 0 and value.max() < 1
    first_columns = [tuple(value[:, 0].tolist()) for value in all_of_them.values()]
    assert len(set(first_columns)) == len(first_columns), "every draw is another one"
    for other in (draw(alone, step=8), draw(alone, seed=4), draw(alone, stream="eval")):
        assert not any(torch.equal(other[key], value) for key, value in some.items())
    torch.manual_seed(99)
    assert all(torch.equal(value, some[key]) for key, value in draw(alone).items())


def test_noise_follows_the_rows_that_each_site_sees():
    noise = objective_of(TRAIN).draw_noise(torch.randn(2, 3, 4), stream="train", seed=0, step=0)
    assert {key: tuple(value.shape) for key, value in noise.items()} == {
        f"stochastic_recon.0.{path}": (2, 3, C) for path, C in MLP_SITES.items()
    }


# --- the step --------------------------------------------------------------------------------------


def run_step(objective: Objective, step: Any, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logged values with the total in front, and all gradients."""
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    total, logged, _ = step(batch, PROGRESS, noise)
    parameters = objective.model.subcomponent_parameters()
    grads = torch.autograd.grad(total, list(parameters.values()))
    return torch.stack([total.detach(), *logged.values()]), dict(
        zip(parameters, grads, strict=True)
    )


def test_equal_arguments_give_equal_values_and_nothing_is_remembered():
    objective = objective_of()
    batch = torch.randn(6, 4)
    state = torch.get_rng_state()
    values, grads = run_step(objective, objective, batch)
    run_step(objective, objective, 2 * batch[:3])
    again, grads_again = run_step(objective, objective, batch)
    assert torch.equal(values, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert torch.equal(torch.get_rng_state(), state), "no draw from the global generator"


def test_what_a_step_logs():
    objective = objective_of()
    batch = torch.randn(6, 4)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    total, logged, _ = objective(batch, PROGRESS, noise)
    assert set(logged) == {
        "loss/total",
        *(f"loss/{name}" for name in ALL_LOSSES),
        *(f"l0/{path}" for path in MLP_SITES),
    }
    assert all(value.dim() == 0 and not value.requires_grad for value in logged.values())
    weighted = sum(spec["coeff"] * logged[f"loss/{name}"] for name, spec in ALL_LOSSES.items())
    torch.testing.assert_close(total.detach(), weighted)
    g = objective.model.causal_importances(objective.model.target_forward(batch).site_inputs)
    counts = [sum(value > 0.01 for value in row) for row in g.lower["last"].tolist()]
    assert logged["l0/last"].item() == pytest.approx(sum(counts) / len(counts))


def test_the_step_never_asks_for_a_value():
    """Tensors without data: whatever needs a number of theirs (`.item()`, `if tensor`) fails."""
    objective = objective_of()
    batch = torch.randn(6, 4)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    objective.to("meta")
    meta = {key: value.to("meta") for key, value in noise.items()}
    total, _, _ = objective(batch.to("meta"), PROGRESS.to("meta"), meta)
    total.backward()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        total.item()


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("leak", ["both", "gradient"])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["batch", "batch and position"])
def test_one_compiled_graph_equals_eager_execution(leak: Any, shape: tuple[int, ...]):
    torch.manual_seed(0)
    tied = decompose(TiedMLP(), {"enc": 6, "dec": 6}, tied_sites=(("enc", "dec"),), lower_leak=leak)
    plain = decompose(MLP(), MLP_SITES, lower_leak=leak)
    for model, d_in in ((tied, 5), (plain, 4)):
        objective = make_objective(model, ALL_LOSSES)
        batch = torch.randn(*shape, d_in)
        # torch's own options: with the package's, the products of so small matrices become loops that
        # are fused for minutes; tests/test_golden.py has those
        compiled = torch.compile(objective, fullgraph=True, dynamic=False)
        values, grads = run_step(objective, objective, batch)
        fast_values, fast_grads = run_step(objective, compiled, batch)
        torch.testing.assert_close(fast_values, values, rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(fast_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def largest_tensor(step: Callable[..., Any], *args: Any) -> int:
    """Bytes of the largest that a step and its backward pass allocate."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(*args)[0].backward()
    profiler = recorded.profiler
    assert profiler is not None and profiler.kineto_results is not None
    events = profiler.kineto_results.events()
    return max(event.nbytes() for event in events)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
@pytest.mark.compiled
def test_no_tensor_of_every_hidden_neuron_is_ever_written(monkeypatch: pytest.MonkeyPatch):
    """What is compiled never holds (batch, C, hidden), and rather more than (batch, C) nowhere."""
    torch.manual_seed(0)
    rows, C, n_hidden = 512, 20, 16
    sites = {"enc": C, "dec": C}
    model = decompose(TiedMLP(), sites, n_hidden=n_hidden, tied_sites=(("enc", "dec"),))
    objective, batch = make_objective(model, TRAIN), torch.randn(rows, 5)
    args = (batch, PROGRESS, objective.draw_noise(batch, stream="train", seed=0, step=0))
    step = CompiledStep(objective, True, 1)
    step(*args)[0].backward()
    assert largest_tensor(step, *args) <= 2 * 4 * rows * C
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 2**30)
    assert largest_tensor(objective, *args) >= 4 * rows * C * n_hidden


# --- the loop --------------------------------------------------------------------------------------


def test_a_module_and_a_generator_of_batches_are_all_it_takes():
    config = make_config(
        {**TRAIN, "importance_minimality": {"coeff": 1e-3, "pnorm": 1.0}},
        sites={"first": 8, "deep.*": 6},
        steps=150,
        lr=2e-2,
    )
    recorder = Recorder()
    own = problem()
    expected = own.target(torch.ones(2, 4))
    model = spd.decompose(own, config, observer=recorder).model
    assert isinstance(model, ComponentModel) and list(model.sites) == ["first", "deep.mid"]
    history = [values["loss/faithfulness"] for _, values in recorder.lines if "lr" in values]
    assert history[-1] < 0.05 * history[0]
    torch.testing.assert_close(model(torch.ones(2, 4)), expected, rtol=0, atol=0.1)
    ci = model.causal_importances(model.target_forward(torch.rand(5, 4)).site_inputs)
    assert ci.lower["first"].shape == (5, 8)


def parameters_after(steps: int, **changes: Any) -> dict[str, Tensor]:
    config = make_config(TRAIN, steps=steps, lr=1e-2, **changes)
    model = spd.decompose(problem(), config, quiet=True).model
    return {name: p.detach() for name, p in model.subcomponent_parameters().items()}


def test_a_run_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = parameters_after(3)
    state = torch.get_rng_state()
    second = parameters_after(3, log_every=1, eval_every=1)  # what is looked at changes nothing
    other = parameters_after(3, seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["last.subcomponents.V"], other["last.subcomponents.V"])
    torch.manual_seed(0)
    MLP()
    assert torch.equal(torch.get_rng_state(), state), "no draw from the global generator"


def test_logging_and_evaluation_at_their_steps():
    recorder = Recorder()
    schedule = ScheduleConfig(type="linear", warmup_frac=0.3)
    config = make_config(
        TRAIN, steps=10, lr=0.5, lr_schedule=schedule, log_every=4, eval_every=5, n_eval_batches=2
    )
    spd.decompose(problem(), config, observer=recorder)
    assert recorder.steps_with("lr") == [0, 4, 8, 9]
    assert recorder.steps_with("eval/loss/total") == [0, 5, 10]
    for step, values in recorder.lines:
        if "lr" in values:
            assert values["lr"] == 0.5 * schedule_factor(schedule, step, 10)
            assert set(values) >= {"loss/total", "loss/faithfulness", "loss/stochastic_recon"}
    optimizer_moves = [v["loss/faithfulness"] for s, v in recorder.lines if "lr" in v]
    assert len(set(optimizer_moves)) == len(optimizer_moves)


@pytest.mark.parametrize("grad_clip", [None, 1e-3])
def test_gradient_norms_of_both_groups_are_those_of_the_first_step(grad_clip: float | None):
    """Before any clipping, of what backward leaves."""
    config = make_config(TRAIN, steps=3, log_every=2, grad_clip=grad_clip)
    recorder = Recorder()
    spd.decompose(problem(), config, observer=recorder)
    assert recorder.steps_with("grad_norm/components") == recorder.steps_with("lr") == [0, 2]
    run = prepare(problem(), config)
    inputs = step_inputs(run, 0, {})
    total, _, _ = run.objective(inputs.batch, inputs.progress, dict(inputs.noise), None)
    total.backward()
    of_group = {"components": [], "importances": []}
    for name, parameter in run.objective.model.subcomponent_parameters().items():
        own = name.endswith(("subcomponents.V", "subcomponents.U"))
        of_group["components" if own else "importances"].append(parameter)
    _, first = next(line for line in recorder.lines if "lr" in line[1])
    for group, parameters in of_group.items():
        assert len(parameters) > 2
        squares = [(p.grad**2).sum().item() for p in parameters if p.grad is not None]
        assert first[f"grad_norm/{group}"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
        assert first[f"grad_norm/{group}"] > 0


def test_without_a_gradient_the_norm_is_zero():
    recorder = Recorder()
    spd.decompose(
        problem(), make_config({"faithfulness": {"coeff": 1}}, steps=1), observer=recorder
    )
    row = next(values for _, values in recorder.lines if "lr" in values)
    assert row["grad_norm/importances"] == 0.0 and row["grad_norm/components"] > 0


def test_the_first_step_with_a_warm_up_changes_nothing():
    config = make_config(TRAIN, steps=2, lr_schedule=ScheduleConfig(warmup_frac=0.5))
    recorder = Recorder()
    config = config.model_copy(update={"log_every": 1})
    spd.decompose(problem(), config, observer=recorder)
    first, second = (values["loss/faithfulness"] for _, values in recorder.lines if "lr" in values)
    assert first == second


@pytest.mark.parametrize(
    ("step", "every", "last", "expected"),
    [(0, 5, False, True), (4, 5, False, False), (5, 5, False, True), (7, 5, True, True)],
)
def test_due(step: int, every: int, last: bool, expected: bool):
    assert due(step, every, last) == expected
    assert due(step, 1, last=False)


def test_a_term_that_is_not_finite_stops_the_run_and_is_named():
    broken = (torch.full((2, 4), torch.nan) for _ in range(9))
    config = make_config(TRAIN, steps=5)
    with pytest.raises(NonFiniteError, match=r"step 0: .*loss/stochastic_recon = nan") as caught:
        spd.decompose(problem(train_batches=broken), config, quiet=True)
    assert "faithfulness" not in str(caught.value)


def test_losses_that_are_all_off_are_refused():
    off = {name: {**spec, "coeff": 0.0} for name, spec in TRAIN.items()}
    with pytest.raises(UserError, match="coefficient above 0"):
        prepare(problem(), make_config(off))


# --- held-out data ---------------------------------------------------------------------------------


def test_evaluation_sees_the_same_held_out_batches_every_time():
    config = make_config(TRAIN, n_eval_batches=3)
    prepared = prepare(problem(), config)
    held_out = tensors(prepared.eval_batches)
    expected = batches(1)
    assert len(held_out) == 3 and all(torch.equal(b, next(expected)) for b in held_out)
    assert evaluate(prepared) == evaluate(prepared)
    noise = [ctx.noise for ctx in eval_contexts(prepared)]
    key = "stochastic_recon.0.first"
    train = prepared.objective.draw_noise(held_out[0], stream="train", seed=0, step=0)
    assert not torch.equal(noise[0][key], noise[1][key])
    assert not torch.equal(noise[0][key], train[key])


def test_held_out_data_of_an_experiment_come_from_another_stream(tmp_path: Path):
    training = {"model": {"n_features": 5, "n_hidden": 2}, "steps": 1, "batch_size": 1, "lr": 1.0}
    weights = {name: value.clone() for name, value in TMSModel(5, 2).state_dict().items()}
    trained = parse(TMSTrainConfig, training, "test")
    save_target(tmp_path / "target", trained, TrainedTarget(weights, {}))
    raw = {
        **{"experiment": "test", "target": str(tmp_path / "target"), "sites": {"linear1": 2}},
        **{"losses": TRAIN, "steps": 1, "lr": 1.0, "batch_size": 64, "eval_batch_size": 64},
    }
    built = build(parse(TMSConfig, raw, "test"), torch.device("cpu"))
    assert isinstance(built.target, nn.Module)
    train = [next(built.train_batches) for _ in range(3)]
    held_out = [next(built.eval_batches) for _ in range(3)]
    assert not any(torch.equal(a, b) for a in train for b in held_out)
    assert all((b != 0).float().mean() == pytest.approx(0.05, abs=0.05) for b in held_out)
