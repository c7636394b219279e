"""Masked passes start where the first replaced site is; the values are those of whole passes."""

import logging
import re
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


def gemma4() -> ComponentModel:
    """Its last two layers take the keys and values of the first two."""
    settings: dict[str, Any] = {
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": 24},
        **{"num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8},
        **{"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"vocab_size_per_layer_input": 37, "hidden_size_per_layer_input": 4},
    }
    config = transformers.Gemma4TextConfig(**settings)
    torch.manual_seed(0)
    inner = transformers.Gemma4ForCausalLM(config)
    sites = dict.fromkeys(["model.layers.*.mlp.up_proj", "lm_head"], 4)
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


def a_layer_reads_what_the_first_has_left_behind(model: ComponentModel) -> None:
    """On itself, from one pass to the next, so that a pass that does not run the first finds the old."""
    left: dict[str, Tensor] = {}
    first, last = (model.target.get_submodule(LAYERS["llama"].format(i)) for i in (0, 2))

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        left["by the first"] = output

    first.get_submodule("mlp").register_forward_hook(leave)
    last.register_forward_pre_hook(lambda module, args: (args[0] + left["by the first"], *args[1:]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "left behind", "gemma4"])
def test_passes_are_whole_where_layers_take_more_than_the_one_before_gives_out(
    kind: str, caplog: pytest.LogCaptureFixture
):
    model = gemma4() if kind == "gemma4" else made(kind.replace("left behind", "llama"))
    if kind == "left behind":
        a_layer_reads_what_the_first_has_left_behind(model)
    batch, last = torch.randint(0, 37, (2, 5)), list(model.sites)[-2]
    masks = {last: torch.rand(2, 5, 4)}
    prefix = SharedPrefix(model)
    with caplog.at_level(logging.WARNING):
        prefix.try_out(batch)
    said = {
        "left behind": "passes run whole, .* begun after 2 layers, the target gives another output",
        "gemma4": "passes run whole, .* begun after 1 layer, the target raises KeyError: 'sliding",
    }
    assert prefix.whole == (kind in said) == bool(caplog.records)
    if kind in said:
        assert re.search(said[kind], caplog.text)
    with prefix.kept(batch):
        everything_off = {path: torch.zeros(2, 5, 4) for path in model.sites}
        prefix.forward(batch, everything_off)
        assert torch.equal(prefix.forward(batch, masks), model(batch, masks))
    assert prefix.recorded is None and model.running.current is None
