"""Masked passes start where the first replaced site is; the values are those of whole passes."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.engine.layers import SharedPrefix
from spd.experiments.lm.model import TokenModel
from spd.importance import AffineImportanceConfig
from tests.toy import MLP, MLP_SITES, decompose

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 37,
    "initializer_range": 0.3,
}
LLAMA = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1)
GPT2 = transformers.GPT2Config(**SIZES)
SITES = {
    "llama": ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"],
    "gpt2": ["transformer.wte", "transformer.h.0.mlp.c_fc", "transformer.h.2.attn.c_proj"],
}
LAYERS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}


def made(kind: str) -> ComponentModel:
    torch.manual_seed(0)
    inner = transformers.AutoModelForCausalLM.from_config({"llama": LLAMA, "gpt2": GPT2}[kind])
    sites = dict.fromkeys([*SITES[kind], "lm_head"], 4)
    return ComponentModel(TokenModel(inner.eval(), "logits"), sites, AffineImportanceConfig())


def counted(module: nn.Module, calls: list[int], index: int) -> None:
    module.register_forward_hook(lambda *_: calls.append(index))


@pytest.mark.parametrize("kind", SITES)
def test_layers_before_the_first_replaced_site_are_not_run_again(kind: str):
    model, batch = made(kind), torch.randint(0, 37, (2, 5))
    embedding, early, late = SITES[kind]
    inside = {"llama": "mlp.down_proj", "gpt2": "mlp.c_fc"}[kind]
    calls: list[int] = []
    for index in range(3):
        counted(model.target.get_submodule(f"{LAYERS[kind].format(index)}.{inside}"), calls, index)
    expected_layers = {
        (embedding,): [0, 1, 2],
        (early,): [0, 1, 2],
        (late,): [2],
        (late, early): [0, 1, 2],
        ("lm_head",): [],
        ("lm_head", late): [2],
    }
    masks = {path: torch.rand(2, 5, 4) for path in model.sites}
    whole = {
        paths: model(batch, {path: masks[path] for path in paths}) for paths in expected_layers
    }
    plain = model.target_forward(batch)
    prefix = SharedPrefix(model)
    calls.clear()
    with prefix.kept(batch) as target:
        assert calls == [0, 1, 2]
        assert torch.equal(target.output, plain.output)
        for paths, layers in expected_layers.items():
            calls.clear()
            output = prefix.forward(batch, {path: masks[path] for path in paths})
            assert torch.equal(output, whole[paths]), paths
            assert calls == layers, paths
        assert torch.equal(prefix.forward(batch, None), model(batch))
    assert prefix.recorded is None and model.running.current is None, "nothing outlives the step"
    other = torch.randint(0, 37, (2, 5))
    calls.clear()
    model(other, {late: masks[late]})
    assert calls == [0, 1, 2], "outside of it every pass is whole"


def test_a_target_without_layers_is_run_as_ever():
    model: ComponentModel = decompose(MLP(), MLP_SITES)
    batch: Tensor = torch.randn(8, 4)
    prefix = SharedPrefix(model)
    with prefix.kept(batch) as target:
        masks = {"last": torch.rand(8, MLP_SITES["last"])}
        assert torch.equal(prefix.forward(batch, masks), model(batch, masks))
        assert list(target.site_inputs) == list(MLP_SITES)
