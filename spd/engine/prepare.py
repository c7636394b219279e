"""A problem and its configuration, checked against each other, and what is looked at on held-out data."""

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from spd.component_model import ComponentModel
from spd.config import UserError, counted
from spd.config.memory import NUMBER, require_memory
from spd.engine.ensemble import check_one_target
from spd.engine.experts import check_experts, join_, take_experts_apart_
from spd.engine.layers import checkpoint_layers_, layers_of
from spd.engine.step import may_compile, passes_of
from spd.engine.target_check import check_effects, check_known, check_module, check_output
from spd.engine.zero_rows import ZeroRows
from spd.losses import MaskedRecon, State, StepContext
from spd.metrics import HeldOutLosses, Metric, collect
from spd.objective import Objective
from spd.problem import Batch, NamedTensors, Problem, as_batch
from spd.spd_config import SPDConfig

logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A problem and its configuration, checked against each other and ready to run."""

    problem: Problem
    config: SPDConfig
    objective: Objective
    eval_batches: list[Batch]
    """the held-out batches, drawn once"""
    zero_rows: ZeroRows
    choice_batches: Sequence[Batch] = ()
    """by which several starts are compared (`spd.engine.starts`), drawn once"""


def prepare(problem: Problem, config: SPDConfig, *, quiet: bool = False) -> Prepared:
    """Install the sites in the target and check everything a user can get wrong; writes nothing.

    With `quiet` it says nothing of sites without effect, as where that has been said of the same target.
    """
    execution = config.execution
    if torch.is_inference_mode_enabled():
        raise UserError(
            "torch.inference_mode is on here, in which nothing can be trained; decompose outside of it"
        )
    check_module(problem.target)
    take_experts_apart_(problem.target, config.sites)
    model = ComponentModel(
        problem.target,
        config.sites,
        config.importance,
        tied_sites=problem.tied_sites,
        lower_leak=config.lower_leak,
        seed=config.seed,
        autocast=torch.bfloat16 if execution.autocast == "bf16" else None,
    )
    join_(model)
    if execution.activation_checkpointing:
        checkpoint_layers_(model)
    objective = Objective(model, config.losses, problem.recon, problem.position_weights)
    for spec in objective.losses.values():
        spec.check(model)
    eval_batches = _held_out(problem, config.n_eval_batches)
    if len(eval_batches) < config.n_eval_batches:
        raise UserError(
            f"n_eval_batches: {config.n_eval_batches} are wanted, but the held-out data ended after"
            f" {len(eval_batches)}"
        )
    check_output(problem, eval_batches[0])
    check_known(problem, model)
    if any(isinstance(spec, MaskedRecon) for spec in objective.losses.values()):
        # refuses scopes and routing that the sites do not have
        objective.source_shapes(eval_batches[0])
        objective.noise(eval_batches[0], stream="eval", seed=config.seed, step=0)
    check_experts(model, eval_batches[0])
    model.check_importance(eval_batches[0])
    if execution.compile is True and not may_compile(execution, model):
        raise UserError(
            "compile: true compiles all passes of a step together, or the layers of a Hugging Face"
            f" target: it needs passes: together (passes is {execution.passes!r}, here"
            f" {passes_of(execution.passes, model)}) and no experts as sites, or such layers"
            f" ({type(problem.target).__name__} has {len(layers_of(problem.target))}), and"
            " activation_checkpointing: false (it is"
            f" {str(execution.activation_checkpointing).lower()})"
        )
    if not quiet:
        check_effects(model, eval_batches[0])
    zero_rows = ZeroRows(model, problem, eval_batches)
    prepared = Prepared(problem, config, objective, eval_batches, zero_rows)
    build_metrics(prepared, at_end=True)
    return prepared


def _held_out(problem: Problem, n: int) -> list[Batch]:
    """Up to n batches, which are kept; `UserError` where they would not fit into memory."""
    batches = map(as_batch, problem.eval_batches)
    first = list(islice(batches, 1))
    for batch in first:
        what = f"n_eval_batches: {counted(n, 'batch', 'batches')} of held-out data need"
        require_memory(n * batch.numel() * NUMBER, what, batch.device)
    return [*first, *islice(batches, n - len(first))]


def check_side_by_side(runs: Sequence[Prepared]) -> None:
    """`UserError` unless the runs, which differ in their seed alone, can be one computation."""
    if len(runs) == 1:
        return
    obstacle = apart_because(runs[0])
    if obstacle is not None:
        raise UserError(f"seeds: {obstacle}; run one seed at a time")
    check_one_target([run.objective for run in runs])


def apart_because(prepared: Prepared) -> str | None:
    """Why runs of this kind cannot be one computation, or None."""
    execution, model = prepared.config.execution, prepared.objective.model
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes != "1":
        return f"runs side by side share one process, here are {n_processes} (torchrun)"
    together = (
        passes_of(execution.passes, model) == "together" and not execution.activation_checkpointing
    )
    if not together or layers_of(model.target):
        return (
            "runs side by side are one graph of all passes, as toy models have them:"
            f" not for language models, passes: one_by_one (it is {execution.passes}) or"
            f" activation_checkpointing (it is {str(execution.activation_checkpointing).lower()})"
        )
    if isinstance(prepared.eval_batches[0], NamedTensors):
        return "runs side by side take batches of one Tensor, and here a batch has names"
    return None


def build_metrics(prepared: Prepared, *, at_end: bool) -> list[Metric]:
    """Fresh accumulators: every loss on held-out data, and what the configuration names.

    Metrics that are computed at the end of a run alone are among them only then.
    """
    problem, config, objective, *_ = prepared
    specs = [spec for spec in config.metrics.values() if at_end or not spec.at_end]
    model = objective.model
    built = [
        spec.build_at_end(model, problem) if at_end else spec.build(model, problem)
        for spec in specs
    ]
    return [HeldOutLosses(objective.losses), *built]


def eval_contexts(
    prepared: Prepared, state: State | None = None, *, progress: float = 1.0
) -> Iterator[StepContext]:
    """Everything the metrics and figures may look at, for each held-out batch.

    `state` is what terms carry at that step; without it, what they carry before the first. What moves
    over the run is what it is at `progress`.
    """
    return contexts(prepared, prepared.eval_batches, "eval", progress=progress, state=state)


def progress_at(step: int, steps: int) -> float:
    """τ of a step, and of the evaluation before it: 0 at the first, 1 at the last and after it."""
    return min(step / max(steps - 1, 1), 1.0)


def contexts(
    prepared: Prepared,
    batches: Sequence[Batch],
    stream: str,
    *,
    progress: float = 1.0,
    state: State | None = None,
) -> Iterator[StepContext]:
    """What terms are computed from on each of the batches, with the noise of a stream."""
    config, objective = prepared.config, prepared.objective
    state = objective.initial_state() if state is None else state
    for index, batch in enumerate(batches):
        noise = objective.noise(batch, stream=stream, seed=config.seed, step=index)
        at = torch.tensor(progress, device=batch.device)
        begun = objective.begun(state, batch, seed=config.seed, training=False)
        yield objective.context(batch, at, noise, state=begun)


@torch.no_grad()
def evaluate(
    prepared: Prepared,
    state: State | None = None,
    *,
    at_end: bool = True,
    progress: float = 1.0,
) -> dict[str, float]:
    """All metrics on the held-out batches, under keys that begin with `eval/`.

    Losses are what they are in a step of training at that `progress` of the run. Without `at_end` those are
    left out that cost too much for every evaluation. Gradients are off, since most need none; a loss or
    metric that asks for some does so within `torch.enable_grad()`, as `spd.adversary` does. No evaluation
    is compiled, whatever the steps are.
    """
    metrics = build_metrics(prepared, at_end=at_end)
    values = collect(metrics, eval_contexts(prepared, state, progress=progress))
    return {f"eval/{key}": value for key, value in values.items()}
