"""Configurations and names of the published implementation in those of this package."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import BaseConfig, UserError, read_yaml, shown
from spd.experiments.published.reading import CONFIG_FILE, Family, Published, hub_name
from spd.losses import Loss
from spd.registry import EXPERIMENTS
from spd.settings import PACKAGE_DIR

Raw = dict[str, Any]
LIKE: dict[Family, str] = {"tms": "tms_5-2", "resid_mlp": "resid_mlp1", "lm": "ss_emb"}
"""the registered experiment whose figures and metrics an imported run has"""
NAMES = (
    *("faithfulness", "stochastic_recon", "stochastic_recon_layerwise", "recon", "recon_layerwise"),
    *("out_recon", "importance_minimality", "schatten", "embedding_recon"),
)
LOSSES: dict[str, type[BaseConfig]] = {
    name: kind for kind in get_args(Loss) if (name := kind.model_fields["type"].default) in NAMES
}
"""the losses of June 2025"""
TIED = ("linear1", "linear2")
NUMBERS = ("one", "two", "three", "four", "five")


def experiment_module(found: Published) -> str:
    """The module that holds the configuration class and `build` for it."""
    return EXPERIMENTS[LIKE[found.family]].module


def configuration(found: Published) -> Raw:
    """The configuration of the run, as a YAML file of this package has it."""
    like = read_yaml(PACKAGE_DIR / EXPERIMENTS[LIKE[found.family]].config)
    config, place = found.config, found.directory / CONFIG_FILE
    kept = {
        key: like[key]
        for key in ("steps", "batch_size", "lr", "seed", "eval_batch_size", "n_eval_batches")
    }
    own = {key: config[key] for key in ("batch_size", "lr", "seed") if config.get(key) is not None}
    task = _mapping(config.get("task_config"), place, "task_config")
    raw = {
        **kept,
        **own,
        "experiment": f"imported_{_name(found)}",
        "target": str(found.directory.absolute()),
        "steps": found.step,
        "sites": dict.fromkeys(config["target_module_patterns"], config["C"]),
        "importance": importance(config["n_ci_mlp_neurons"]),
        "lower_leak": "both",
        "losses": losses(config, place),
        "lr_schedule": schedule(config),
        "metrics": _alone(like["metrics"]),
        "figures": like["figures"],
    }
    if found.family == "lm":
        return {**raw, **_language_model(config, task, like["data"])}
    if not _is_whole(found):  # what looks at all sites of a toy has nothing to look at
        raw["metrics"] = {"ladder": {}, "sparsity": {}}
        raw["figures"] = {"importance_histograms": {}, "mean_activity": {}}
    raw["data"] = {**inputs(task, place), "unlike_target": True}
    if found.family == "tms":
        raw["tied_sites"] = [list(pair) for pair in tied_sites(found)]
    return raw


def target_training(found: Published) -> Raw:
    """How the toy target was trained, as the configuration beside its weights says it."""
    assert found.target is not None, "of a toy"
    training = found.target.training
    place = found.directory / f"{found.family}_train_config.yaml"
    config = read_yaml(PACKAGE_DIR / EXPERIMENTS[LIKE[found.family]].config)
    folder = (PACKAGE_DIR / EXPERIMENTS[LIKE[found.family]].config).parent
    raw = read_yaml(folder / config["target"])
    for key in ("steps", "batch_size", "lr", "seed"):
        if training.get(key) is not None:
            raw[key] = training[key]
    raw["n_seeds"] = 1
    if training.get("lr_schedule") is not None:
        raw["lr_schedule"] = {"type": training["lr_schedule"]}
    raw["data"] = {**raw["data"], **inputs(training, place)}
    if training.get("synced_inputs"):
        raw["data"]["synced_inputs"] = training["synced_inputs"]
    model = _model_sizes(training, place)
    if found.family == "tms":
        raw["model"] = _tms_model(model, training, place)
        return raw
    raw["model"] = _resid_mlp_model(model, training, place)
    coeffs = found.target.label_coeffs
    assert coeffs is not None, "read with the target of a residual MLP"
    ones = all(value == 1.0 for value in coeffs)
    kind = training.get("label_type") or "act_plus_resid"
    raw["labels"] = {"type": kind, "coeffs": None if ones else coeffs}
    raw["loss"] = "residual" if training.get("loss_type") == "resid" else "readout"
    if training.get("importance_val") is not None:
        raw["feature_importance"] = training["importance_val"]
    return raw


def importance(n_hidden: Any) -> Raw:
    """0 hidden neurons are one affine map of the inner activation."""
    return {"type": "affine"} if n_hidden == 0 else {"type": "mlp", "n_hidden": n_hidden}


def losses(config: Mapping[str, Any], place: Path) -> Raw:
    """Every `X_coeff: c` as the term X, with `pnorm` and `n_mask_samples` where a term has them."""
    found: Raw = {}
    for key, coeff in config.items():
        name = key.removesuffix("_coeff")
        if name == key or coeff is None:
            continue
        if name not in LOSSES:
            raise UserError(
                f"{place}: {key}: {shown(coeff)}; {name} is no loss of the published implementation of June"
                f" 2025 (known: {', '.join(LOSSES)})"
            )
        fields, spec = LOSSES[name].model_fields, {"coeff": coeff}
        if "pnorm" in fields:
            spec["pnorm"] = config.get("pnorm")
        if "n_samples" in fields and config.get("n_mask_samples") is not None:
            spec["n_samples"] = config["n_mask_samples"]
        if "unembed" in fields and config.get("is_embed_unembed_recon"):
            spec["unembed"] = "lm_head"
        found[name] = spec
    return found


def schedule(config: Mapping[str, Any]) -> Raw:
    """The learning rate's, in the words of `ScheduleConfig`."""
    kind = config.get("lr_schedule") or "constant"
    raw: Raw = {"type": kind}
    if config.get("lr_warmup_pct") is not None:
        raw["warmup_frac"] = config["lr_warmup_pct"]
    half_life = config.get("lr_exponential_halflife")
    if half_life is not None and kind == "exponential":
        raw["half_life"] = half_life
    return raw


def inputs(task: Mapping[str, Any], place: Path) -> Raw:
    """How many features are active at once; what is not said stays out."""
    raw: Raw = {}
    if task.get("feature_probability") is not None:
        raw["feature_probability"] = task["feature_probability"]
    kind = task.get("data_generation_type")
    if kind is None:
        return raw
    exactly = re.fullmatch(r"exactly_(\w+)_active", str(kind))
    if exactly and exactly[1] in NUMBERS:
        n_active = NUMBERS.index(exactly[1]) + 1
        return {**raw, "generation": "exactly_n_active", "n_active": n_active}
    if kind != "at_least_zero_active":
        raise UserError(
            f"{place}: data_generation_type: {shown(kind)} is unknown (at_least_zero_active,"
            f" exactly_one_active to exactly_{NUMBERS[-1]}_active)"
        )
    return {**raw, "generation": kind}


def tied_sites(found: Published) -> list[tuple[str, str]]:
    """The pair of a toy model whose subcomponents are each other's transposed, bit for bit."""
    parts = found.part("components")
    if not all(name in parts for name in TIED):
        return []
    own, other = (parts[name] for name in TIED)
    for one, two in (("A", "B"), ("B", "A")):
        if one not in own or two not in other or not torch.equal(own[one], other[two].mT):
            return []
    return [TIED]


def parameters(found: Published, model: ComponentModel) -> dict[str, Tensor]:
    """The state dict's subcomponents and importance functions, under the names of a model with its sites.

    `UserError` if one is missing, left over or of another shape, or if the target is not the one that was
    decomposed.
    """
    place = f"{found.directory}: model_{found.step}.pth"
    components, gates = found.part("components"), found.part("gates")
    of_module = {path.replace(".", "-"): path for path in model.sites}
    other = sorted({*components, *gates} ^ of_module.keys() | (components.keys() ^ gates.keys()))
    if other:
        raise UserError(
            f"{place}: its subcomponents are those of {', '.join(sorted(components))}, with gates of"
            f" {', '.join(sorted(gates))}, but {CONFIG_FILE} names {', '.join(sorted(of_module))}"
        )
    _check_target(found, model, place)
    named: dict[str, Tensor] = {}
    for dashed, path in of_module.items():
        own = {"subcomponents.V": components[dashed].get("A")}
        own |= {"subcomponents.U": components[dashed].get("B")}
        own |= {f"importance.{name}": tensor for name, tensor in gates[dashed].items()}
        extra = components[dashed].keys() - {"A", "B", "bias"}
        if extra:
            raise UserError(f"{place}: components.{dashed}.{min(extra)}: unknown (A, B, bias)")
        named |= {f"{path}.{name}": tensor for name, tensor in own.items() if tensor is not None}
    wanted = model.subcomponent_parameters()
    tied = {f"{path}.subcomponents.{x}" for _, path in tied_sites(found) for x in "VU"}
    named = {name: t for name, t in named.items() if name not in tied - wanted.keys()}
    wrong = sorted(wanted.keys() ^ named.keys())
    if wrong:
        said = "is missing" if wrong[0] in wanted else "has no place"
        raise UserError(f"{place}: what is {wrong[0]} here {said}")
    for name, tensor in named.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{place}: what is {name} here has the shape {tuple(tensor.shape)}, and"
                f" {tuple(wanted[name].shape)} by {CONFIG_FILE}"
            )
    return {name: tensor.float() for name, tensor in named.items()}


def _check_target(found: Published, model: ComponentModel, place: str) -> None:
    """`UserError` unless the target's weights are what the state dict has of them under `model.`."""
    target = model.target.state_dict()
    for path in model.sites:
        if f"model.{path}.weight" not in found.state:
            raise UserError(f"{place}: model.{path}.weight is missing")
    for name, own in target.items():
        saved = found.state.get(f"model.{name}")
        if saved is None:
            continue
        if saved.shape != own.shape:
            raise UserError(
                f"{place}: model.{name} has the shape {tuple(saved.shape)}, the target {tuple(own.shape)}"
            )
        off = (saved.float() - own.detach().float().cpu()).abs().max().item()
        if off > 1e-6 * max(saved.float().abs().max().item(), 1e-12):
            raise UserError(
                f"{place}: model.{name} differs from the target's by up to {off:.2g}: the target here is"
                " another than that which was decomposed"
            )


def _name(found: Published) -> str:
    if found.target is None:
        return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(hub_name(found.config) or "lm").name)[:60]
    place = found.directory / f"{found.family}_train_config.yaml"
    sizes = _model_sizes(found.target.training, place)
    if found.family == "resid_mlp":
        return f"resid_mlp{sizes.get('n_layers', 1)}"
    of_id = "-id" if sizes.get("n_hidden_layers") else ""
    return f"tms_{sizes.get('n_features')}-{sizes.get('n_hidden')}{of_id}"


def _is_whole(found: Published) -> bool:
    """Whether every matrix of a toy is decomposed."""
    assert found.target is not None, "of a toy"
    names = {
        name.removesuffix(".weight").replace(".", "-")
        for name in found.target.weights
        if name.endswith(".weight")
    }
    return names == found.part("components").keys()


def _alone(metrics: Mapping[str, Raw]) -> Raw:
    """Metrics without the published figures of the experiment that they are taken from."""
    own = ("published", "expected")
    return {
        name: {key: value for key, value in spec.items() if key not in own}
        for name, spec in metrics.items()
    }


def _mapping(value: Any, place: Path, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: {key}: a mapping is needed, got {shown(value)}")
    return value


def _model_sizes(training: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    """The part of a training's configuration that is of the model."""
    for key, value in training.items():
        if key.endswith("_config") and isinstance(value, Mapping) and "n_features" in value:
            return value
    raise UserError(f"{place}: names no sizes of a model (tms_model_config with n_features)")


def _needed(sizes: Mapping[str, Any], keys: tuple[str, ...], place: Path) -> Raw:
    missing = [key for key in keys if key not in sizes]
    if missing:
        raise UserError(f"{place}: the model's {missing[0]} is missing")
    return {key: sizes[key] for key in keys}


def _tms_model(sizes: Mapping[str, Any], training: Mapping[str, Any], place: Path) -> Raw:
    raw = _needed(sizes, ("n_features", "n_hidden"), place)
    raw["n_hidden_layers"] = sizes.get("n_hidden_layers", 0)
    raw["hidden_init"] = "identity"
    if training.get("fixed_random_hidden_layers") and raw["n_hidden_layers"]:
        raw["hidden_init"] = "random"
    raw["tied_weights"] = sizes.get("tied_weights", True)
    raw["init_bias_to_zero"] = sizes.get("init_bias_to_zero", False)
    return raw


def _resid_mlp_model(sizes: Mapping[str, Any], training: Mapping[str, Any], place: Path) -> Raw:
    raw = _needed(sizes, ("n_features", "d_embed", "d_mlp", "n_layers"), place)
    raw["act_fn"] = sizes.get("act_fn_name") or sizes.get("act_fn") or "relu"
    raw |= {key: bool(sizes.get(key)) for key in ("in_bias", "out_bias")}
    identity, random = (
        training.get(f"fixed_{kind}_embedding", kind == "random") for kind in ("identity", "random")
    )
    raw["embedding"] = "identity" if identity else "fixed" if random else "trained"
    return raw


def _language_model(
    config: Mapping[str, Any], task: Mapping[str, Any], like: Mapping[str, Any]
) -> Raw:
    data = {
        "source": task.get("dataset_name"),
        "column": task.get("column_name"),
        "split": task.get("train_data_split"),
        "eval_split": task.get("eval_data_split"),
        "context_length": task.get("max_seq_len"),
        "streaming": True,
        "lowercase": like.get("lowercase") if like["source"] == task.get("dataset_name") else None,
    }
    raw = {
        "target": hub_name(config),
        "model_class": config.get("pretrained_model_class"),
        "output": config.get("pretrained_model_output_attr"),
        "tokenizer": config.get("tokenizer_name"),
        "recon": config.get("output_loss_type"),
        "data": {key: value for key, value in data.items() if value is not None},
    }
    return {key: value for key, value in raw.items() if value is not None}
