"""The method once more, slowly: one row, one site, one subcomponent after another.

Everything here works on 0-d and 1-d tensors of one row, so that gradients can be compared too.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spd.component_model import ComponentModel, Site

Row = Tensor
Masks = Mapping[str, Tensor]


def forward(model: ComponentModel, x: Row, masks: Masks) -> Row:
    """One row through the `MLP`, the sites named in `masks` rebuilt from their subcomponents."""
    for path in ("first", "deep.mid", "last"):
        site = model.sites[path]
        weight = masked_weight(site, masks[path]) if path in masks else target_weight(site)
        x = x @ weight
        if path != "deep.mid":
            assert site.bias is not None
            x = x + site.bias
        if path != "last":
            x = x.relu()
    return x


def site_inputs(model: ComponentModel, x: Row) -> dict[str, Row]:
    """What the unchanged `MLP` feeds to each of its matrices."""
    inputs = {"first": x}
    bias = model.sites["first"].bias
    assert bias is not None
    inputs["deep.mid"] = (x @ target_weight(model.sites["first"]) + bias).relu()
    inputs["last"] = (inputs["deep.mid"] @ target_weight(model.sites["deep.mid"])).relu()
    return inputs


def target_weight(site: Site) -> Tensor:
    return site.weight.T  # of an nn.Linear


def masked_weight(site: Site, mask: Tensor) -> Tensor:
    V, U = site.subcomponents.V, site.subcomponents.U
    weight = torch.zeros(V.shape[0], U.shape[1], dtype=V.dtype)
    for c in range(site.C):
        weight = weight + mask[c] * torch.outer(V[:, c], U[c])
    return weight


def logits(site: Site, x: Row) -> list[Tensor]:
    """What the hard sigmoids are applied to, for one row: Σ_k w2 gelu(w1 h + b1) + b2."""
    values = []
    function = dict(site.own_importance().named_parameters())
    for c in range(site.C):
        h = sum_of(x[i] * site.subcomponents.V[i, c] for i in range(x.shape[0]))
        value = function["out_bias"][c]
        for k in range(function["mlp_in"].shape[1]):
            z = function["mlp_in"][c, k] * h + function["in_bias"][c, k]
            value = value + function["mlp_out"][c, k] * gelu(z)
        values.append(value)
    return values


def gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def lower(x: Tensor) -> Tensor:
    if x < 0:
        return 0.01 * x
    return x if x <= 1 else torch.ones_like(x)


def upper(x: Tensor) -> Tensor:
    if x < 0:
        return torch.zeros_like(x)
    return x if x <= 1 else 1 + 0.01 * (x - 1)


def importances(
    model: ComponentModel, x: Row, sigmoid: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    inputs = site_inputs(model, x)
    return {
        path: torch.stack([sigmoid(value) for value in logits(site, inputs[path])])
        for path, site in model.sites.items()
    }


def mean_squared_error(prediction: Row, target: Row) -> Tensor:
    return sum_of((prediction[i] - target[i]) ** 2 for i in range(len(target))) / len(target)


def kl(prediction: Row, target: Row) -> Tensor:
    p = target.exp() / target.exp().sum()
    q = prediction.exp() / prediction.exp().sum()
    return sum_of(p[i] * (p[i] / q[i]).log() for i in range(len(target)))


def sum_of(values) -> Tensor:
    return torch.stack(list(values)).sum()


def mean_of(values) -> Tensor:
    return torch.stack(list(values)).mean()
