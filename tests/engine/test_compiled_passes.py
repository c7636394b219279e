"""Passes one after another with the target's layers compiled: gradients and terms of an eager step."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from spd.engine.layers import SharedPrefix
from spd.engine.prepare import prepare
from spd.engine.sequential import CompiledPasses, Sequential
from spd.experiments.lm.model import TokenModel
from spd.objective import Objective
from spd.optimize import Silent, run_steps
from spd.problem import Problem
from tests.toy import ALL_LOSSES, make_config

PROGRESS = torch.tensor(0.5)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 97,
    "initializer_range": 0.1,
    "use_cache": False,
}
SITES = {
    "llama": [
        "model.embed_tokens",
        "model.layers.[02].mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ],
    "gpt2": ["transformer.wte", "transformer.h.[02].mlp.c_fc", "transformer.h.1.attn.c_proj"],
}


def problem(kind: str) -> Problem:
    torch.manual_seed(0)
    config = {
        "llama": transformers.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=1),
        "gpt2": transformers.GPT2Config(**SIZES),
    }[kind]
    inner = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = iter(lambda: torch.randint(0, 97, (2, 12)), None)
    return Problem(TokenModel(inner, "logits"), tokens, tokens, recon="kl")


def objective_of(kind: str) -> Objective:
    config = make_config(ALL_LOSSES, sites=dict.fromkeys([*SITES[kind], "lm_head"], 6))
    return prepare(problem(kind), config).objective


def gradients(objective: Objective) -> dict[str, Tensor]:
    grads = {n: p.grad for n, p in objective.model.subcomponent_parameters().items()}
    objective.zero_grad(set_to_none=True)
    return {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_terms_and_gradients_are_those_of_an_eager_step(kind: str):
    objective = objective_of(kind)
    batch = torch.randint(0, 97, (2, 12))
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    expected_terms, _ = Sequential(objective)(batch, PROGRESS, noise)
    expected = gradients(objective)
    step = CompiledPasses(objective, True, 10)
    for _ in range(2):
        terms, _ = step(batch, PROGRESS, noise, None)
        torch.testing.assert_close(dict(terms), dict(expected_terms), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients(objective), expected, rtol=1e-4, atol=1e-5)
    assert step.compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 1, "nothing was compiled"
    other = torch.randint(0, 97, (3, 7))
    objective.model(other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, (
        "what is outside of a step is not compiled"
    )


@pytest.mark.slow
@pytest.mark.compiled
def test_layers_are_compiled_for_other_shapes_however_many_graphs_a_process_has(
    monkeypatch: pytest.MonkeyPatch,
):
    """Torch would run them eagerly from its limit on. Graphs are made here, but no code of them."""
    import torch._dynamo.config

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = make_config({"recon": {"coeff": 1.0}}, sites={"model.layers.1.mlp.up_proj": 6})
    objective = prepare(problem("llama"), config).objective
    step, graphs = CompiledPasses(objective, True, 10), []
    for length in (12, 7, 12, 7):
        batch = torch.randint(0, 97, (2, length))
        noise = objective.noise(batch, stream="train", seed=0, step=0)
        step(batch, PROGRESS, noise, None)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == 2 * graphs[0] and graphs[1:] == graphs[1:2] * 3


@pytest.mark.slow
def test_a_step_that_cannot_be_compiled_is_done_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from torch._dynamo.exc import TorchDynamoException

    caplog.set_level(logging.INFO)
    objective = objective_of("llama")
    batch = torch.randint(0, 97, (2, 12))
    noise = objective.noise(batch, stream="train", seed=0, step=0)
    expected_terms, _ = Sequential(objective)(batch, PROGRESS, noise)
    expected = gradients(objective)
    forward = SharedPrefix.forward
    calls: list[bool] = []

    def breaking(self: SharedPrefix, *args: Any) -> Tensor:
        calls.append(self.compiled)
        if (
            self.compiled and len(calls) == 4
        ):  # some passes have left their gradients behind by then
            raise TorchDynamoException("no such luck")
        return forward(self, *args)

    monkeypatch.setattr("spd.engine.sequential.Sequential.compile_passes", switched)
    monkeypatch.setattr(SharedPrefix, "forward", breaking)
    monkeypatch.setattr("spd.engine.compilation.nominal_seconds", lambda *_: 1.0)
    monkeypatch.setattr("spd.engine.compilation._has_compiler", lambda: True)
    monkeypatch.setattr("spd.engine.layers.torch.compile", lambda function, **_: function)
    step = CompiledPasses(objective, "auto", 1000)
    terms, _ = step(batch, PROGRESS, noise, None)
    assert step.compiled is False and True in calls and calls[-1] is False
    assert dict(terms) == dict(expected_terms)
    torch.testing.assert_close(gradients(objective), expected)
    (line,) = [line for line in caplog.messages if "torch.compile" in line]
    assert line.endswith("no such luck")


def switched(sequential: Sequential, compiled: bool) -> None:
    sequential.prefix.compiled = compiled


@pytest.mark.parametrize(("seconds", "compiled"), [(0.1, False), (0.2, True)])
def test_auto_compiles_runs_that_are_longer_than_compiling(
    monkeypatch: pytest.MonkeyPatch, seconds: float, compiled: bool
):
    """A thousand eager steps of 0.2 s would not be worth it, of 0.4 s they are."""
    monkeypatch.setattr("spd.engine.compilation.nominal_seconds", lambda *_: seconds)
    monkeypatch.setattr("spd.engine.compilation._has_compiler", lambda: True)
    step = CompiledPasses(objective_of("llama"), "auto", 1000)
    assert step._wanted() is compiled


@pytest.mark.slow
@pytest.mark.compiled
def test_a_run_is_compiled_where_it_is_asked_for(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    values = []
    for compiled in (True, False):
        config = make_config(
            ALL_LOSSES, sites={"model.layers.*.mlp.*_proj": 6}, steps=3, compile=compiled
        )
        model = run_steps(prepare(problem("llama"), config), Silent())
        values.append({name: p.detach() for name, p in model.subcomponent_parameters().items()})
    assert sum("compiled the training step" in line for line in caplog.messages) == 1
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-5)
