"""Whether a target can be decomposed at all, tried out on a real batch before anything is trained.

Training batches are not tried out: where a step fails, `blamed_on_data` says whether it is their fault.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, Site, layers_of
from spd.components import decomposable
from spd.config import UserError, counted, nearest
from spd.masks import Pass, RoutedInput, SiteMask
from spd.problem import Batch, NamedTensors, Problem, describe, run_target

logger = logging.getLogger(__name__)


def check_module(target: nn.Module) -> None:
    """`UserError` unless all parameters are there, and can be computed with where gradients are."""
    if isinstance(target, torch.jit.ScriptModule):
        raise UserError(
            "target: the modules of a torch.jit.ScriptModule cannot be replaced; give the module that it"
            " was made from"
        )
    for name, parameter in target.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            path = name.rpartition(".")[0]
            raise UserError(
                f"target: {path!r} is a {type(target.get_submodule(path)).__name__} that has not seen a"
                " batch yet, so that its size is unknown; call the target once before decomposing"
            )
        if parameter.is_inference():
            raise UserError(
                f"target: {name!r} was made under torch.inference_mode, so that no gradient can pass"
                " through it; make or load the target outside of it, or decompose copy.deepcopy(target)"
            )


@torch.no_grad()
def check_output(problem: Problem, batch: Batch) -> None:
    """`UserError` unless the target gives one Tensor of numbers for a batch, and the same one again."""
    target = problem.target
    kind = f"target: {type(target).__name__}"
    if batch.numel() == 0:
        raise UserError(f"eval_batches: the first is {describe(batch)}: it is empty")
    if not all(tensor.isfinite().all() for tensor in _tensors(batch) if not tensor.is_meta):
        raise UserError(
            f"eval_batches: the first, {describe(batch)}, has entries that are not finite"
        )
    before = [tensor._version for tensor in _tensors(batch)]
    try:
        output = run_target(target, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a target raises for a batch that is not the one it needs
        raise UserError(
            f"{kind} fails on the first batch of eval_batches, {describe(batch)}: {_said(error)}; a batch"
            " is the argument of its forward, or a dict of them by name where it needs several"
        ) from error
    if [tensor._version for tensor in _tensors(batch)] != before:
        raise UserError(
            f"{kind} changes the batch that it is given, in place, so that no two passes see the same data;"
            " let its forward begin with a copy (x = x.clone())"
        )
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise UserError(
            f"{kind} returns {_kind(output)}; one Tensor of numbers is needed,"
            " so give a module whose forward picks it out of what yours returns"
        )
    if output.layout != torch.strided or output.dim() == 0 or output.numel() == 0:
        layout = "" if output.layout == torch.strided else f", {output.layout}"
        raise UserError(
            f"{kind} returns {describe(output)}{layout}; a dense Tensor with an axis at least, and with"
            " entries, is needed"
        )
    if problem.position_weights is None:
        _check_finite(output, kind, problem.recon)
    else:  # outputs that do not count may be anything
        _check_weights(problem.position_weights(batch), output)
    if not torch.allclose(output, run_target(target, batch), rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UserError(
            f"{kind} gives two different outputs for one batch, in evaluation mode too; remove what is"
            " random in it, such as dropout in its forward, before decomposing"
        )


def _check_weights(weights: object, output: Tensor) -> None:
    """`UserError` unless there is a weight for every row of an output, and one of them counts."""
    rows = output.shape[:-1] or output.shape
    needed = f"weights of shape {tuple(rows)}, one for each row of the output, are needed"
    if not isinstance(weights, Tensor):
        raise UserError(
            f"position_weights: {_kind(weights)} for the first held-out batch; {needed}"
        )
    if weights.shape != rows:
        raise UserError(
            f"position_weights: {describe(weights)} for the first held-out batch; {needed}"
        )
    if weights.is_meta:
        return
    if not weights.isfinite().all() or (weights < 0).any():
        raise UserError("position_weights: a weight is a finite number of at least 0")
    if not weights.any():
        raise UserError(
            "position_weights: all of the first held-out batch are 0, so that nothing counts"
        )


@contextmanager
def blamed_on_data(target: nn.Module, batches: Sequence[Batch], step: int) -> Iterator[None]:
    """`UserError` where a step fails on a training batch on which the target fails by itself, too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        for batch in batches:
            said = _failure_on(target, batch)
            if said is not None:
                raise UserError(
                    f"train_batches: {type(target).__name__} fails on the batch of step {step},"
                    f" {describe(batch)}: {said}; training batches are such as the held-out ones"
                ) from error
        raise


@torch.no_grad()
def _failure_on(target: nn.Module, batch: Batch) -> str | None:
    try:
        run_target(target, batch)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        return _said(error)
    return None


def _check_finite(output: Tensor, kind: str, recon: str) -> None:
    """`UserError` where no divergence from an output is finite, whatever it is compared with."""
    if output.is_meta:
        return
    if recon == "kl":
        lost = (output.isnan() | output.isposinf()).any() | output.isneginf().all(dim=-1).any()
        needed = "recon: kl needs logits, of which some may be -inf, but not all of one row"
    else:
        lost = ~output.isfinite().all()
        needed = f"recon: {recon} needs finite numbers"
    if lost:
        n = {"nan": output.isnan(), "inf": output.isposinf(), "-inf": output.isneginf()}
        found = ", ".join(
            f"{int(those.sum())} of {name}" for name, those in n.items() if those.any()
        )
        raise UserError(
            f"{kind} returns for the first batch of eval_batches, among {output.numel()} numbers, {found};"
            f" {needed}"
        )


def check_known(problem: Problem, model: ComponentModel) -> None:
    """`UserError` unless the solution is of modules, and the target can be given the probes.

    What is known of a module that is not decomposed is not asked for.
    """
    modules = dict(model.target.named_modules())
    unknown = [path for path in problem.solution if path not in {**model.sites, **modules}]
    if unknown:
        raise UserError(
            f"solution: {unknown[0]!r} is no site{nearest(unknown[0], model.sites)} (sites:"
            f" {', '.join(model.sites)})"
        )
    if problem.probes is None:
        return
    try:
        model.target_forward(problem.probes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as for a batch
        raise UserError(
            f"probes: the target fails on {describe(problem.probes)}: {_said(error)}"
        ) from error


def check_effects(model: ComponentModel, batch: Batch) -> None:
    """Say which sites leave the output as it is even if they give out nothing but their bias.

    `UserError` where one has an effect that cannot be learned, or where a part of what its matrix does
    would never be ablated.
    """
    if batch.is_meta:
        return
    _check_shared(model)
    inputs = model.target_forward(batch).site_inputs  # refuses a site that is not called once
    idle = {path for path, x in inputs.items() if isinstance(x, RoutedInput) and not len(x.rows)}
    if idle:
        logger.warning(
            "no token of the first batch of held-out data is routed to %s of experts: %s",
            counted(len(idle), "matrix", "matrices"),
            ", ".join(sorted(idle)[:4]) + (", …" if len(idle) > 4 else ""),
        )
    if layers_of(model.target) and not any(isinstance(x, RoutedInput) for x in inputs.values()):
        batch = batch[:1]  # a row of tokens shows it, in a fraction of the memory
        inputs = model.target_forward(batch).site_inputs
    slopes = _slopes(model, batch, inputs)
    for path, slope in slopes.items():
        if path in idle or (slope is not None and slope.count_nonzero()):
            continue
        nothing = torch.zeros(model.sites[path].C, device=batch.device)
        with torch.no_grad():
            whole, ablated = model(batch, {}), model(batch, {path: SiteMask(nothing)})
        if torch.equal(whole, ablated):
            logger.warning(
                "site %r has no effect on the output: ablating it changes nothing on the first batch of"
                " held-out data",
                path,
            )
        elif slope is None:
            raise UserError(
                f"sites: no gradient of the output reaches {path!r}, though ablating it changes the output;"
                " what it does cannot be learned through a detach() or an argmax, so name patterns that"
                " leave it out"
            )


def _check_shared(model: ComponentModel) -> None:
    """Say where the weight of a site stands in another matrix, too; `UserError` where it is no matrix's.

    What is done with it there is never ablated.
    """
    own = {id(site.original.weight): path for path, site in model.sites.items()}
    modules = dict(model.target.named_modules(remove_duplicate=False))
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, Site))
    for name, parameter in model.target.named_parameters(remove_duplicate=False):
        path = own.get(id(parameter))
        if path is None or f"{name}.".startswith(inside):
            continue
        holder = modules[name.rpartition(".")[0]]
        if not decomposable(holder):
            raise UserError(
                f"sites: the target keeps the weight of {path!r} as {name!r} besides, so that what it does"
                " with it there would never be ablated; name patterns that leave it out, or give the target"
                " a copy of the weight there"
            )
        logger.warning(
            "the weight of site %r is that of %r too, which is not decomposed: there it is never"
            " ablated",
            path,
            name.removesuffix(".weight"),
        )


def _slopes(
    model: ComponentModel, batch: Batch, inputs: Mapping[str, object]
) -> dict[str, Tensor | None]:
    """Of a random projection of the output along the masks of each site; None: it does not depend on them.

    `UserError` if there are none of the output at all, or if it depends on the weight of a site besides.
    """
    scale = {
        path: torch.ones(site.C, device=batch.device, requires_grad=True)
        for path, site in model.sites.items()
    }
    kind = f"target: {type(model.target).__name__}"
    with torch.enable_grad():
        watched = Pass({path: _of_all(model, path, m, inputs[path]) for path, m in scale.items()})
        watched.weights = {}
        output = model.run(batch, watched)
        if not output.requires_grad:
            raise UserError(
                f"{kind} gives an output without gradient, as under torch.no_grad or after detach(); let"
                " its forward compute with gradients"
            )
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        seen = output.isfinite()
        projected = (output.where(seen, 0.0) * drawn.to(output.device)).sum()
        asked = [*scale.values(), *watched.weights.values()]
        try:
            slopes = torch.autograd.grad(projected, asked, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"{kind} has no gradient: {_said(error)}") from error
    read = slopes[len(scale) :]
    for path, slope in zip(watched.weights, read, strict=True):
        if slope is not None:
            raise UserError(
                f"sites: the target reads the weight of {path!r} besides calling it, so that a part of what"
                " it does would never be ablated; name patterns that leave it out, or let the target call a"
                " module of its own there"
            )
    return dict(zip(scale, slopes, strict=False))


def _of_all(model: ComponentModel, path: str, m: Tensor, x: object) -> SiteMask:
    """One mask for each row that a site reads in the target, so that other rows are noticed."""
    return SiteMask(model.sites[path].mask_of_all(m, x) if isinstance(x, Tensor) else m)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.tensors.values()] if isinstance(batch, NamedTensors) else [batch]


def _kind(output: object) -> str:
    match output:
        case None:
            return "None"
        case Tensor():
            return f"a Tensor of {output.dtype}"
        case Mapping():
            keys = ", ".join(map(str, output)) or "none"
            return f"a {type(output).__name__} with the keys {keys}"
        case tuple() | list():
            return f"a {type(output).__name__} of {len(output)}"
        case _:
            return f"a {type(output).__name__}"
