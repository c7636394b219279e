"""Mixed precision, activation checkpointing and clipped gradients, on a small Llama."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import spd
from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine.layers import checkpoint_layers_
from spd.engine.prepare import evaluate, prepare
from spd.engine.sequential import Sequential
from spd.experiments.lm.model import TokenModel as HuggingFaceModel
from spd.importance import AffineImportanceConfig, lower_leaky_hard_sigmoid
from spd.objective import Objective
from spd.problem import Problem
from tests.toy import MLP, MLP_SITES, TokenModel, decompose, make_config, make_objective

pytestmark = pytest.mark.undrawn

SITES = {"model.embed_tokens": 5, "model.layers.*.mlp.down_proj": 4, "model.layers.1.*.q_proj": 3}
LOSSES: dict[str, Any] = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 0.1, "pnorm": 2.0},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
}
PROGRESS = torch.tensor(0.5)


def llama(**settings: Any) -> HuggingFaceModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.3, **settings)
    return HuggingFaceModel(transformers.LlamaForCausalLM(config).eval(), "logits")


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 37, (2, 6), generator=torch.Generator().manual_seed(seed))


def batches(seed: int) -> Iterator[Tensor]:
    while True:
        seed += 2
        yield tokens(seed)


def wrapped(**options: Any) -> ComponentModel:
    return ComponentModel(llama(), SITES, AffineImportanceConfig(), **options)


def gradients(objective: Objective, *, together: bool) -> dict[str, Tensor]:
    noise = objective.noise(tokens(), stream="train", seed=0, step=0)
    if together:
        objective(tokens(), PROGRESS, dict(noise))[0].backward()
    else:
        Sequential(objective)(tokens(), PROGRESS, noise)
    grads = {}
    for name, parameter in objective.model.subcomponent_parameters().items():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    return grads


# --- activation checkpointing ----------------------------------------------------------------------


class Calls:
    """Counts the calls of a module of the target."""

    def __init__(self, model: ComponentModel, path: str) -> None:
        self.n = 0
        model.target.get_submodule(path).register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.n += 1


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_recomputed_layers_give_the_same_gradients(together: bool):
    plain, checkpointed = wrapped(), wrapped()
    checkpoint_layers_(checkpointed)
    inside = "model.layers.1.mlp.up_proj"
    before, after = Calls(plain, inside), Calls(checkpointed, inside)
    own = gradients(make_objective(checkpointed, LOSSES, "kl"), together=together)
    expected = gradients(make_objective(plain, LOSSES, "kl"), together=together)
    for name, grad in expected.items():
        torch.testing.assert_close(own[name], grad, msg=name)
        assert grad.any()
    # target, for shapes and step; all sites at once, and each of the four alone
    assert before.n == 2 + 1 + 4
    assert after.n == 2 + 2 * (1 + 4)
    assert checkpointed.running.current is None


def test_recomputed_layers_are_not_stored():
    sizes = []
    for model in (wrapped(), wrapped()):
        if sizes:
            checkpoint_layers_(model)
        stored: dict[int, int] = {}

        def keep(tensor: Tensor, stored: dict[int, int] = stored) -> Tensor:
            stored[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(tokens())
        sizes.append(sum(stored.values()))
        assert out.requires_grad
    assert sizes[1] < 0.5 * sizes[0]


def test_a_cache_is_not_written_twice():
    """Models keep keys and values unless told otherwise; a second call would lengthen them."""
    target = llama(use_cache=True)
    expected = target(tokens())
    model = ComponentModel(target, SITES, AffineImportanceConfig())
    checkpoint_layers_(model)
    model(tokens()).square().sum().backward()
    torch.testing.assert_close(model.target_forward(tokens()).output, expected)


def test_a_target_without_layers_is_refused():
    with pytest.raises(UserError, match="activation_checkpointing: true .* TokenModel has none"):
        checkpoint_layers_(decompose(TokenModel(), {"mid": 2}))


# --- mixed precision -------------------------------------------------------------------------------


def types_within(model: ComponentModel, path: str) -> set[torch.dtype]:
    """Of what a module of the target gives out."""
    seen: set[torch.dtype] = set()
    model.target.get_submodule(path).register_forward_hook(lambda *args: seen.add(args[2].dtype))
    return seen


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_only_the_target_and_its_sites_run_in_bf16(together: bool):
    model = wrapped(autocast=torch.bfloat16)
    plain, site = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    seen = {path: types_within(model, path) for path in (plain, site, "model.embed_tokens")}
    objective = make_objective(model, LOSSES, "kl")
    ctx = objective.context(tokens(), PROGRESS, {})
    assert ctx.target_out.dtype == torch.float32
    for path, g in ctx.ci.lower.items():
        assert g.dtype == ctx.ci.upper[path].dtype == torch.float32
        x = ctx.site_inputs[path]
        assert isinstance(x, torch.Tensor)
        h = model.sites[path].subcomponents.acts(x.float() if x.is_floating_point() else x)
        assert torch.equal(g, lower_leaky_hard_sigmoid(model.sites[path].own_importance()(h)))
    exact = gradients(make_objective(wrapped(), LOSSES, "kl"), together=together)
    for name, grad in gradients(objective, together=together).items():
        assert grad.dtype == torch.float32
        assert (grad - exact[name]).norm() < 0.3 * exact[name].norm(), name
    assert seen[plain] == seen[site] == {torch.bfloat16}
    assert seen["model.embed_tokens"] == {torch.float32}, "autocast leaves embeddings alone"
    assert not torch.equal(ctx.target_out, wrapped().target_forward(tokens()).output)


# --- in a run --------------------------------------------------------------------------------------


def problem(target: nn.Module) -> Problem:
    return Problem(target, batches(0), batches(1), recon="kl")


def config_of(**changes: Any) -> Any:
    return make_config(LOSSES, **{"sites": SITES, "steps": 3, "lr": 1e-2, **changes})


def trained(**changes: Any) -> Mapping[str, Tensor]:
    model = spd.decompose(problem(llama()), config_of(**changes), quiet=True).model
    return {name: p.detach() for name, p in model.subcomponent_parameters().items()}


def test_the_settings_reach_the_run():
    plain = trained()
    checkpointed, half = trained(activation_checkpointing=True), trained(autocast="bf16")
    changed = [name for name in plain if not torch.equal(plain[name], half[name])]
    assert len(changed) > len(plain) / 2
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-3, atol=1e-4, msg=name)
    prepared = prepare(problem(llama()), config_of(autocast="bf16"))
    exact = evaluate(prepare(problem(llama()), config_of()))
    assert evaluate(prepared) == pytest.approx(exact, rel=0.1)


def test_compiling_recomputed_layers_is_refused():
    config = config_of(activation_checkpointing=True, passes="together", compile=True)
    with pytest.raises(
        UserError, match="compile: true .*activation_checkpointing: false .it is true"
    ):
        prepare(problem(llama()), config)


def test_clipped_gradients_are_those_of_a_plain_loop():
    losses = {"faithfulness": {"coeff": 1.0}, "stochastic_recon": {"coeff": 1.0}}
    limit, steps = 0.01, 3

    def data() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield 10 ** torch.rand(1, generator=generator) * torch.rand(8, 4, generator=generator)

    def run(grad_clip: float | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = make_config(losses, steps=steps, lr=0.1, grad_clip=grad_clip)
        model = spd.decompose(Problem(MLP(), data(), data()), config, quiet=True).model
        return {name: p.detach() for name, p in model.subcomponent_parameters().items()}

    torch.manual_seed(0)
    prepared = prepare(Problem(MLP(), data(), data()), make_config(losses, steps=steps, lr=0.1))
    objective, batches = prepared.objective, data()
    parameters = objective.model.subcomponent_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.0)
    for step in range(steps):
        batch = next(batches)
        noise = objective.draw_noise(batch, stream="train", seed=0, step=step)
        objective(batch, PROGRESS, noise)[0].backward()
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        norm = sum(grad.square().sum().item() for grad in grads) ** 0.5
        assert norm > limit
        for grad in grads:
            grad.mul_(limit / norm)
        optimizer.step()
        optimizer.zero_grad()
    clipped, free = run(limit), run(None)
    for name, parameter in parameters.items():
        torch.testing.assert_close(clipped[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    assert list(MLP_SITES) == list(objective.model.sites)
    assert any(not torch.allclose(clipped[n], free[n], rtol=1e-2, atol=1e-2) for n in free)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"autocast": "fp16"},
            "execution.autocast: unknown name 'fp16'; did you mean 'bf16'",
        ),
        ({"grad_clip": 0}, "grad_clip: input should be greater than 0"),
        ({"passes": "one"}, "execution.passes: unknown name 'one'"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config_of(**setting)
