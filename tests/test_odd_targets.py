"""Targets that use their modules in ways of their own: decomposed rightly, or refused by name."""

import pytest
import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import UserError
from spd.noise import Share
from tests.toy import decompose, inputs_of, make_objective, terms_of

LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-3, "pnorm": 2.0},
}


class Positions(nn.Module):
    """As nanoGPT has it: the position embedding is called without a batch axis."""

    def __init__(self, n_positions: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(n_positions, 8)
        self.out = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out((self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))).relu())


@pytest.mark.parametrize("n_positions", [2, 5, 6])
@pytest.mark.parametrize("n_examples", [1, 2, 4, 6])
def test_position_embeddings_that_have_no_batch_axis(n_positions: int, n_examples: int):
    torch.manual_seed(0)
    objective = make_objective(
        decompose(Positions(n_positions), {"wpe": 4, "out": 3}), LOSSES, "kl"
    )
    batch = torch.randint(0, 11, (n_examples, n_positions))
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    key = "stochastic_recon.0."
    assert noise[f"{key}wpe"].shape == (n_positions, 4)
    assert noise[f"{key}out"].shape == (n_examples, n_positions, 3)
    for term in terms_of(objective, batch, noise).values():
        assert term.isfinite()
    half = Share(rank=1, of=2)
    joint = torch.cat([batch, batch])
    whole = objective.draw_noise(joint, stream="train", seed=0, step=0)
    part = objective.noise(joint, stream="train", seed=0, step=0, share=half)
    assert torch.equal(part[f"{key}wpe"], whole[f"{key}wpe"]), "positions are of all examples"
    assert torch.equal(part[f"{key}out"], whole[f"{key}out"][n_examples:])


class Residual(nn.Module):
    """Adds to its stream in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h += self.b(self.a(h).relu())
        return self.o(h)


def test_what_a_site_reads_is_kept_though_the_target_overwrites_it():
    torch.manual_seed(0)
    model, x = decompose(Residual(), {"a": 4, "b": 4, "o": 4}), torch.randn(5, 8)
    for _ in range(2):
        inputs = inputs_of(model, x)
        assert torch.equal(inputs["a"], x) and not torch.equal(inputs["o"], x)
    assert model.overwritten == {"a"}
    objective = make_objective(model, LOSSES)
    torch.stack(list(terms_of(objective, x).values())).sum().backward()
    grads = [p.grad for p in model.subcomponent_parameters().values()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


class Shared(nn.Module):
    """One module under two names, called under each or under one of them."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.enc = nn.Linear(8, 8)
        self.dec = self.enc
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(x) if self.calls == 1 else self.dec(self.enc(x).relu())


def test_a_module_under_two_names_is_decomposed_under_both():
    target, x = Shared(calls=1), torch.randn(4, 8)
    model = decompose(target, {"enc": 10})
    assert target.enc is target.dec
    bias = model.sites["enc"].bias
    assert bias is not None
    out = model(x, {"enc": torch.zeros(4, 10)})
    assert torch.equal(out, bias.expand_as(out)), "nothing of the matrix is left"
    assert torch.equal(inputs_of(model, x)["enc"], x)


def test_a_module_that_is_called_under_two_names_is_refused_by_both():
    model = decompose(Shared(calls=2), {"enc": 10})
    with pytest.raises(UserError, match="the target calls 'enc' = 'dec' 2 times in one pass"):
        model.target_forward(torch.randn(4, 8))


def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 2 * output


def patched(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "patch"])
def test_what_is_attached_to_a_module_is_never_silently_lost(kind: str):
    target = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    message = {
        "forward": "sites: '0' has the forward hook double",
        "pre": "sites: '0' has the forward pre-hook .*<lambda>",
        "backward": "sites: '0' has the backward hook .*<lambda>",
        "patch": "sites: '0' has a forward of its own",
    }[kind]
    if kind == "forward":
        target[0].register_forward_hook(double)
    elif kind == "pre":
        target[0].register_forward_pre_hook(lambda *_: None)
    elif kind == "backward":
        target[0].register_full_backward_hook(lambda *_: None)
    else:
        vars(target[0])["forward"] = patched
    with pytest.raises(UserError, match=message):
        decompose(target, {"0": 8, "2": 3})
    decompose(target, {"2": 3})


def test_hooks_that_come_later_act_in_masked_passes_too():
    target, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(5, 8)
    model: ComponentModel = decompose(target, {"0": 8})
    mask = {"0": torch.rand(5, 8)}
    plain, masked = model.target_forward(x).output, model(x, mask)
    target[0].register_forward_hook(double)
    assert torch.equal(model.target_forward(x).output, 2 * plain)
    assert torch.equal(model(x, mask), 2 * masked)
