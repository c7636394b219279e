"""Which tokens a subcomponent reads and writes, on little models of several families."""

import pytest
import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.experiments.lm.report.directions import look_around, token_directions
from tests.little_lm import VOCAB, RandomBatches, decomposed, little_model, unembed_of
from tests.toy import TokenModel, decompose, inputs_of

EXPECTED = {
    "llama": {
        "model.embed_tokens": ("tokens", "stream"),
        "model.layers.1.self_attn.q_proj": ("stream", None),
        "model.layers.1.self_attn.v_proj": ("stream", None),
        "model.layers.1.self_attn.o_proj": (None, "stream"),
        "model.layers.1.mlp.up_proj": ("stream", None),
        "model.layers.1.mlp.down_proj": (None, "stream"),
        "lm_head": ("stream", "logits"),
    },
    "gpt2": {
        "transformer.wpe": (None, "stream"),
        "transformer.h.0.attn.c_attn": ("stream", None),
        "transformer.h.0.attn.c_proj": (None, "stream"),
        "transformer.h.0.mlp.c_fc": ("stream", None),
        "transformer.h.0.mlp.c_proj": (None, "stream"),
    },
    "neox": {
        "gpt_neox.layers.1.attention.query_key_value": ("stream", None),
        "gpt_neox.layers.1.attention.dense": (None, "stream"),
        "gpt_neox.layers.1.mlp.dense_h_to_4h": ("stream", None),
        "gpt_neox.layers.1.mlp.dense_4h_to_h": (None, "stream"),
    },
}


def weight_of(model: ComponentModel, path: str) -> Tensor:
    weight = model.target.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


def around_of(kind: str, sites: list[str]):
    target = little_model(kind)
    unembed = unembed_of(target)
    model = decomposed(target, dict.fromkeys(sites, 5))
    around = look_around(model, next(RandomBatches(0)), unembed)
    assert around is not None
    return model, around, weight_of(model, unembed)


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_kind_of_matrix_is_placed(kind: str):
    _, around, _ = around_of(kind, list(EXPECTED[kind]))
    for path, expected in EXPECTED[kind].items():
        for end, wanted in zip(around.places[path], expected, strict=True):
            assert end == wanted if wanted else " is not " in end, f"{path}: {end}"


def test_what_is_read_is_the_inner_activation_of_each_token_alone():
    """Of the first layer's queries, which see a token's embedding and nothing else."""
    path = "model.layers.0.self_attn.q_proj"
    model, around, _ = around_of("llama", [path, "model.embed_tokens"])
    inputs = inputs_of(model, torch.arange(VOCAB)[:, None])
    columns, sign = torch.tensor([3, 0]), torch.tensor([1.0, -1.0])
    for site in (path, "model.embed_tokens"):
        acts = model.sites[site].subcomponents.acts(inputs[site])[:, 0, columns] * sign
        found = token_directions(model, site, columns, around, n=4, sign=sign)["reads"]
        for row in range(2):
            order = acts[:, row].argsort(descending=True)
            assert found.highest[row].tolist() == order[:4].tolist()
            assert found.lowest[row].tolist() == order.flip(0)[:4].tolist()
            torch.testing.assert_close(found.highest_values[row], acts[order[:4], row])
            torch.testing.assert_close(found.lowest_values[row], acts[order.flip(0)[:4], row])


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "neox"])
def test_what_is_written_goes_through_the_last_norm_and_the_unembedding(kind: str):
    path, norm_path = {
        "llama": ("model.layers.0.mlp.down_proj", "model.norm"),
        "gemma": ("model.layers.0.mlp.down_proj", "model.norm"),
        "gpt2": ("transformer.h.0.mlp.c_proj", "transformer.ln_f"),
        "neox": ("gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    }[kind]
    model, around, head = around_of(kind, [path])
    norm = weight_of(model, norm_path)
    gain = norm + 1 if kind == "gemma" else norm
    expected = (model.sites[path].subcomponents.U * gain) @ head.mT
    columns, sign = torch.arange(5), torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    found = token_directions(model, path, columns, around, n=VOCAB, sign=sign)["writes"]
    order = found.highest[2]
    torch.testing.assert_close(found.highest_values[2], -expected[2, order], rtol=1e-4, atol=1e-5)


def test_without_normalisation_or_unembedding_there_is_little_to_show():
    model = decompose(TokenModel(), {"embed": 3, "mid": 3, "lm_head": 3}, n_hidden=0)
    around = look_around(model, torch.randint(11, (2, 6)), None)
    assert around is not None and around.unembedding is None
    assert around.places["embed"] == ("tokens", "the model has no unembedding")
    found = token_directions(model, "embed", torch.tensor([0]), around, n=20, sign=torch.ones(1))
    assert list(found) == ["reads"] and found["reads"].highest.shape == (1, 11)
