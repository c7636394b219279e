"""Directories in the layout of the published implementation, written from the table of its format alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

COEFFS: dict[str, Any] = {
    "faithfulness_coeff": 1.0,
    "recon_coeff": None,
    "stochastic_recon_coeff": 1.0,
    "stochastic_recon_layerwise_coeff": 1.0,
    "importance_minimality_coeff": 3e-3,
    "pnorm": 1.0,
    "n_mask_samples": 2,
}


def write_yaml(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gates(C: int, n_hidden: int, seed: int) -> dict[str, Tensor]:
    """Of one module; with 0 hidden neurons an affine map of the inner activation."""
    if n_hidden == 0:
        return {"weight": drawn(C, seed=seed), "bias": drawn(C, seed=seed + 1)}
    return {
        "mlp_in": drawn(C, n_hidden, seed=seed),
        "in_bias": drawn(C, n_hidden, seed=seed + 1),
        "mlp_out": drawn(C, n_hidden, seed=seed + 2),
        "out_bias": drawn(C, seed=seed + 3),
    }


def state_of(
    target: Mapping[str, Tensor], modules: list[str], C: int, n_hidden: int, *, tied: bool = False
) -> dict[str, Tensor]:
    """A state dict of random subcomponents and gates of modules with weights `[d_out, d_in]`."""
    state = {f"model.{name}": tensor for name, tensor in target.items()}
    for i, module in enumerate(modules):
        name, (d_out, d_in) = module.replace(".", "-"), target[f"{module}.weight"].shape
        state[f"components.{name}.A"] = drawn(d_in, C, seed=10 * i)
        state[f"components.{name}.B"] = drawn(C, d_out, seed=10 * i + 1)
        if f"{module}.bias" in target:
            state[f"components.{name}.bias"] = target[f"{module}.bias"]
        own = gates(C, n_hidden, seed=10 * i + 2)
        state |= {f"gates.{name}.{key}": tensor for key, tensor in own.items()}
    if tied:
        state["components.linear2.A"] = state["components.linear1.B"].T.contiguous()
        state["components.linear2.B"] = state["components.linear1.A"].T.contiguous()
    return state


def write_tms(
    folder: Path, *, tied: bool = True, n_hidden: int = 3, C: int = 7, step: int = 40
) -> dict[str, Tensor]:
    """A toy model of superposition with one hidden layer; its state dict."""
    folder.mkdir(parents=True)
    W = drawn(2, 5, seed=100)
    target = {
        "linear1.weight": W,
        "hidden_layers.0.weight": drawn(2, 2, seed=101),
        "linear2.weight": W.T.contiguous(),
        "linear2.bias": drawn(5, seed=102),
    }
    torch.save(target, folder / "tms.pth")
    sizes = {"n_features": 5, "n_hidden": 2, "n_hidden_layers": 1, "tied_weights": True}
    training = {
        "tms_model_config": {**sizes, "init_bias_to_zero": False, "device": "cpu"},
        "feature_probability": 0.05,
        "data_generation_type": "at_least_zero_active",
        "fixed_random_hidden_layers": True,
        "batch_size": 1024,
        "steps": 10_000,
        "seed": 0,
        "lr": 5e-3,
    }
    write_yaml(folder / "tms_train_config.yaml", training)
    modules = ["linear1", "hidden_layers.0", "linear2"]
    config = {
        **COEFFS,
        "C": C,
        "target_module_patterns": ["linear1", "linear2", "hidden_layers.0"],
        "n_ci_mlp_neurons": n_hidden,
        "lr": 1e-3,
        "lr_schedule": "cosine",
        "lr_warmup_pct": 0.0,
        "lr_exponential_halflife": None,
        "steps": 40_000,
        "batch_size": 64,
        "seed": 3,
        "task_config": {
            "feature_probability": 0.2,
            "data_generation_type": "exactly_two_active",
        },
    }
    write_yaml(folder / "final_config.yaml", config)
    state = state_of(target, modules, C, n_hidden, tied=tied)
    torch.save(state, folder / f"model_{step}.pth")
    return state


def write_resid_mlp(folder: Path, *, label_coeffs: list[float] | None = None) -> dict[str, Tensor]:
    """Two layers, affine gates; its state dict."""
    folder.mkdir(parents=True)
    n, d_embed, d_mlp = 6, 8, 3
    W_E = torch.nn.functional.normalize(drawn(n, d_embed, seed=200), dim=1)
    target = {"W_E": W_E, "W_U": W_E.T.contiguous()}
    for i in range(2):
        target[f"layers.{i}.mlp_in.weight"] = drawn(d_mlp, d_embed, seed=201 + i)
        target[f"layers.{i}.mlp_out.weight"] = drawn(d_embed, d_mlp, seed=211 + i)
    torch.save(target, folder / "resid_mlp.pth")
    sizes = {"n_features": n, "d_embed": d_embed, "d_mlp": d_mlp, "n_layers": 2}
    training = {
        "resid_mlp_model_config": {**sizes, "act_fn_name": "gelu"},
        "feature_probability": 0.01,
        "batch_size": 128,
        "steps": 10,
        "lr": 3e-3,
        "lr_schedule": "cosine",
    }
    write_yaml(folder / "resid_mlp_train_config.yaml", training)
    (folder / "label_coeffs.json").write_text(json.dumps(label_coeffs or [1.0] * n))
    modules = [f"layers.{i}.{part}" for i in range(2) for part in ("mlp_in", "mlp_out")]
    config = {
        **COEFFS,
        "C": 5,
        "target_module_patterns": ["layers.*.mlp_in", "layers.*.mlp_out"],
        "n_ci_mlp_neurons": 0,
        "lr": 2e-3,
        "lr_schedule": "exponential",
        "lr_exponential_halflife": 500,
        "steps": 30_000,
        "batch_size": 64,
        "task_config": {"feature_probability": 0.01},
    }
    write_yaml(folder / "final_config.yaml", config)
    state = state_of(target, modules, 5, 0)
    torch.save(state, folder / "model_30000.pth")
    torch.save({k: v + 1 for k, v in state.items()}, folder / "model_9000.pth")
    return state


# --- what such a run computes ----------------------------------------------------------------------


def masked_site(state: Mapping[str, Tensor], module: str, x: Tensor, mask: Tensor) -> Tensor:
    """((x A) ⊙ m) B + bias."""
    name = module.replace(".", "-")
    out = ((x @ state[f"components.{name}.A"]) * mask) @ state[f"components.{name}.B"]
    return out + state.get(f"model.{module}.bias", torch.zeros(()))


def plain_site(state: Mapping[str, Tensor], module: str, x: Tensor) -> Tensor:
    out = x @ state[f"model.{module}.weight"].T
    return out + state.get(f"model.{module}.bias", torch.zeros(()))


def importance_of(state: Mapping[str, Tensor], module: str, x: Tensor) -> Tensor:
    """The lower-leaky hard sigmoid of the gate of each inner activation."""
    name = module.replace(".", "-")
    h = x @ state[f"components.{name}.A"]
    gate = {
        key.rpartition(".")[2]: tensor
        for key, tensor in state.items()
        if key.startswith(f"gates.{name}.")
    }
    if "weight" in gate:
        z = h * gate["weight"] + gate["bias"]
    else:
        inner = h[..., None] * gate["mlp_in"] + gate["in_bias"]
        gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        z = (gelu * gate["mlp_out"]).sum(-1) + gate["out_bias"]
    return torch.where(z > 1, 1.0, torch.where(z > 0, z, 0.01 * z))


def tms_modules(state: Mapping[str, Tensor], x: Tensor, masks: Mapping[str, Tensor] | None):
    """The output of the toy model, and what each module reads; `masks` None: the target's."""
    read = {}
    for module in ("linear1", "hidden_layers.0", "linear2"):
        read[module] = x
        x = (
            plain_site(state, module, x)
            if masks is None
            else masked_site(state, module, x, masks[module])
        )
    return x.relu(), read


def resid_mlp_modules(state: Mapping[str, Tensor], x: Tensor, masks: Mapping[str, Tensor] | None):
    """The same of the residual MLP, with GELU."""
    read, residual = {}, x @ state["model.W_E"]

    def apply(module: str, x: Tensor) -> Tensor:
        read[module] = x
        if masks is None:
            return plain_site(state, module, x)
        return masked_site(state, module, x, masks[module])

    for i in range(2):
        inner = apply(f"layers.{i}.mlp_in", residual)
        gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        residual = residual + apply(f"layers.{i}.mlp_out", gelu)
    return residual @ state["model.W_U"], read
