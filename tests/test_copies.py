"""A copy of a model is a model of its own: its masks are honoured, and nothing of it is the original's."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.engine.layers import SharedPrefix, checkpoint_layers_
from spd.engine.sequential import Sequential
from tests.little_lm import decomposed, little_model
from tests.toy import TiedMLP, decompose, make_objective

LOSSES = {"faithfulness": {"coeff": 1.0}, "stochastic_recon_layerwise": {"coeff": 1.0}}
COPIES: dict[str, Callable[[ComponentModel], ComponentModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def made(kind: str) -> tuple[ComponentModel, Tensor]:
    torch.manual_seed(0)
    if kind == "tied":
        model = decompose(TiedMLP(), {"enc": 6, "dec": 6}, tied_sites=(("enc", "dec"),))
        return model, torch.rand(8, 5)
    sites = {"model.layers.*.mlp.*_proj": 6, "model.embed_tokens": 5}
    model = decomposed(little_model("llama"), sites)
    if kind == "recomputed llama":
        checkpoint_layers_(model)
    return model, torch.randint(40, (2, 7))


def train_(model: ComponentModel, batch: Tensor) -> None:
    objective = make_objective(model, LOSSES, "mse" if batch.is_floating_point() else "kl")
    optimizer = torch.optim.AdamW(model.subcomponent_parameters().values(), lr=0.1)
    step = Sequential(objective)
    for index in range(2):
        noise = objective.noise(batch, stream="train", seed=0, step=index)
        step(batch, torch.tensor(0.5), noise)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("trained", [False, True], ids=["before training", "after training"])
@pytest.mark.parametrize("kind", ["tied", "llama", "recomputed llama"])
def test_a_copy_honours_its_own_masks(
    kind: str, trained: bool, copied: Callable[[ComponentModel], ComponentModel]
):
    model, batch = made(kind)
    if trained:
        train_(model, batch)
    target, masked = model.target_forward(batch).output, model(batch)
    other = copied(model)
    assert torch.equal(other(batch), masked) and not torch.allclose(masked, target, atol=1e-4)
    tensors = {p.data_ptr() for p in model.parameters()}
    assert not tensors & {p.data_ptr() for p in other.parameters()}
    with torch.no_grad():
        for site in other.sites.values():
            site.subcomponents.V.zero_()
    off = {path: torch.zeros(*batch.shape[:-1], site.C) for path, site in model.sites.items()}
    if kind != "tied":
        off = {path: torch.zeros(*batch.shape, site.C) for path, site in model.sites.items()}
    assert torch.equal(other(batch), model(batch, off)), "nothing is left of its subcomponents"
    assert not torch.allclose(other(batch), masked, atol=1e-4)
    assert torch.equal(model(batch), masked)
    assert torch.equal(other.target_forward(batch).output, target)
    train_(other, batch)
    assert torch.equal(model(batch), masked), "what trains the copy leaves the original alone"


def test_prefixes_of_one_model_do_not_disturb_each_other():
    model, batch = made("llama")
    late = "model.layers.1.mlp.up_proj"
    masks: dict[str, Tensor] = {late: torch.rand(2, 7, 6)}
    expected = model(batch, masks)
    first, second = SharedPrefix(model), SharedPrefix(model)
    calls: list[str] = []
    inside = model.target.get_submodule("model.layers.0.mlp.up_proj")
    inside.register_forward_hook(lambda *_: calls.append("layer 0"))
    other = torch.randint(40, (2, 7))
    with first.kept(batch), second.kept(other):
        assert calls == ["layer 0"] * 2, "each runs the target once"
        assert torch.equal(first.forward(batch, masks), expected)
        assert torch.equal(second.forward(other, masks), model(other, masks))
        assert len(calls) == 3, "only the whole pass has run the first layer"
    assert torch.equal(first.forward(batch, masks), expected)
