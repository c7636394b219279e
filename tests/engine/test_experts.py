"""Experts whose matrices are parts of a parameter, taken apart: each matrix of each expert is a site."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.engine.experts import Experts, experts_in
from spd.engine.prepare import Prepared, prepare
from spd.engine.sequential import Sequential
from spd.experiments.lm.model import TokenModel
from spd.importance import upper_leaky_hard_sigmoid
from spd.losses import importance_minimality
from spd.masks import RoutedInput, SiteMask
from spd.problem import Problem
from spd.runs.export import export
from tests.toy import make_config, make_objective, terms_of

SHAPE: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16},
    **{"vocab_size": 37, "initializer_range": 0.3, "num_local_experts": 4},
}
KINDS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SHAPE, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(  # transposed, with biases, interleaved
        transformers.GptOssConfig(**SHAPE, num_experts_per_tok=2, sliding_window=4)
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(  # rows of all tokens to all experts
        transformers.Llama4TextConfig(
            **SHAPE, intermediate_size_mlp=12, num_experts_per_tok=1, pad_token_id=0
        )
    ),
}
PLACE = {"mixtral": "mlp.experts", "gpt_oss": "mlp.experts", "llama4": "feed_forward.experts"}
LAST = "model.layers.1"
LOSSES: dict[str, Any] = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 0.3, "pnorm": 2.0},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
}
TOKENS = torch.randint(3, 37, (2, 6), generator=torch.Generator().manual_seed(1))


def made(kind: str) -> TokenModel:
    torch.manual_seed(0)
    inner = KINDS[kind]()
    for name, parameter in inner.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.3)
    inner.config.use_cache = False
    return TokenModel(inner, "logits").eval()


def prepared(target: nn.Module, *patterns: str, C: int = 12, **changes: Any) -> Prepared:
    problem = Problem(target, [TOKENS], [TOKENS], recon="kl")
    config = make_config(LOSSES, sites=dict.fromkeys(patterns, C), n_eval_batches=1, **changes)
    return prepare(problem, config)


@pytest.fixture(params=KINDS, name="kind")
def kind_fixture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(name="model")
def model_fixture(kind: str) -> ComponentModel:
    return prepared(made(kind), f"*.{PLACE[kind]}.[0-9].*_proj").objective.model


@torch.no_grad()
def test_taken_apart_they_compute_and_are_called_what_they_did(kind: str):
    target = made(kind)
    output, state = target(TOKENS), copy.deepcopy(target.state_dict())
    model = prepared(target, f"*.{PLACE[kind]}.?.*").objective.model
    assert len(model.sites) == 2 * 4 * 2
    assert f"{LAST}.{PLACE[kind]}.3.gate_up_proj" in model.sites
    torch.testing.assert_close(target(TOKENS), output)
    after = target.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)
    for _, experts in experts_in(target):
        own = [p for _, _, matrix in experts.matrices() for p in matrix.parameters()]
        shared = {parameter.untyped_storage().data_ptr() for parameter in own}
        assert len(shared) == len(list(experts.original.parameters())), "no weight is held twice"


@torch.no_grad()
def test_a_site_reads_the_tokens_routed_to_its_expert_alone(kind: str, model: ComponentModel):
    """And its importances are 0 elsewhere; what it does not read, it does not change."""
    inputs = model.target_forward(TOKENS).site_inputs
    ci = model.causal_importances(inputs)
    whole = model.target_forward(TOKENS).output.flatten(0, 1)
    total = 0
    for e in range(4):
        for name in ("gate_up_proj", "down_proj"):
            path = f"{LAST}.{PLACE[kind]}.{e}.{name}"
            x = inputs[path]
            assert isinstance(x, RoutedInput) and x.rows.shape[0] == len(x.routed.positions)
            used = torch.zeros(12, dtype=torch.bool)
            used[x.routed.positions] = True
            assert ci.lower[path].shape == (12, 12)
            assert ci.lower[path][used].any(dim=-1).all() and not ci.lower[path][~used].any()
            off = model(TOKENS, {path: torch.zeros(12, 12)}).flatten(0, 1)
            torch.testing.assert_close(off[~used], whole[~used])
            assert not torch.isclose(off[used], whole[used]).all(dim=-1).any()
            total += int(used.sum())
    assert total == 12 * 2 * (1 if kind == "llama4" else 2), "every token has as many experts"


@torch.no_grad()
def test_exact_subcomponents_reproduce_the_model(kind: str, model: ComponentModel):
    output = model.target_forward(TOKENS).output
    for site in model.sites.values():
        weight = site.target_weight
        tall = weight.shape[0] > weight.shape[1]
        if min(weight.shape) == site.C:
            site.subcomponents.V.copy_(weight if tall else torch.eye(site.C))
            site.subcomponents.U.copy_(torch.eye(site.C) if tall else weight)
    exact = [path for path, site in model.sites.items() if min(site.target_weight.shape) == site.C]
    assert exact == [path for path in model.sites if path.endswith("down_proj")]
    torch.testing.assert_close(model(TOKENS, dict.fromkeys(exact)), output, rtol=1e-4, atol=1e-4)
    delta = {path: SiteMask(delta=torch.ones(2, 6)) for path in model.sites}
    torch.testing.assert_close(model(TOKENS, delta), output, rtol=1e-4, atol=1e-4)
    one = {path: SiteMask(delta=torch.ones(1, 1)) for path in model.sites}
    first = model.target_forward(TOKENS[:1, :1]).output
    torch.testing.assert_close(model(TOKENS[:1, :1], one), first, rtol=1e-4, atol=1e-4)
    nowhere = {path: SiteMask(routed=torch.zeros(2, 6, dtype=torch.bool)) for path in model.sites}
    assert torch.equal(model(TOKENS, nowhere), output)


def test_terms_are_means_over_all_positions(kind: str, model: ComponentModel):
    """An expert that no token is routed to costs nothing, and is no NaN."""
    alone = TOKENS[:1, :1]  # one token, so that most experts have none
    objective = make_objective(model, LOSSES, "kl")
    terms = terms_of(objective, alone)
    inputs = model.target_forward(alone).site_inputs
    idle = [path for path, x in inputs.items() if isinstance(x, RoutedInput) and not len(x.rows)]
    assert len(idle) == 2 * 2 * (3 if kind == "llama4" else 2)
    expected = 0.0
    for path, x in inputs.items():
        assert isinstance(x, RoutedInput)
        rows = model.sites[path].importance_logits(x.rows)
        expected += upper_leaky_hard_sigmoid(rows).square().sum().item()
    assert terms["importance_minimality"].item() == pytest.approx(expected)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in model.subcomponent_parameters().items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_minimality_counts_what_is_not_routed_as_off(model: ComponentModel):
    inputs = model.target_forward(TOKENS).site_inputs
    upper = model.causal_importances(inputs).upper
    rows = 0.0
    for path, x in inputs.items():
        assert isinstance(x, RoutedInput)
        own = model.sites[path].importance_logits(x.rows)
        rows += upper_leaky_hard_sigmoid(own).sum().item()
    assert importance_minimality(upper, 1.0).item() == pytest.approx(rows / 12, rel=1e-4)


def test_users_masks_have_a_row_for_every_position_or_for_every_row(model: ComponentModel):
    g = model.importances(TOKENS).lower
    expected = model(TOKENS, g)
    with model.masked(dict(g)) as target:
        assert torch.equal(target(TOKENS), expected)
    path = next(iter(model.sites))
    half = {path: torch.full((12, 12), 0.5)}
    with model.masked({path: lambda rows: torch.full((len(rows), 12), 0.5)}) as target:
        assert torch.equal(target(TOKENS), model(TOKENS, half))
    with model.masked({path: 0.5}) as target:
        assert torch.equal(target(TOKENS), model(TOKENS, half))
    with model.masked("importances") as target:
        assert target(TOKENS).isfinite().all()


def test_they_are_exported_loaded_and_copied_as_the_parameters_that_they_are(
    kind: str, model: ComponentModel, tmp_path: Path
):
    target: Any = model.target
    output, cls = model.target_forward(TOKENS).output, type(target.inner)
    same = cls.from_pretrained(export(model, tmp_path / "target"))
    torch.testing.assert_close(same(TOKENS).logits, output)
    summed = cls.from_pretrained(export(model, tmp_path / "sum", "sum"))
    torch.testing.assert_close(summed(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)
    path = next(path for path in model.sites if path.startswith(LAST))
    edited = cls.from_pretrained(
        export(model, tmp_path / "edited", "edited", edits={path: torch.zeros(12)})
    )
    masks = {path: SiteMask(torch.zeros(12), delta=torch.ones(2, 6))}
    torch.testing.assert_close(edited(TOKENS).logits, model(TOKENS, masks), rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model).double()
    torch.testing.assert_close(twin(TOKENS).float(), model(TOKENS), rtol=1e-4, atol=1e-4)
    assert all(value.dtype == torch.float64 for value in twin.target.state_dict().values())
    target.load_state_dict(summed.state_dict())
    torch.testing.assert_close(target(TOKENS), summed(TOKENS).logits)


def test_only_those_that_a_pattern_names_are_taken_apart(kind: str):
    target = made(kind)
    output = target(TOKENS)
    prepared(target, f"{LAST}.{PLACE[kind]}.2.down_proj")
    assert [path for path, _ in experts_in(target)] == [f"{LAST}.{PLACE[kind]}"]
    later = prepared(target, "model.layers.*.self_attn.q_proj").objective.model
    assert not experts_in(target) and torch.equal(target(TOKENS), output)
    assert not any(isinstance(module, Experts) for module in later.modules())
    with pytest.raises(UserError, match=rf"layers.0.{PLACE[kind]}.\*.gate_up_proj"):
        prepared(target, "model.layers.*.experts.gate_up")
    with pytest.raises(UserError, match="compile: true .* no experts as sites"):
        changes: dict[str, Any] = {"compile": True, "passes": "together"}
        prepared(target, f"{LAST}.{PLACE[kind]}.2.down_proj", **changes)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_what_taken_apart_gives_something_else_is_refused():
    target = made("mixtral")
    experts = target.get_submodule(f"{LAST}.mlp.experts")
    experts.register_forward_hook(doubled)
    with pytest.raises(UserError, match=f"the experts of '{LAST}.mlp.experts'.* something else"):
        prepared(target, f"{LAST}.mlp.experts.2.down_proj")


def test_experts_without_a_token_are_named_in_one_line(caplog: pytest.LogCaptureFixture):
    few = TOKENS[:1, :1]
    problem = Problem(made("mixtral"), [few], [few], recon="kl")
    config = make_config(LOSSES, sites={"*.experts.*.down_proj": 3}, n_eval_batches=1)
    with caplog.at_level(logging.WARNING):
        prepare(problem, config)
    (line,) = caplog.messages
    assert line.startswith("no token of the first batch of held-out data is routed to 4 matrices")


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_passes_one_by_one_give_the_gradients_of_all_together(kind: str, checkpointing: bool):
    execution = {"activation_checkpointing": checkpointing}
    patterns = (f"*.{PLACE[kind]}.[0-9].*_proj", "*.self_attn.o_proj")
    run = prepared(made(kind), *patterns, C=5, **execution).objective
    noise = run.noise(TOKENS, stream="train", seed=0, step=0)
    run(TOKENS, torch.tensor(0.5), dict(noise))[0].backward()
    parameters = run.model.subcomponent_parameters()
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    run.zero_grad(set_to_none=True)
    Sequential(run)(TOKENS, torch.tensor(0.5), noise)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
