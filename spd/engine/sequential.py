"""The backward pass of a step, one forward pass after another.

In one graph (`Objective.forward`, which is what is compiled) the passes share what they have in common,
and memory grows with their number. Here each has a graph of its own that is gone before the next begins.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from spd.engine.compilation import CompiledStep
from spd.engine.layers import SharedPrefix
from spd.importance import CausalImportances
from spd.kernels import KLKernel, kl_and_gradient
from spd.losses import Loss, Noise, State, StepContext
from spd.objective import Objective
from spd.problem import Batch


class Sequential:
    """An objective whose passes go one after another: what its `forward` and the backward pass do, in the
    memory of one forward pass.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.prefix = SharedPrefix(objective.model)
        self.kl_kernel: KLKernel | None = None

    def __call__(
        self,
        batch: Batch,
        progress: Tensor,
        noise: Noise,
        row_weights: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradient of the total to the parameters; what is worth logging, and the new state."""
        model = self.objective.model
        with self.prefix.kept(batch) as target:
            with torch.no_grad():
                logits = model.importance_logits(target.site_inputs)
            leaves = {path: x.requires_grad_() for path, x in logits.items()}
            ci = CausalImportances.of_logits(leaves, model.lower_leak, lazy=True)
            ctx = self.objective.context_of(target, ci, batch, progress, noise, row_weights, state)
            ctx = ctx._replace(
                run=self.prefix.forward,
                recompute_masks=not self.prefix.compiled,
                kl_kernel=self.kl_kernel,
                over_processes=self.objective.over_processes,
            )
            del target  # whose logits the context holds in another form
            losses = self.objective.losses
            terms = backward_one_by_one(losses, ctx, leaves)
            weighted = [losses[name].coefficient(progress) * term for name, term in terms.items()]
            logged = self.objective.logged(ctx, torch.stack(weighted).sum(), terms)
            return logged, self.objective.next_state(ctx)

    def compile_passes(self, compiled: bool) -> None:
        """Whether layers and divergence run compiled, from now on."""
        self.prefix.compiled = compiled
        self.kl_kernel = torch.compile(kl_and_gradient, dynamic=False) if compiled else None


class CompiledPasses(CompiledStep):
    """`Sequential`, each layer and the divergence compiled by themselves, or not.

    One graph of all passes takes long to compile and holds them all in memory. A graph of a layer serves
    every layer and pass in which the same of its sites are replaced. Arguments, `auto` and falling back
    are as in `CompiledStep`.
    """

    def __init__(self, objective: Objective, setting: Literal["auto"] | bool, n_steps: int) -> None:
        self.sequential = Sequential(objective)
        super().__init__(self.sequential, setting, n_steps)
        self.objective = objective

    @property
    def worthwhile_seconds(self) -> float:
        """A step takes four fifths of what it took, so it is longer before compiling pays."""
        return 8 * super().worthwhile_seconds

    def forward(self, *args: Any) -> Any:
        return self.objective(*args)

    def make_compiled(self) -> Callable[..., Any]:
        self.sequential.compile_passes(True)
        return self.eager

    def run_eagerly(self, *args: Any) -> Any:
        self.sequential.compile_passes(False)
        try:
            return self.eager(*args)
        finally:
            self.sequential.compile_passes(True)

    def go_back(self) -> None:
        self.sequential.compile_passes(False)
        for parameter in self.objective.model.subcomponent_parameters().values():
            parameter.grad = None  # of a step that did not come to its end


def backward_one_by_one(
    losses: Mapping[str, Loss], ctx: StepContext, logits: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add the gradient of Σ coefficient × term to the parameters; the unweighted terms, detached.

    Every part of a term goes back by itself, into V, U and `logits`, leaves that `ctx.ci` is made of:
    what the importance functions gave out. These follow at the end, each computed once more and fed
    with the sum of what arrived at its logits.
    """
    terms = {}
    for name, spec in losses.items():
        values = []
        for part in spec.parts(ctx._replace(term=name)):
            (spec.coefficient(ctx.progress) * part).backward()
            values.append(part.detach())
        terms[name] = torch.stack(values).sum()
    gradients = {path: leaf.grad for path, leaf in logits.items() if leaf.grad is not None}
    if gradients:
        ctx.model.backward_importances(ctx.site_inputs, gradients)
    return terms
