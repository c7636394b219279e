"""The optimisation loop and what surrounds it: checks, evaluation, checkpoints. Read this file first."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd import checkpoint
from spd.activation_checkpointing import checkpoint_layers_
from spd.compilation import CompiledStep
from spd.component_model import ComponentModel
from spd.config import RunError, UserError
from spd.figures import Figure
from spd.losses import StepContext
from spd.metrics import HeldOutLosses, Metric, collect
from spd.objective import Objective, SPDConfig
from spd.passes import passes_of
from spd.problem import Problem, Resumable
from spd.schedule import schedule_factor
from spd.silent_rows import SilentRows
from spd.tracking import NullTracker, Tracker


class Prepared(NamedTuple):
    """A problem and its configuration, checked against each other and ready to run."""

    problem: Problem
    config: SPDConfig
    objective: Objective
    eval_batches: list[Tensor]
    """the held-out batches, drawn once"""
    silent_rows: SilentRows


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run was asked to stop and has written its checkpoint."""


def prepare(problem: Problem, config: SPDConfig) -> Prepared:
    """Install the sites in the target and check everything a user can get wrong; writes nothing."""
    model = ComponentModel(
        problem.target,
        config.sites,
        config.importance,
        tied_sites=problem.tied_sites,
        lower_leak=config.lower_leak,
        seed=config.seed,
        autocast=torch.bfloat16 if config.autocast == "bf16" else None,
    )
    if config.activation_checkpointing:
        checkpoint_layers_(model)
    objective = Objective(model, config, problem)
    for spec in objective.losses.values():
        spec.check(model)
    eval_batches = list(islice(problem.eval_batches, config.n_eval_batches))
    if len(eval_batches) < config.n_eval_batches:
        raise UserError(
            f"n_eval_batches: {config.n_eval_batches} are wanted, but the held-out data ended after"
            f" {len(eval_batches)}"
        )
    if config.compile is True and not may_compile(config, eval_batches[0]):
        raise UserError(
            "compile: true compiles all passes of a step together, as they are: it needs passes:"
            f" together (passes is {config.passes!r}, here"
            f" {passes_of(config.passes, eval_batches[0])}) and activation_checkpointing: false"
            f" (it is {str(config.activation_checkpointing).lower()})"
        )
    silent_rows = SilentRows(model, problem, eval_batches)
    prepared = Prepared(problem, config, objective, eval_batches, silent_rows)
    build_metrics(prepared)
    for spec in config.figures.values():
        spec.build(model, problem)
    return prepared


def may_compile(config: SPDConfig, batch: Tensor) -> bool:
    """Whether a step on such batches is one graph that can be compiled."""
    together = passes_of(config.passes, batch) == "together"
    return together and not config.activation_checkpointing


def optimize(problem: Problem, config: SPDConfig, tracker: Tracker | None = None) -> ComponentModel:
    """Decompose `problem.target` (in place) and return it as a `ComponentModel`."""
    return run_steps(prepare(problem, config), tracker or NullTracker())


def run_steps(
    prepared: Prepared,
    tracker: Tracker,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> ComponentModel:
    """The loop. A checkpoint holds the state before its step; one extra lap evaluates and saves last."""
    problem, config, objective, *_ = prepared
    parameters = list(objective.model.subcomponent_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    state = _restore(prepared, optimizer, checkpoints) if resume and checkpoints else {}
    start = state.get("step", 0)
    together = passes_of(config.passes, prepared.eval_batches[0]) == "together"
    setting = state.get("compiled", config.compile)
    setting = setting if may_compile(config, prepared.eval_batches[0]) else False
    step_fn = CompiledStep(objective, setting, config.steps - start)
    tracker.start(start, config.steps)

    for step in range(start, config.steps + 1):
        last, stopping = step == config.steps, stop_requested()
        saving = stopping or (due(step, config.save_every, last) and step > start)
        if checkpoints is not None and saving:
            _save(prepared, optimizer, checkpoints, step, step_fn.compiled)
        if stopping:
            raise Interrupted(f"stopped before step {step} of {config.steps}")
        if due(step, config.eval_every, last):
            tracker.write(step, evaluate(prepared))
        if last or (config.figures_every and due(step, config.figures_every, last)):
            tracker.write_figures(step, draw(prepared))
        if last:
            break
        lr = config.lr * schedule_factor(config.lr_schedule, step, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = _next_batch(problem.train_batches, step, config.steps)
        batch, row_weights = prepared.silent_rows.merge(batch)
        noise = objective.noise(batch, stream="train", seed=config.seed, step=step)
        progress = torch.tensor(step / config.steps, device=batch.device)

        # ---- the training step
        if together:
            total, terms = step_fn(batch, progress, dict(noise), row_weights)
            total.backward()
        else:
            terms = objective.backward_one_by_one(batch, progress, noise, row_weights)
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ----

        if due(step, config.log_every, step + 1 == config.steps):
            values = to_floats(terms)  # the only host sync
            check_finite(values, step)
            tracker.write(step, {**values, "lr": lr})
    return objective.model


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every `every` steps, and at the last, happens at `step`."""
    return last or step % every == 0


def build_metrics(prepared: Prepared) -> list[Metric]:
    """Fresh accumulators: every loss on held-out data, and what the configuration names."""
    problem, config, objective, *_ = prepared
    specs = [spec.build(objective.model, problem) for spec in config.metrics.values()]
    return [HeldOutLosses(objective.losses), *specs]


def eval_contexts(prepared: Prepared) -> Iterator[StepContext]:
    """Everything the metrics and figures may look at, for each held-out batch."""
    config, objective = prepared.config, prepared.objective
    for index, batch in enumerate(prepared.eval_batches):
        noise = objective.noise(batch, stream="eval", seed=config.seed, step=index)
        yield objective.context(batch, torch.tensor(1.0, device=batch.device), noise)


@torch.no_grad()
def evaluate(prepared: Prepared) -> dict[str, float]:
    """All metrics on the held-out batches, under keys that begin with `eval/`."""
    values = collect(build_metrics(prepared), eval_contexts(prepared))
    return {f"eval/{key}": value for key, value in values.items()}


@torch.no_grad()
def draw(prepared: Prepared) -> dict[str, Figure]:
    """All figures that the configuration names, by name."""
    problem, config, objective, *_ = prepared
    makers = [spec.build(objective.model, problem) for spec in config.figures.values()]
    return collect(makers, eval_contexts(prepared)) if makers else {}


def to_floats(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """All values in one transfer from the device."""
    return dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))


class NonFiniteError(RunError):
    """A term became NaN or infinite."""


def check_finite(values: Mapping[str, float], step: int) -> None:
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"step {step}: {', '.join(bad)}; the run stops here")


def _next_batch(batches: Iterator[Tensor], step: int, steps: int) -> Tensor:
    try:
        return next(batches)
    except StopIteration:
        raise RunError(f"the training data ended before step {step} of {steps}") from None


def _save(
    prepared: Prepared,
    optimizer: torch.optim.Optimizer,
    directory: Path,
    step: int,
    compiled: bool | None,
) -> None:
    batches = prepared.problem.train_batches
    state: dict[str, Any] = {
        "optimizer": optimizer.state_dict(),
        "data": batches.state_dict() if isinstance(batches, Resumable) else None,
        "rng": torch.get_rng_state(),
        "num_threads": torch.get_num_threads(),
    }
    if compiled is not None:
        state["compiled"] = compiled
    parameters = dict(prepared.objective.model.subcomponent_parameters())
    keep = prepared.config.keep_checkpoints
    checkpoint.save(directory, step, parameters=parameters, state=state, keep=keep)


def _restore(
    prepared: Prepared, optimizer: torch.optim.Optimizer, directory: Path
) -> dict[str, Any]:
    """Bring everything back to the newest checkpoint; an empty state where there is none yet."""
    newest = checkpoint.latest(directory)
    if newest is None:
        return {}
    state = checkpoint.load_state(newest)
    batches = prepared.problem.train_batches
    if not isinstance(batches, Resumable):
        raise UserError("resume: the training batches have no state_dict and load_state_dict")
    try:
        prepared.objective.model.load_subcomponents(checkpoint.load_parameters(newest))
        optimizer.load_state_dict(state["optimizer"])
        batches.load_state_dict(state["data"])
        torch.set_rng_state(state["rng"])
        torch.set_num_threads(state["num_threads"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{newest}: the checkpoint does not fit this configuration: {error}"
        ) from None
    return state
