"""Every decomposable module of every kind of Hugging Face model, built small from its configuration.

All of a model's Linear, Embedding and Conv1D modules are sites at once.
"""

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.components import decomposable, input_output_weight
from spd.config import UserError
from spd.experiments.lm.model import TokenModel
from spd.importance import AffineImportanceConfig, MLPImportanceConfig
from tests.toy import make_objective, terms_of

VOCAB, TOKENS = 37, (2, 6)
SHARED = {"vocab_size": VOCAB, "initializer_range": 0.3}
LLAMA = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16},
}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
GPT_NEO = {
    **{"hidden_size": 16, "num_layers": 2, "num_heads": 4, "window_size": 4},
    **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 16},
}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {**LLAMA, **UNTIED}),
    "Llama, tied": ("LlamaForCausalLM", {**LLAMA, **TIED}),
    "Mistral": ("MistralForCausalLM", {**LLAMA, **UNTIED, "sliding_window": 4}),
    "Qwen2": ("Qwen2ForCausalLM", {**LLAMA, **TIED}),
    "Qwen3": ("Qwen3ForCausalLM", {**LLAMA, **UNTIED, "head_dim": 8}),
    "Gemma, tied": ("GemmaForCausalLM", {**LLAMA, **TIED, "head_dim": 8}),
    "GPT-2, tied": ("GPT2LMHeadModel", {**GPT2, **TIED}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {**NEOX, **UNTIED}),
    "GPT-Neo, tied": ("GPTNeoForCausalLM", {**GPT_NEO, **TIED}),
    "BERT, tied": ("BertForMaskedLM", {**NEOX, **TIED, "hidden_dropout_prob": 0.5}),
}
N_SITES = {"Llama": 16, "Qwen3": 16, "GPT-2, tied": 11, "GPT-NeoX": 10, "GPT-Neo, tied": 15}


class Case(NamedTuple):
    """A model with all its modules decomposed, and what it was before."""

    model: ComponentModel
    tokens: Tensor
    output: Tensor
    weights: dict[str, Tensor]


def hugging_face_model(name: str) -> TokenModel:
    cls_name, settings = FAMILIES[name]
    cls = getattr(transformers, cls_name)
    torch.manual_seed(0)
    inner = cls(cls.config_class(**SHARED, **settings))
    nn.init.normal_(inner.get_output_embeddings().weight, std=0.3)
    return TokenModel(inner, "logits").eval()


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, TOKENS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES, name="case")
def case_fixture(request: pytest.FixtureRequest) -> Case:
    target = hugging_face_model(request.param)
    with torch.no_grad():
        output = target(tokens())
    weights = {name: value.clone() for name, value in target.state_dict().items()}
    target.train()  # wrapping turns dropout off again
    found = {path: module for path, module in target.named_modules() if decomposable(module)}
    assert len(found) == N_SITES.get(request.param, len(found)) and len(found) >= 10
    sites = {path: min(input_output_weight(module).shape) for path, module in found.items()}
    return Case(
        ComponentModel(target, sites, MLPImportanceConfig(n_hidden=3)), tokens(), output, weights
    )


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def make_exact_(model: ComponentModel) -> None:
    """V U = W for every site: one of the two is an identity matrix."""
    with torch.no_grad():
        for site in model.sites.values():
            weight, identity = site.target_weight, torch.eye(site.C)
            tall = weight.shape[0] > weight.shape[1]
            site.subcomponents.V.copy_(weight if tall else identity)
            site.subcomponents.U.copy_(identity if tall else weight)


@torch.no_grad()
def test_the_wrapped_model_is_bitwise_the_model(case: Case):
    assert torch.equal(case.model.target_forward(case.tokens).output, case.output)
    assert torch.equal(case.model(case.tokens, {}), case.output)
    after = {k.replace(".original", ""): v for k, v in case.model.target.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in case.weights.items())


def test_gradients_reach_every_parameter_of_every_site(case: Case):
    losses = {
        "stochastic_recon": {"coeff": 1.0},
        "importance_minimality": {"coeff": 1.0, "pnorm": 1.0},
    }
    objective = make_objective(case.model, losses, "kl")
    torch.stack(list(terms_of(objective, case.tokens).values())).sum().backward()
    parameters = case.model.subcomponent_parameters()
    assert len(parameters) == 6 * len(case.model.sites)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name
    case.model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_exact_subcomponents_reproduce_the_model(case: Case):
    """All sites at once, and each by itself; any one of them switched off does not."""
    make_exact_(case.model)
    assert close(case.model(case.tokens), case.output)
    ci = case.model.causal_importances(case.model.target_forward(case.tokens).site_inputs)
    for path, g in ci.lower.items():
        assert close(case.model(case.tokens, {path: None}), case.output), path
        ones = case.model(case.tokens, {path: torch.ones_like(g)})
        assert close(ones, case.output), path
        off = case.model(case.tokens, {path: torch.zeros_like(g)})
        assert not close(off, case.output), path


# --- tied matrices ---------------------------------------------------------------------------------


def test_the_unembedding_may_share_the_subcomponents_of_the_embedding():
    target = hugging_face_model("Llama, tied")
    embed, head = "model.embed_tokens", "lm_head"
    assert target.get_parameter(f"{head}.weight") is target.get_parameter(f"{embed}.weight")
    model = ComponentModel(
        target, {embed: 16, head: 16}, AffineImportanceConfig(), tied_sites=((embed, head),)
    )
    names = [name for name in model.subcomponent_parameters() if "subcomponents" in name]
    assert names == [f"{embed}.subcomponents.V", f"{embed}.subcomponents.U"]
    first, second = (model.sites[path].subcomponents for path in (embed, head))
    assert torch.equal(second.V, first.U.mT) and torch.equal(second.U, first.V.mT)
    output = target(tokens())
    with torch.no_grad():
        first.V.copy_(model.sites[embed].target_weight)
        first.U.copy_(torch.eye(16))
    assert close(model(tokens()), output)
    (model(tokens(), {head: None}) - output.roll(1)).square().sum().backward()
    assert first.V.grad is not None and first.V.grad.any()


def test_an_embedding_cannot_borrow_from_the_unembedding():
    ties = (("lm_head", "model.embed_tokens"),)
    sites = {"lm_head": 4, "model.embed_tokens": 4}
    with pytest.raises(UserError, match="tied_sites.*'model.embed_tokens' is an embedding.*first"):
        ComponentModel(
            hugging_face_model("Llama, tied"), sites, AffineImportanceConfig(), tied_sites=ties
        )


def test_what_gemma_makes_of_its_tied_embedding_is_no_transpose():
    """It multiplies inside the embedding; the matrix that is decomposed is what comes out."""
    target = hugging_face_model("Gemma, tied")
    embedding = target.get_submodule("model.embed_tokens")
    rows = embedding(torch.arange(VOCAB))
    torch.testing.assert_close(rows, 4 * embedding.get_parameter("weight"))  # √16
    assert torch.equal(input_output_weight(embedding), rows)
    ties = (("model.embed_tokens", "lm_head"),)
    with pytest.raises(UserError, match="'lm_head' is not the transpose"):
        ComponentModel(target, dict.fromkeys(ties[0], 4), AffineImportanceConfig(), tied_sites=ties)
