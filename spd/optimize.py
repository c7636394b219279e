"""The method, top to bottom: configuration, objective, optimisation loop. Read this file first."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from spd import checkpoint
from spd.compilation import CompiledStep
from spd.component_model import ComponentModel
from spd.config import BaseConfig, RunError, UserError
from spd.data import derive_seed
from spd.figures import Figure, Figures
from spd.importance import ImportanceConfig, LowerLeak, MLPImportanceConfig
from spd.losses import Losses, Noise, StepContext, loss_terms, noise_key
from spd.metrics import L0_THRESHOLD, HeldOutLosses, Metric, Metrics, collect
from spd.problem import Problem, ReconKind, Resumable
from spd.schedule import ScheduleConfig, schedule_factor
from spd.silent_rows import SilentRows
from spd.tracking import NullTracker, Tracker


class SPDConfig(BaseConfig):
    """Everything about a decomposition that does not depend on what is decomposed."""

    sites: dict[str, int]
    """module pattern (`fnmatch`) → number of subcomponents C"""
    losses: Losses
    importance: ImportanceConfig = MLPImportanceConfig()
    lower_leak: LowerLeak = "both"
    steps: int = Field(ge=1)
    lr: float = Field(gt=0.0, allow_inf_nan=False)
    lr_schedule: ScheduleConfig = ScheduleConfig()
    seed: int = Field(default=0, ge=0)
    compile: Literal["auto"] | bool = "auto"
    metrics: Metrics = {}
    figures: Figures = {}
    figures_every: int | None = Field(default=None, ge=1)
    """besides at the end"""
    n_eval_batches: int = Field(default=4, ge=1)
    log_every: int = Field(default=100, ge=1)
    eval_every: int = Field(default=1000, ge=1)
    save_every: int = Field(default=5000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)

    @field_validator("losses")
    @classmethod
    def _some_loss(cls, losses: Losses) -> Losses:
        if not any(spec.coeff > 0 for spec in losses.values()):
            raise ValueError("at least one needs a coefficient above 0")
        return losses


class Objective(nn.Module):
    """The step as a pure callable: (batch, progress, noise) → (total, terms). This is what is compiled."""

    def __init__(self, model: ComponentModel, config: SPDConfig, problem: Problem) -> None:
        super().__init__()
        self.model = model
        self.losses = {name: spec for name, spec in config.losses.items() if spec.coeff > 0}
        self.recon: ReconKind = problem.recon
        self._leading_shapes: dict[torch.Size, dict[str, torch.Size]] = {}

    def context(
        self, batch: Tensor, progress: Tensor, noise: Noise, row_weights: Tensor | None = None
    ) -> StepContext:
        target_out, site_inputs = self.model.target_forward(batch)
        ci = self.model.causal_importances(site_inputs)
        return StepContext(
            self.model,
            batch,
            target_out,
            site_inputs,
            ci,
            self.recon,
            noise,
            progress,
            row_weights,
        )

    def forward(
        self, batch: Tensor, progress: Tensor, noise: Noise, row_weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ coefficient × term, and what is worth logging (detached)."""
        ctx = self.context(batch, progress, noise, row_weights)
        terms = loss_terms(self.losses, ctx)
        total = torch.stack([self.losses[name].coeff * term for name, term in terms.items()]).sum()
        logged = {"loss/total": total.detach()}
        logged |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        for path, g in ctx.ci.lower.items():
            logged[f"l0/{path}"] = ctx.mean((g.detach() > L0_THRESHOLD).float().sum(dim=-1))
        return total, logged

    def draw_noise(self, batch: Tensor, *, stream: str, seed: int, step: int) -> dict[str, Tensor]:
        """All uniform draws of one step; each depends on (stream, seed, step, term, sample, site) alone."""
        generator = torch.Generator(device=batch.device)
        noise = {}
        for term, spec in self.losses.items():
            for sample in range(spec.n_noise_samples):
                for path, rows in self._rows(batch).items():
                    key = noise_key(term, sample, path)
                    generator.manual_seed(derive_seed(stream, seed, step, key))
                    shape = (*rows, self.model.sites[path].C)
                    noise[key] = torch.rand(shape, generator=generator, device=batch.device)
        return noise

    def _rows(self, batch: Tensor) -> dict[str, torch.Size]:
        """The shape of each site's importances without C, found by one forward pass per batch shape."""
        if batch.shape not in self._leading_shapes:
            inputs = self.model.target_forward(batch).site_inputs
            self._leading_shapes[batch.shape] = {
                path: x.shape[:-1] if x.is_floating_point() else x.shape
                for path, x in inputs.items()
            }
        return self._leading_shapes[batch.shape]


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
    )
    objective = Objective(model, config, problem)
    for spec in objective.losses.values():
        spec.check(model)
    eval_batches = list(islice(problem.eval_batches, config.n_eval_batches))
    if len(eval_batches) < config.n_eval_batches:
        raise UserError(
            f"n_eval_batches: {config.n_eval_batches} are wanted, but the held-out data ended after"
            f" {len(eval_batches)}"
        )
    silent_rows = SilentRows(model, problem, eval_batches)
    prepared = Prepared(problem, config, objective, eval_batches, silent_rows)
    build_metrics(prepared)
    for spec in config.figures.values():
        spec.build(model, problem)
    return prepared


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
    parameters = objective.model.subcomponent_parameters().values()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    state = _restore(prepared, optimizer, checkpoints) if resume and checkpoints else {}
    start = state.get("step", 0)
    step_fn = CompiledStep(objective, state.get("compiled", config.compile), config.steps)
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
        noise = objective.draw_noise(batch, stream="train", seed=config.seed, step=step)
        progress = torch.tensor(step / config.steps, device=batch.device)

        # ---- the training step
        total, terms = step_fn(batch, progress, noise, row_weights)
        total.backward()
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
        noise = objective.draw_noise(batch, stream="eval", seed=config.seed, step=index)
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
