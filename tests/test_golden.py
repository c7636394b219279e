"""Every definition against numbers computed with the published implementation of the method.

`SPD_GOLDEN_DIR` names another folder of the same format.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import parse
from spd.engine.compilation import CompiledStep
from spd.engine.sequential import CompiledPasses
from spd.importance import AffineImportanceConfig, MLPImportanceConfig
from spd.losses import kl_divergence
from spd.objective import Objective
from spd.problem import Problem
from spd.schedule import ScheduleConfig, schedule_factor
from spd.spd_config import SPDConfig
from tests.golden_targets import build_target

GOLDEN = Path(os.environ.get("SPD_GOLDEN_DIR") or Path(__file__).parent / "golden")
CASES = sorted(path for path in GOLDEN.glob("*.json") if path.stem != "lr_schedules")
TERM_OF_COEFF = {"out_recon": "output_recon"}
WITH_PNORM = ("importance_minimality", "schatten")
SAMPLED = ("stochastic_recon", "stochastic_recon_layerwise", "embedding_recon")


def read_case(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def by_kind(kind: str) -> list[Path]:
    return [path for path in CASES if json.loads(path.read_text())["kind"] == kind]


def learning_rates() -> list[dict[str, Any]]:
    path = GOLDEN / "lr_schedules.json"
    return json.loads(path.read_text()) if path.is_file() else []


def loss_config(case: dict[str, Any]) -> dict[str, Any]:
    """The case's coefficients as this project writes them."""
    coeffs = dict(case["coeffs"])
    unembed = coeffs.pop("is_embed_unembed_recon", False)
    losses: dict[str, Any] = {}
    for key, coeff in coeffs.items():
        name = key.removesuffix("_coeff")
        losses[name] = {"coeff": coeff}
        if name in WITH_PNORM:
            losses[name]["pnorm"] = case["pnorm"]
        if name in SAMPLED:
            losses[name]["n_samples"] = case["n_mask_samples"]
    if unembed:
        losses["embedding_recon"]["unembed"] = "lm_head"
    return losses


def build_objective(case: dict[str, Any], tensors: dict[str, Tensor]) -> Objective:
    n_hidden = case["n_ci_mlp_neurons"]
    importance = MLPImportanceConfig(n_hidden=n_hidden) if n_hidden else AffineImportanceConfig()
    raw = {
        "sites": {pattern: case["C"] for pattern in case["target_module_patterns"]},
        "losses": loss_config(case),
        "importance": importance,
        "steps": 1,
        "lr": 1e-3,
    }
    config = parse(SPDConfig, raw, "golden case")
    model = ComponentModel(build_target(case, tensors), config.sites, config.importance)
    assert sorted(model.sites) == sorted(case["modules"])
    loaded = {}
    for name in model.subcomponent_parameters():
        path, _, rest = name.rpartition(".subcomponents.")
        if path:
            loaded[name] = tensors[f"{rest}.{path}"]
        else:
            path, _, rest = name.rpartition(".importance.")
            loaded[name] = tensors[f"ci_fn.{path}.{rest}"]
    model.load_subcomponents(loaded)
    nothing = iter(())
    problem = Problem(model.target, nothing, nothing, recon=case["output_loss_type"])
    return Objective(model, config.losses, problem.recon)


def noise_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("noise."): tensor
        for name, tensor in tensors.items()
        if name.startswith("noise.")
    }


def grad_key(parameter: str) -> str:
    """`linear1.subcomponents.V` is `grad.V.linear1`; importance functions likewise."""
    for infix, form in (
        (".subcomponents.", "grad.{1}.{0}"),
        (".importance.", "grad.ci_fn.{0}.{1}"),
    ):
        path, found, rest = parameter.rpartition(infix)
        if found:
            return form.format(path, rest)
    raise AssertionError(f"unexpected parameter {parameter}")


def check_case(path: Path, *, compiled: bool = False, one_by_one: bool = False) -> None:
    """With both, the target's layers are compiled."""
    case, tensors = read_case(path)
    objective = build_objective(case, tensors)
    arguments = (tensors["batch"], torch.tensor(0.0), noise_of(tensors))
    if one_by_one:
        terms, _ = CompiledPasses(objective, compiled, 1)(*arguments)
        total = terms["loss/total"]
    else:
        step = CompiledStep(objective, compiled, 1)
        total, terms, _ = step(*arguments)
        total.backward()

    expected = {
        f"loss/{TERM_OF_COEFF.get(name, name)}": terms[f"loss/{name}"] for name in objective.losses
    }
    assert expected.keys() == case["terms"].keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            value, torch.tensor(case["terms"][name]), rtol=1e-4, atol=1e-6, msg=name
        )
    torch.testing.assert_close(total, torch.tensor(case["total"]), rtol=1e-4, atol=1e-6)
    for name, parameter in objective.model.subcomponent_parameters().items():
        assert parameter.grad is not None, f"{name} has no gradient"
        torch.testing.assert_close(
            parameter.grad, tensors[grad_key(name)], rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("path", by_kind("losses"), ids=lambda path: path.stem)
def test_terms_and_gradients(path: Path) -> None:
    check_case(path)


@pytest.mark.parametrize("path", by_kind("losses"), ids=lambda path: path.stem)
def test_terms_and_gradients_one_pass_after_another(path: Path) -> None:
    check_case(path, one_by_one=True)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("path", by_kind("losses"), ids=lambda path: path.stem)
def test_compiled_terms_and_gradients(path: Path) -> None:
    check_case(path, compiled=True)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(
    "path", [p for p in by_kind("losses") if p.stem.startswith("llama")], ids=lambda path: path.stem
)
def test_compiled_terms_and_gradients_one_pass_after_another(path: Path) -> None:
    check_case(path, compiled=True, one_by_one=True)


@pytest.mark.parametrize("path", by_kind("losses"), ids=lambda path: path.stem)
def test_weights_and_importances(path: Path) -> None:
    case, tensors = read_case(path)
    model = build_objective(case, tensors).model
    ci = model.causal_importances(model.target_forward(tensors["batch"]).site_inputs)
    for module in case["modules"]:
        for name, values in (("lower", ci.lower), ("upper", ci.upper)):
            torch.testing.assert_close(
                values[module], tensors[f"ci_{name}.{module}"], rtol=1e-4, atol=1e-6
            )
        site = model.sites[module]
        weight = site.subcomponents.V @ site.subcomponents.U
        own_layout = weight.mT if isinstance(site.original, nn.Linear) else weight
        torch.testing.assert_close(own_layout, tensors[f"weight.{module}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", by_kind("losses"), ids=lambda path: path.stem)
def test_target_output(path: Path) -> None:
    """In float32, as the numbers to compare with were computed: rounding goes with the largest entry."""
    case, tensors = read_case(path)
    output = build_objective(case, tensors).model.target_forward(tensors["batch"]).output
    atol = 1e-6 * max(1.0, tensors["target_out"].abs().max().item())
    torch.testing.assert_close(output, tensors["target_out"], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("path", by_kind("kl"), ids=lambda path: path.stem)
def test_kl_divergence(path: Path) -> None:
    case, tensors = read_case(path)
    own = kl_divergence(tensors["pred"], tensors["target"])
    torch.testing.assert_close(own, torch.tensor(case["value"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", learning_rates(), ids=str)
def test_learning_rates(case: dict[str, Any]) -> None:
    schedule = ScheduleConfig(
        type=case["lr_schedule"],
        warmup_frac=case["lr_warmup_pct"],
        half_life=case["lr_exponential_halflife"],
    )
    for step, expected in case["values"].items():
        own = case["lr"] * schedule_factor(schedule, int(step), case["steps"])
        assert own == pytest.approx(expected, rel=1e-6, abs=1e-12)
