"""Builds the targets that the golden cases describe."""

import importlib
from typing import Any

from torch import Tensor, nn

from spd.experiments.resid_mlp.model import ResidMLP, ResidMLPModelConfig
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
            names = {"n_features", "d_embed", "d_mlp", "n_layers", "in_bias", "out_bias"}
            sizes = {name: settings[name] for name in names}
            target = ResidMLP(ResidMLPModelConfig(**sizes, act_fn=settings["act_fn_name"]))
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
