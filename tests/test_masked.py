"""`with model.masked(…)`: whatever calls the target in the meantime sees it masked."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.masks import SiteMask
from tests.toy import Logits, decompose

BATCH = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


def made() -> ComponentModel:
    torch.manual_seed(0)
    return decompose(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), {"0": 7, "2": 6})


HALF = {"0": torch.full((6, 7), 0.5), "2": torch.full((6, 6), 0.5)}
ROW = torch.linspace(0, 1, 7)
FORMS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "one number for every site": (0.5, HALF),
    "a number": ({"0": 0.5}, {"0": HALF["0"]}),
    "a whole number": ({"0": 0}, {"0": torch.zeros(6, 7)}),
    "a Tensor without axes": ({"0": torch.tensor(0.5)}, {"0": HALF["0"]}),
    "one for all inputs": ({"0": ROW}, {"0": ROW.expand(6, 7)}),
    "one for each input": ({"0": HALF["0"]}, {"0": HALF["0"]}),
    "None": (None, {"0": None, "2": None}),
    "no site": ({}, {}),
    "a SiteMask": (
        {"0": SiteMask(ROW, delta=torch.ones(6))},
        {"0": SiteMask(ROW.expand(6, 7), delta=torch.ones(6))},
    ),
    "a function of the input": (
        {"0": lambda x: (x[:, :1] > 0.5).float()},
        {"0": (BATCH[:, :1] > 0.5).float().expand(6, 7)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_target_called_by_anyone_is_the_masked_one(form: str):
    model = made()
    given, spelled_out = FORMS[form]
    with torch.no_grad():
        expected, before = model(BATCH, spelled_out), model.target(BATCH)
        with model.masked(given) as target:
            assert target is model.target
            torch.testing.assert_close(target(BATCH), expected, rtol=0, atol=0)
            assert torch.equal(model.target_forward(BATCH).output, before), "a pass of its own"
            torch.testing.assert_close(target(BATCH), expected, rtol=0, atol=0)
        assert torch.equal(model.target(BATCH), before)


def test_importances_are_those_of_the_input_in_the_masked_run():
    model = made()
    with torch.no_grad():
        g = model.importances(BATCH).lower
        with model.masked({"0": "importances"}):
            found = model.target(BATCH)
        torch.testing.assert_close(found, model(BATCH, {"0": g["0"]}), rtol=0, atol=0)
        with model.masked("importances"):
            both = model.target(BATCH)
        hidden = model.target[1](model.sites["0"].masked(BATCH, SiteMask(g["0"])))  # pyright: ignore[reportIndexIssue]
        second = model._lower_importances("2", hidden)
        expected = model(BATCH, {"0": g["0"], "2": second})
        torch.testing.assert_close(both, expected, rtol=0, atol=0)


def test_an_inner_one_counts_and_the_outer_one_comes_back():
    model = made()
    with torch.no_grad(), model.masked(0.5):
        outer = model.target(BATCH)
        with model.masked(0.0):
            assert not torch.equal(model.target(BATCH), outer)
        assert torch.equal(model.target(BATCH), outer)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"1": 0.5}, "masks: '1' is no site.*sites: 0, 2"),
        (
            {"0": torch.ones(6)},
            r"that of '0' has the shape \(6,\); one that broadcasts to \(6, 7\)",
        ),
        ({"0": torch.ones(5, 7)}, r"that of '0' has the shape \(5, 7\).*the 7 subcomponents"),
        ({"0": "importance"}, "masks: '0' has 'importance'; a number, a Tensor"),
        ({"0": lambda x: [x]}, "(?s)masks: '0' has .*; a number, a Tensor"),
    ],
)
def test_what_fits_no_site_is_named(masks: Any, said: str):
    model = made()
    with pytest.raises(UserError, match=said), model.masked(masks):
        model.target(BATCH)
    assert torch.equal(model.target(BATCH), made().target(BATCH)), "left as it was"


def generator() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("masks", [0.0, "importances", {"*": None}])
def test_generation_a_token_at_a_time(masks: Any):
    """With a cache, the same tokens as from whole masked passes."""
    inner, ids = generator(), torch.arange(1, 6)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    free = inner.generate(ids, **options)
    model = decompose(Logits(inner), {"inner.transformer.h.*.mlp.c_fc": 8})
    if isinstance(masks, dict):
        masks = dict.fromkeys(model.sites)
    with model.masked(masks):
        found = inner.generate(ids, **options)
        whole = ids
        with torch.no_grad():
            for _ in range(8):
                whole = torch.cat([whole, model.target(whole)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, whole)
    assert torch.equal(inner.generate(ids, **options), free)
