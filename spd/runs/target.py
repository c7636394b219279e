"""The target of a run that is opened again: the run's copy, what it was made from, or one that is given."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spd.component_model import ComponentModel, Site
from spd.config import UserError, parse
from spd.engine.prepare import Prepared, prepare
from spd.engine.starts import as_chosen
from spd.noise import seeded
from spd.problem import Problem
from spd.run_files import META_FILE, TARGET, read_meta
from spd.runs.console import resolve_device
from spd.runs.execution import ExperimentConfig
from spd.runs.kept_starts import chosen_seed

Build = Callable[..., Problem]
"""`build(config, device)` of an experiment; it may also take `target` and `device_map` by name"""
MATRICES = "matrices"
"""the key of meta.json under which the digest of the decomposed matrices stands"""


class Given(NamedTuple):
    """What whoever opens a run says about its target; None: as the run has it."""

    target: str | Path | nn.Module | None = None
    dtype: str | torch.dtype | None = None
    device: str | None = None
    """None: that of a given module, else the CPU"""
    device_map: Any = None


AS_IT_IS = Given()


def reopen(
    config: ExperimentConfig,
    build: Build,
    directory: Path,
    given: Given = AS_IT_IS,
    *,
    verify: bool = True,
) -> Prepared:
    """The problem of the run in `directory`, prepared over its target or over the one that is given.

    `UserError` if an argument means nothing for this run, or the matrices are not those that were
    decomposed; these are not compared if the run's own files are not to be verified.
    """
    takes = inspect.signature(build).parameters
    _check_arguments(given, config, takes)
    config = _with_dtype(config, given.dtype)
    own, target = directory / TARGET, given.target
    made_from = with_target(config, own) if own.is_dir() else config
    options = {} if given.device_map is None else {"device_map": given.device_map}
    if target is not None and "target" in takes:
        options["target"] = target
    elif target is not None and not isinstance(target, nn.Module):
        made_from = with_target(config, target)
    problem = build(made_from, _device(given), **options)
    if isinstance(target, nn.Module) and "target" not in takes:
        problem = replace(problem, target=target.to(problem.device))
    try:
        prepared = prepare(problem, config)
    except UserError as error:
        if target is None:
            raise
        raise UserError(
            f"{_name(given, config)} does not fit the run {directory}: {error}"
        ) from None
    recorded = read_meta(directory).get(MATRICES)
    # where `build` makes it, it is not bit for bit the same on another CPU
    own_work = target is None and (config.target is None or not verify)
    if recorded is not None and not own_work and recorded != digest(prepared.objective.model):
        raise UserError(
            f"{_name(given, config)}: its matrices are others than those that were decomposed (their"
            f" digest differs from {MATRICES!r} in {directory / META_FILE})"
        )
    seed = chosen_seed(directory)
    return prepared if seed is None else as_chosen(prepared, seed)


def digest(model: ComponentModel, dtype: torch.dtype = torch.bfloat16) -> str:
    """A digest of every decomposed matrix of the target, rounded to a type.

    Rounded to bfloat16, it is that of the same target loaded in either precision.
    """
    found = hashlib.blake2b(digest_size=16)
    for path, site in model.sites.items():
        weight = site.target_weight.detach().to("cpu", dtype).contiguous()
        found.update(f"{path} {tuple(weight.shape)}".encode())
        found.update(weight.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


SKETCHED = (4, 8)
"""random combinations of the rows and of the columns of a matrix of which a sketch is made"""
ROUNDING = 0.01
"""a relative difference that another machine or half precision makes; another target is 1 away"""


@torch.no_grad()
def sketches(model: ComponentModel) -> dict[str, list[float]]:
    """A few numbers of every decomposed matrix W, by which another target's distance is estimated.

    The entries of R W S / ‖W‖ for R `[4, d_in]` and S `[d_out, 8]` of random signs, ‖W‖ at the end: the
    mean square of the difference of two such sketches is that of the matrices.
    """
    found = {}
    for path, site in model.sites.items():
        W = site.target_weight.detach().double().cpu()
        n_rows, n_columns = SKETCHED
        signs = [
            torch.randint(2, shape, generator=seeded(W.device, "sketch", path, i)).double() * 2 - 1
            for i, shape in enumerate([(n_rows, W.shape[0]), (W.shape[1], n_columns)])
        ]
        norm = W.norm().clamp(min=1e-30)
        found[path] = [*(signs[0] @ W @ signs[1] / norm).flatten().tolist(), norm.item()]
    return found


def distance(own: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> float:
    """The largest relative difference ‖W − W′‖ / ‖W‖ of a site by two sketches, to a third or so."""
    largest = 0.0
    for path, (*numbers, norm) in own.items():
        *others, other_norm = other[path]
        pairs = zip(numbers, others, strict=True)
        squares = [(a - b * other_norm / norm) ** 2 for a, b in pairs]
        largest = max(largest, (sum(squares) / len(squares)) ** 0.5)
    return largest


def _check_arguments(
    given: Given, config: ExperimentConfig, takes: Mapping[str, inspect.Parameter]
) -> None:
    target = given.target
    if isinstance(target, nn.Module):
        for name in ("dtype", "device_map"):
            if getattr(given, name) is not None:
                raise UserError(
                    f"{name}: {getattr(given, name)}; a target that is given as a module is taken as it is"
                )
        if any(isinstance(module, Site) for module in target.modules()):
            raise UserError(
                f"target: the {type(target).__name__} that is given is decomposed already; give a module of"
                " its own to each run"
            )
    elif target is not None and config.target is None:
        raise UserError(
            f"target: {str(target)!r}; the experiment {config.experiment!r} makes its target itself, which"
            " has no place; an nn.Module is allowed"
        )
    if given.device_map is not None and "device_map" not in takes:
        raise UserError(
            f"device_map: {given.device_map!r}; the target of {config.experiment!r} is no model of Hugging"
            " Face's transformers; name a device"
        )
    if given.device_map is not None and given.device is not None:
        raise UserError(
            f"device: {given.device!r} and device_map: {given.device_map!r}; one of them is allowed"
        )
    if given.dtype is not None and "dtype" not in type(config).model_fields:
        raise UserError(
            f"dtype: {given.dtype}; the target of {config.experiment!r} is no model of Hugging Face's"
            " transformers, it has the type that it was trained in"
        )


def with_target(config: ExperimentConfig, place: str | Path) -> ExperimentConfig:
    """With a target that is there already: what says how to make it is left out."""
    made = {"target_seed": None, "null": False}
    known = {key: value for key, value in made.items() if key in type(config).model_fields}
    return config.model_copy(update={"target": str(place), **known})


def _with_dtype(config: ExperimentConfig, dtype: str | torch.dtype | None) -> ExperimentConfig:
    """With the target in another type; subcomponents stay float32, which takes autocast."""
    if dtype is None:
        return config
    raw = config.model_dump(mode="json")
    name = str(dtype).removeprefix("torch.")
    if name != "float32" and raw["execution"]["autocast"] is None:
        raw["execution"]["autocast"] = "bf16"
    return parse(type(config), {**raw, "dtype": name}, "load_run")


def _device(given: Given) -> torch.device:
    if given.device is None and isinstance(given.target, nn.Module):
        first = next(given.target.parameters(), None)
        return torch.device("cpu") if first is None else first.device
    return resolve_device(given.device or "cpu")


def _name(given: Given, config: ExperimentConfig) -> str:
    target = config.target if given.target is None else given.target
    name = f"a {type(target).__name__}" if isinstance(target, nn.Module) else f"'{target}'"
    return f"target {name}"
