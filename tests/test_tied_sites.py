"""Sites whose matrices are transposes of each other: one pair of parameters, two importance functions."""

import pytest
import torch

from spd.component_model import ComponentModel
from spd.config import UserError
from tests.toy import TiedMLP, decompose, make_objective, terms_of

TIE = (("enc", "dec"),)
FAITHFULNESS = {"faithfulness": {"coeff": 1.0}}


def tied_model() -> ComponentModel:
    torch.manual_seed(0)
    return decompose(TiedMLP(), {"enc": 4, "dec": 4}, tied_sites=TIE)


def test_tied_sites_share_one_parameter_through_transposed_views():
    model = tied_model()
    enc, dec = (model.sites[path].subcomponents for path in ("enc", "dec"))
    assert torch.equal(dec.V, enc.U.T) and torch.equal(dec.U, enc.V.T)
    assert {n for n in model.subcomponent_parameters() if "subcomponents" in n} == {
        "enc.subcomponents.V",
        "enc.subcomponents.U",
    }
    with torch.no_grad():
        enc.V.fill_(3.0)
    assert (dec.U == 3.0).all()


def test_tied_sites_have_importance_functions_of_their_own():
    model = tied_model()
    for name in ("mlp_in", "in_bias", "mlp_out", "out_bias"):
        own, other = (model.sites[p].own_importance().get_parameter(name) for p in ("enc", "dec"))
        assert own is not other
        assert {f"{p}.importance.{name}" for p in ("enc", "dec")} <= set(
            model.subcomponent_parameters()
        )
    own, other = (model.sites[p].own_importance().get_parameter("mlp_in") for p in ("enc", "dec"))
    assert not torch.equal(own, other)


def test_the_gradients_of_tied_sites_add_up():
    """Against a free copy of the second site: the shared gradient is the sum of both."""
    tied = tied_model()
    free = decompose(TiedMLP(), {"enc": 4, "dec": 4})
    free.target.load_state_dict(tied.target.state_dict())
    with torch.no_grad():
        for path in ("enc", "dec"):
            for name in ("V", "U"):
                part = getattr(tied.sites[path].subcomponents, name)
                getattr(free.sites[path].subcomponents, name).copy_(part)
            for name, parameter in free.sites[path].own_importance().named_parameters():
                parameter.copy_(tied.sites[path].own_importance().get_parameter(name))
    losses = {
        **FAITHFULNESS,
        "stochastic_recon_layerwise": {"coeff": 1.0},
        "importance_minimality": {"coeff": 1.0, "pnorm": 1.0},
    }
    batch = torch.rand(16, 5)
    totals = []
    for model in (tied, free):
        objective = make_objective(model, losses)
        noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
        total, _, _ = objective(batch, torch.tensor(0.0), noise)
        total.backward()
        totals.append(total)
    torch.testing.assert_close(*totals)
    shared = tied.sites["enc"].subcomponents
    first, second = (free.sites[path].subcomponents for path in ("enc", "dec"))
    for tied_part, own_part, other_part in (
        (shared.V, first.V, second.U),
        (shared.U, first.U, second.V),
    ):
        assert tied_part.grad is not None
        assert own_part.grad is not None and other_part.grad is not None
        torch.testing.assert_close(tied_part.grad, own_part.grad + other_part.grad.T)


def test_both_tied_sites_count_in_L_and_N():
    model = tied_model()
    (own,) = terms_of(make_objective(model, FAITHFULNESS), torch.rand(4, 5)).values()
    errors = [
        (site.target_weight - site.subcomponents.V @ site.subcomponents.U).square().sum()
        for site in model.sites.values()
    ]
    torch.testing.assert_close(own, (errors[0] + errors[1]) / (10 + 10))

    batch = torch.rand(4, 5)
    objective = make_objective(model, {"recon_layerwise": {"coeff": 1.0}})
    (own,) = terms_of(objective, batch).values()
    target_out, inputs = model.target_forward(batch)
    g = model.causal_importances(inputs).lower
    each = [(model(batch, {path: g[path]}) - target_out).square().mean() for path in model.sites]
    torch.testing.assert_close(own, (each[0] + each[1]) / 2)


def test_an_optimizer_steps_shared_parameters_once():
    model = tied_model()
    V = model.sites["enc"].subcomponents.V
    before = V.detach().clone()
    optimizer = torch.optim.AdamW(model.subcomponent_parameters().values(), lr=0.1, weight_decay=0)
    (term,) = terms_of(make_objective(model, FAITHFULNESS), torch.rand(4, 5)).values()
    term.backward()
    assert V.grad is not None
    optimizer.step()  # the first step of Adam moves every entry by the learning rate
    torch.testing.assert_close(V.detach(), before - 0.1 * V.grad.sign(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sites", "tie", "message"),
    [
        ({"enc": 4, "dec": 5}, ("enc", "dec"), "C must be equal"),
        ({"enc": 4}, ("enc", "dec"), "no site"),
    ],
)
def test_ties_that_cannot_be(sites: dict[str, int], tie: tuple[str, str], message: str):
    with pytest.raises(UserError, match=message):
        decompose(TiedMLP(), sites, tied_sites=(tie,))


def test_only_transposed_matrices_can_be_tied():
    target = TiedMLP()
    with torch.no_grad():
        target.dec.weight[0, 0] += 1
    with pytest.raises(UserError, match="not the transpose"):
        decompose(target, {"enc": 4, "dec": 4}, tied_sites=TIE)
