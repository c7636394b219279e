"""One step of training: batches in, gradients set. How it is executed is chosen here, in one place."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from spd.component_model import ComponentModel
from spd.engine.compilation import CompiledSequel, CompiledStep, tf32_matmuls
from spd.engine.distributed import mean_over_processes, own_share
from spd.engine.ensemble import Alone, Ensemble, StepInputs
from spd.engine.experts import experts_in
from spd.engine.layers import layers_of
from spd.engine.sequential import CompiledPasses
from spd.engine.threads import one_for_a_light_step
from spd.losses import State
from spd.problem import Batch
from spd.spd_config import Execution, Passes, SPDConfig


@runtime_checkable
class Step(Protocol):
    """Adds the gradient of the total to the parameters; what is worth logging, and the new state."""

    @property
    def execution(self) -> CompiledStep:
        """Whether and for which shapes of batches it is compiled."""
        ...

    def __call__(self, inputs: StepInputs) -> tuple[dict[str, Tensor], State]: ...


class JointStep:
    """All passes of a step in one graph, which goes back as a whole."""

    def __init__(
        self, trained: Alone | Ensemble, execution: CompiledStep, *, tf32: bool, resumed: bool
    ) -> None:
        self.trained, self.execution, self.tf32 = trained, execution, tf32
        self.climb = CompiledSequel(trained.climb)
        self.threads_are_chosen = resumed  # by the checkpoint

    def __call__(self, inputs: StepInputs) -> tuple[dict[str, Tensor], State]:
        batch, progress, noise, row_weights, state, slots, _ = inputs
        objective = self.trained.objective
        probes = objective.probes(state, slots)
        args = (batch, progress, dict(noise), row_weights, state, slots, probes)
        if not self.threads_are_chosen and not batch.is_cuda:
            self.threads_are_chosen = True
            one_for_a_light_step(self.execution.forward, *args)
        with self.execution.explained(), tf32_matmuls(self.tf32):
            total, terms, new_state = self.execution(*args)
            total.backward()
            if probes:
                climbed = (new_state, slopes_of(probes), progress, slots)
                new_state |= self.climb(self.execution, args, *climbed)
        return terms, new_state


class SequentialStep:
    """One pass after another, each in a graph of its own: the same gradients, the memory of one pass."""

    def __init__(self, execution: CompiledPasses, *, tf32: bool) -> None:
        self.execution, self.tf32 = execution, tf32

    def __call__(self, inputs: StepInputs) -> tuple[dict[str, Tensor], State]:
        objective = self.execution.objective
        probes = objective.probes(inputs.state, inputs.slots)
        with tf32_matmuls(self.tf32):
            terms, state = self.execution(*inputs._replace(probes=probes))
        if probes:
            state |= objective.climb(state, slopes_of(probes), inputs.progress, inputs.slots)
        return terms, state


def slopes_of(probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the total in the sources; 0 where nothing depends on one."""
    return {
        key: torch.zeros_like(probe) if probe.grad is None else probe.grad
        for key, probe in probes.items()
    }


def make_step(
    trained: Alone | Ensemble,
    config: SPDConfig,
    batch: Batch,
    earlier: dict[str, Any],
    *,
    until: int | None = None,
) -> Step:
    """The step of a run, or of several side by side, on batches like this one.

    `earlier` is what a checkpoint kept of `execution_record`: a run keeps what was decided for it, unless
    there are more or fewer side by side now, which is another graph. Several go on `until` a step.
    """
    objective, alone = trained.objective, trained.n_members == 1
    objective.over_processes = mean_over_processes if own_share().of > 1 else None
    end = config.steps if until is None or alone else until
    n_steps = end - earlier.get("step", 0)
    if earlier.get("n_members", trained.n_members) != trained.n_members:
        earlier = {"step": earlier["step"]}
    may = may_compile(config.execution, objective.model)
    setting = earlier.get("compiled", config.execution.compile) if may else False
    tf32 = config.execution.tf32 and batch.is_cuda
    step: Step
    if passes_of(config.execution.passes, objective.model) == "together":
        execution = CompiledStep(
            trained.function,
            setting,
            n_steps,
            opaque=trained.opaque,
            n_members=trained.n_members,
            cuda_graphs=batch.is_cuda and config.execution.cuda_graphs,
        )
        step = JointStep(trained, execution, tf32=tf32, resumed=bool(earlier))
    else:
        passes = CompiledPasses(objective, setting, n_steps)
        passes.sequential.prefix.try_out(batch)
        step = SequentialStep(passes, tf32=tf32)
    step.execution.may_fall_back = config.execution.compile == "auto"
    step.execution.shapes = [*earlier.get("compiled_shapes", [])]
    step.execution.eager_shapes = [*earlier.get("eager_shapes", [])]
    return step


def execution_record(step: Step) -> dict[str, Any]:
    """What was decided about executing a run's steps, for its checkpoints."""
    execution = step.execution
    if execution.compiled is None:
        return {}
    return {
        "compiled": execution.compiled,
        "compiled_shapes": execution.shapes,
        "eager_shapes": execution.eager_shapes,
        "n_members": execution.n_members,
    }


def passes_of(setting: Passes, model: ComponentModel) -> Literal["together", "one_by_one"]:
    """`auto` is `one_by_one` for a Hugging Face model, whose layers passes can share, else `together`."""
    if setting == "auto":
        return "one_by_one" if layers_of(model.target) else "together"
    return setting


def may_compile(execution: Execution, model: ComponentModel) -> bool:
    """Whether there is something to compile of a step, whole or layer by layer.

    Experts as sites read more rows or less from batch to batch: no graph of a whole step fits them.
    """
    together = passes_of(execution.passes, model) == "together"
    if together and experts_in(model.target):
        return False
    return not execution.activation_checkpointing and (together or bool(layers_of(model.target)))
