"""Masked passes one after another: the gradients of all together, in the memory of one."""

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.config import UserError
from spd.engine.compilation import CompiledStep
from spd.engine.ensemble import Alone, StepInputs
from spd.engine.prepare import Prepared, prepare
from spd.engine.sequential import Sequential
from spd.engine.step import JointStep, passes_of
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.losses import Noise
from spd.noise import StepNoise
from spd.objective import Objective
from spd.optimize import Interrupted, Silent, run_steps
from spd.problem import Problem
from tests.little_lm import little_model
from tests.toy import (
    ALL_LOSSES,
    MLP,
    MLP_SITES,
    N_SAMPLES,
    TiedMLP,
    TokenModel,
    decompose,
    make_config,
    make_objective,
)

pytestmark = pytest.mark.undrawn

PROGRESS = torch.tensor(0.5)


def step(objective: Objective, batch: Tensor, *, together: bool) -> Mapping[str, Tensor]:
    """What is logged; gradients are left in the parameters."""
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    if not together:
        return Sequential(objective)(batch, PROGRESS, noise)[0]
    total, logged, _ = objective(batch, PROGRESS, dict(noise))
    total.backward()
    return logged


def gradients(objective: Objective) -> dict[str, Tensor | None]:
    grads = {n: p.grad for n, p in objective.model.subcomponent_parameters().items()}
    objective.zero_grad(set_to_none=True)
    return grads


def made(kind: str) -> tuple[Objective, Tensor]:
    torch.manual_seed(0)
    if kind == "tied":
        model = decompose(TiedMLP(), {"enc": 6, "dec": 6}, tied_sites=(("enc", "dec"),))
        return make_objective(model, ALL_LOSSES), torch.randn(8, 5)
    if kind == "tokens":
        model = decompose(TokenModel(), {"embed": 6, "mid": 3, "lm_head": 4})
        return make_objective(model, ALL_LOSSES, "kl"), torch.randint(0, 11, (2, 5))
    if kind == "embedding":
        losses = {"embedding_recon": {"coeff": 0.5, "n_samples": 2, "unembed": "lm_head"}}
        return make_objective(decompose(TokenModel(), {"embed": 6}), losses), torch.arange(8)
    return make_objective(decompose(MLP(), MLP_SITES), ALL_LOSSES), torch.randn(8, 4)


@pytest.mark.parametrize("kind", ["plain", "tied", "tokens", "embedding"])
def test_gradients_and_logged_values_equal_those_of_one_graph(kind: str):
    objective, batch = made(kind)
    logged = step(objective, batch, together=True)
    expected = gradients(objective)
    own_logged = step(objective, batch, together=False)
    own = gradients(objective)
    assert list(own_logged) == list(logged)
    for key, value in logged.items():
        torch.testing.assert_close(own_logged[key], value, msg=key)
        assert not own_logged[key].requires_grad
    for name, grad in expected.items():
        torch.testing.assert_close(own[name], grad, rtol=1e-4, atol=1e-7, msg=name)
    assert sum(grad is not None for grad in own.values()) >= 2


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_each_loss_alone_reaches_what_it_reaches_in_one_graph(name: str):
    """Nothing arrives at the importance functions from a loss that does not look at importances."""
    torch.manual_seed(0)
    objective = make_objective(decompose(MLP(), MLP_SITES), {name: ALL_LOSSES[name]})
    batch = torch.randn(8, 4)
    step(objective, batch, together=True)
    expected = gradients(objective)
    step(objective, batch, together=False)
    for parameter, grad in gradients(objective).items():
        assert (grad is None) == (expected[parameter] is None), parameter
        if grad is not None:
            torch.testing.assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-7)


class Watched(nn.Module):
    """Counts, whenever the target begins a pass, how many outputs of earlier passes still exist."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.outputs: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.alive.append(sum(ref() is not None for ref in self.outputs))
        hidden = self.inner.get_submodule("first")(x).relu()
        output = self.inner.get_submodule("last")(self.inner.get_submodule("deep.mid")(hidden))
        self.outputs += [weakref.ref(hidden), weakref.ref(output)]
        return output


def watched_step(*, together: bool) -> list[int]:
    torch.manual_seed(0)
    target = Watched(MLP())
    model = decompose(target, {f"inner.{path}": C for path, C in MLP_SITES.items()})
    objective, batch = make_objective(model, ALL_LOSSES), torch.randn(8, 4)
    objective.noise(batch, stream="train", seed=0, step=0)  # finds out shapes by a pass of its own
    target.alive.clear()
    step(objective, batch, together=together)
    return target.alive


def test_one_pass_is_gone_before_the_next_begins():
    passes = 1 + 1 + 1 + 3 + N_SAMPLES + 3 * N_SAMPLES
    # what stays is of the target: its output, and its hidden layer as the input of a site
    assert watched_step(together=False) == [0] + [2] * (passes - 1)
    assert max(watched_step(together=True)) > 3 * N_SAMPLES


class Kept:
    """What a graph keeps of the forward pass for the way back."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_a_joint_step_keeps_nothing_of_its_graph():
    """Nothing retains it: what was saved is released by the way back, though the terms are still held."""
    torch.manual_seed(0)
    objective = make_objective(decompose(MLP(), MLP_SITES), ALL_LOSSES)
    trained, batch = Alone(objective), torch.randn(8, 4)
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    inputs = StepInputs(batch, PROGRESS, noise, None, objective.initial_state())
    saved: list[weakref.ref[Kept]] = []

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        saved.append(weakref.ref(kept))
        return kept

    step = JointStep(trained, CompiledStep(trained.function, False, 1), tf32=False, resumed=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        terms, state = step(inputs)
    assert len(saved) > 50 and not any(ref() is not None for ref in saved)
    assert "loss/total" in terms and all(p.grad is not None for p in trained.parameters)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        total, *_ = trained.function(batch, PROGRESS, dict(noise), None, state)
        assert any(ref() is not None for ref in saved), "before the way back it is there"
        total.backward(retain_graph=True)
    assert any(ref() is not None for ref in saved), "and it would be seen if it were retained"


# --- noise -----------------------------------------------------------------------------------------


class Recorded(Mapping[str, Tensor]):
    """Writes down when which draw is asked for (not the first: that is what shape checks look at)."""

    def __init__(self, noise: Noise, events: list[str]) -> None:
        self.noise, self.events = noise, events
        self.given: list[weakref.ref[Tensor]] = []

    def __getitem__(self, key: str) -> Tensor:
        if key == "for shape checks":
            return torch.zeros(1)
        self.events.append(key)
        draw = self.noise[key]
        self.given.append(weakref.ref(draw))
        return draw

    def n_alive(self) -> int:
        """Draws that still exist."""
        return sum(ref() is not None for ref in self.given)

    def __iter__(self) -> Iterator[str]:
        return iter(["for shape checks", *self.noise])

    def __len__(self) -> int:
        return len(self.noise)


def test_noise_is_drawn_when_its_pass_needs_it():
    torch.manual_seed(0)
    losses = {"stochastic_recon_layerwise": {"coeff": 1.0, "n_samples": 2}}
    model = decompose(MLP(), MLP_SITES)
    objective, batch = make_objective(model, losses), torch.randn(8, 4)
    events: list[str] = []
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    model.target.register_forward_pre_hook(lambda *_: events.append("pass"))
    Sequential(objective)(batch, PROGRESS, Recorded(noise, events))
    keys = [f"stochastic_recon_layerwise.{s}.{path}" for s in range(2) for path in MLP_SITES]
    assert events == ["pass", *(event for key in keys for event in (key, "pass"))]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_the_pass_over_all_sites_keeps_no_draw_for_its_backward_pass(together: bool):
    torch.manual_seed(0)
    losses = {"stochastic_recon": {"coeff": 1.0}}
    objective, batch = make_objective(decompose(MLP(), MLP_SITES), losses), torch.randn(8, 4)
    noise = Recorded(objective.noise(batch, stream="train", seed=0, step=0), [])
    alive: list[int] = []
    objective.model.target.register_forward_hook(lambda *_: alive.append(noise.n_alive()))
    if together:
        objective(batch, PROGRESS, noise)[0].backward()
    else:
        Sequential(objective)(batch, PROGRESS, noise)
    n_sites = len(MLP_SITES)
    assert alive == [0, n_sites if together else 0]  # after the target's pass, and the masked one
    assert len(noise.events) == (n_sites if together else 2 * n_sites)


def test_a_draw_is_the_same_whenever_it_is_asked_for():
    shapes = {"a": torch.Size((3, 4)), "b": torch.Size((2,))}

    def noise(**place: Any) -> StepNoise:
        return StepNoise(
            shapes, torch.device("cpu"), **{"stream": "s", "seed": 0, "step": 1, **place}
        )

    one = noise()
    last, first = one["b"], one["a"]
    assert list(one) == ["a", "b"] and len(one) == 2
    both = dict(noise())
    assert torch.equal(both["a"], first) and torch.equal(both["b"], last)
    assert torch.equal(one["a"], first) and first.shape == (3, 4)
    for place in ({"stream": "t"}, {"seed": 1}, {"step": 2}):
        assert not torch.equal(noise(**place)["a"], first)


# --- in a run --------------------------------------------------------------------------------------


def test_what_auto_means():
    """Whether there are layers that passes can share decides, not what a batch is made of."""
    plain = decompose(MLP(), MLP_SITES)
    layered = decompose(little_model("llama"), {"model.layers.*.mlp.*_proj": 6})
    assert passes_of("auto", plain) == "together"
    assert passes_of("auto", layered) == "one_by_one"
    for setting in ("together", "one_by_one"):
        assert passes_of(setting, plain) == passes_of(setting, layered) == setting


def test_compiling_passes_one_by_one_is_refused():
    """Without layers there is nothing of a pass that could be compiled by itself."""
    tokens = iter(lambda: torch.zeros(2, 3, dtype=torch.long), None)
    problem = Problem(TokenModel(), tokens, tokens, recon="kl")
    config = make_config(ALL_LOSSES, sites={"mid": 3}, compile=True, passes="one_by_one")
    with pytest.raises(UserError, match="compile: true .*passes is 'one_by_one', here one_by_one"):
        prepare(problem, config)


class Recorder(Silent):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append((step, dict(values)))

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self.stepped(step, values)


def prepared(passes: str) -> Prepared:
    def batches(stream: str) -> SparseFeatures:
        config, cpu = SparseFeatureConfig(feature_probability=0.5), torch.device("cpu")
        return SparseFeatures(config, 4, batch_size=8, seed=0, stream=stream, device=cpu)

    torch.manual_seed(0)
    config = make_config(ALL_LOSSES, steps=6, log_every=1, save_every=2, passes=passes)
    return prepare(Problem(MLP(), batches("train"), batches("eval")), config)


def run(
    passes: str, **options: Any
) -> tuple[dict[str, Tensor], list[tuple[int, dict[str, float]]]]:
    """Final parameters and all that was logged."""
    recorder = Recorder()
    model = run_steps(prepared(passes), recorder, **options)
    return {n: p.detach() for n, p in model.subcomponent_parameters().items()}, recorder.lines


def test_stopped_and_resumed(tmp_path: Path):
    """Bit for bit as if it had not been, and nearly as in one graph."""
    parameters, lines = run("one_by_one")
    with pytest.raises(Interrupted):
        stops = iter([False] * 3 + [True])
        run("one_by_one", checkpoints=tmp_path, stop_requested=lambda: next(stops))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000002", "00000003"]
    resumed, rest = run("one_by_one", checkpoints=tmp_path, resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in parameters.items())
    assert rest == [line for line in lines if line[0] >= 3] and rest[0][0] == 3
    _, together = run("together")
    for (step, own), (other_step, expected) in zip(lines, together, strict=True):
        assert step == other_step and own == pytest.approx(expected, rel=1e-4, abs=1e-6)
