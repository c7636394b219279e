"""Builds the targets that the golden cases describe."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd.experiments.tms.model import TMSModel


def build_target(case: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The frozen target of a case, with the weights that lie beside it."""
    settings = case["target"]
    match settings["model"]:
        case "tms":
            target = TMSModel(
                settings["n_features"], settings["n_hidden"], settings["n_hidden_layers"]
            )
        case "resid_mlp":
            target = ResidMLP(settings)
        case name if name.startswith("transformers."):
            target = OutputOf(make_transformer(name, settings["config"]), case["output_attr"])
        case name:
            raise AssertionError(f"unknown target {name!r}")
    state = {
        name.removeprefix("target."): tensor
        for name, tensor in tensors.items()
        if name.startswith("target.")
    }
    inner = target.inner if isinstance(target, OutputOf) else target
    inner.load_state_dict(state)
    return target


def make_transformer(name: str, config: dict[str, Any]) -> nn.Module:
    module, _, cls_name = name.rpartition(".")
    cls = getattr(importlib.import_module(module), cls_name)
    return cls(cls.config_class(**config))


class OutputOf(nn.Module):
    """One attribute of what a Hugging Face model returns; module paths stay those of the model."""

    def __init__(self, inner: nn.Module, attribute: str) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self._inner = (inner,)
        self.attribute = attribute

    @property
    def inner(self) -> nn.Module:
        return self._inner[0]

    def forward(self, batch: Tensor) -> Tensor:
        return getattr(self.inner(batch), self.attribute)


class ResidMLP(nn.Module):
    """residual += mlp_out(act(mlp_in(residual))) between fixed W_E and W_U, as the cases need it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        n_features, d_embed, d_mlp = (settings[k] for k in ("n_features", "d_embed", "d_mlp"))
        self.W_E = nn.Parameter(torch.empty(n_features, d_embed))
        self.W_U = nn.Parameter(torch.empty(d_embed, n_features))
        self.act = {"relu": F.relu, "gelu": F.gelu}[settings["act_fn_name"]]
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mlp_in": nn.Linear(d_embed, d_mlp, bias=settings["in_bias"]),
                    "mlp_out": nn.Linear(d_mlp, d_embed, bias=settings["out_bias"]),
                }
            )
            for _ in range(settings["n_layers"])
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = x @ self.W_E
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            residual = residual + layer["mlp_out"](self.act(layer["mlp_in"](residual)))
        return residual @ self.W_U
