"""The step as a pure callable: batch, progress, noise and state in; total, terms and new state out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, TargetOutput
from spd.importance import CausalImportances
from spd.losses import Loss, Noise, State, StepContext, loss_terms, noise_key, state_key
from spd.metrics import L0_THRESHOLD
from spd.noise import Share, StepNoise
from spd.problem import Batch, ReconKind

ALL_ROWS = Share()


class Objective(nn.Module):
    """The step as a pure callable. This is what is compiled, or mapped over many seeds.

    Nothing outlives the call: what terms carry from step to step is an argument and a result.
    """

    def __init__(
        self,
        model: ComponentModel,
        losses: Mapping[str, Loss],
        recon: ReconKind,
        position_weights: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.losses = {name: spec for name, spec in losses.items() if spec.is_on}
        self.recon: ReconKind = recon
        self.position_weights = position_weights
        self.over_processes: Callable[[Tensor], Tensor] | None = None
        """mean over the processes that have the rows of a training step among them; None: there is one"""
        self._rows_of_shape: dict[Any, dict[str, torch.Size]] = {}

    def context(
        self,
        batch: Batch,
        progress: Tensor,
        noise: Noise,
        row_weights: Tensor | None = None,
        state: State | None = None,
    ) -> StepContext:
        """What the losses are computed from, the target's pass and the importances included."""
        target = self.model.target_forward(batch)
        ci = self.model.causal_importances(target.site_inputs)
        return self.context_of(target, ci, batch, progress, noise, row_weights, state)

    def context_of(
        self,
        target: TargetOutput,
        ci: CausalImportances,
        batch: Batch,
        progress: Tensor,
        noise: Noise,
        row_weights: Tensor | None = None,
        state: State | None = None,
    ) -> StepContext:
        """The same, of a pass and importances that are there already."""
        if row_weights is None and self.position_weights is not None:
            row_weights = self.position_weights(batch)
        return StepContext(
            model=self.model,
            batch=batch,
            # once for all passes, which compare with probabilities
            target_out=target.output.log_softmax(dim=-1) if self.recon == "kl" else target.output,
            site_inputs=target.site_inputs,
            ci=ci,
            recon=self.recon,
            noise=noise,
            progress=progress,
            row_weights=row_weights,
            state=state or {},
        )

    def forward(
        self,
        batch: Batch,
        progress: Tensor,
        noise: Noise,
        row_weights: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Σ coefficient × term, what is worth logging (detached), and the state for the next step."""
        ctx = self.context(batch, progress, noise, row_weights, state)
        ctx = ctx._replace(over_processes=self.over_processes)
        terms = loss_terms(self.losses, ctx)
        total = torch.stack(
            [self.losses[name].coefficient(progress) * term for name, term in terms.items()]
        ).sum()
        return total, self.logged(ctx, total, terms), self.next_state(ctx)

    def initial_state(self) -> dict[str, Tensor]:
        """What all terms carry from step to step, before the first."""
        return {
            state_key(term, name): value
            for term, spec in self.losses.items()
            for name, value in spec.initial_state(self.model).items()
        }

    @torch.no_grad()
    def next_state(self, ctx: StepContext) -> dict[str, Tensor]:
        """The same after the step that `ctx` belongs to."""
        return {
            state_key(term, name): value
            for term, spec in self.losses.items()
            for name, value in spec.next_state(ctx._replace(term=term)).items()
        }

    def logged(
        self, ctx: StepContext, total: Tensor, terms: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is worth logging of a step, detached: the total, the terms, and L0 of every site."""
        logged = {"loss/total": total.detach()}
        logged |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        for path, g in ctx.ci.lower.items():
            logged[f"l0/{path}"] = ctx.mean((g.detach() > L0_THRESHOLD).float().sum(dim=-1))
        return logged

    def noise(
        self, batch: Batch, *, stream: str, seed: int, step: int, share: Share = ALL_ROWS
    ) -> StepNoise:
        """All uniform draws of one step; each depends on (stream, seed, step, term, sample, site) alone.

        With a `share`, what the draws for the joint batch hold for its rows.
        """
        shapes: dict[str, torch.Size] = {}
        own: dict[str, slice] = {}
        shared = self._shared_by_examples(batch) if share.of > 1 else set()
        for path, rows in self._rows(batch).items():
            for term, spec in self.losses.items():
                for sample in range(spec.n_noise_samples):
                    key = noise_key(term, sample, path)
                    shapes[key] = torch.Size((*rows, self.model.sites[path].C))
                    if share.of > 1 and path not in shared:
                        own[key] = share.rows(rows[0])
        return StepNoise(shapes, batch.device, stream=stream, seed=seed, step=step, rows=own)

    def draw_noise(self, batch: Batch, *, stream: str, seed: int, step: int) -> dict[str, Tensor]:
        """The same, all at once."""
        return dict(self.noise(batch, stream=stream, seed=seed, step=step))

    def _rows(self, batch: Batch) -> dict[str, torch.Size]:
        """The shape of each site's importances without C, as the target's pass over such a batch has it."""
        if batch.shape not in self._rows_of_shape:
            inputs = self.model.target_forward(batch).site_inputs
            self._rows_of_shape[batch.shape] = {
                path: self.model.sites[path].rows(x) for path, x in inputs.items()
            }
        return self._rows_of_shape[batch.shape]

    def _shared_by_examples(self, batch: Batch) -> set[str]:
        """The sites that have the same rows whatever the number of examples, as of positions."""
        other = batch[:1] if len(batch) > 1 else batch[[0, 0]]
        rows_of_other = self._rows(other)
        return {path for path, rows in self._rows(batch).items() if rows == rows_of_other[path]}
