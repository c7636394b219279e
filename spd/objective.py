"""What is optimised: its configuration, and the step as a pure callable of batch, progress and noise."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from spd.component_model import ComponentModel, TargetOutput
from spd.config import BaseConfig
from spd.distributed import Share
from spd.divergence import KLKernel, kl_and_gradient
from spd.figures import Figures
from spd.importance import CausalImportances, ImportanceConfig, LowerLeak, MLPImportanceConfig
from spd.losses import Losses, Noise, StepContext, loss_terms, noise_key
from spd.metrics import L0_THRESHOLD, Metrics
from spd.noise import StepNoise
from spd.passes import Passes, backward_one_by_one
from spd.prefix import SharedPrefix
from spd.problem import Problem, ReconKind
from spd.schedule import ScheduleConfig

ALL_ROWS = Share()


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
    cuda_graphs: bool = True
    """on a GPU, launch a compiled step whose passes go together as a whole, with no gaps between kernels"""
    tf32: bool = False
    """on a GPU, multiply the matrices of a training step on its tensor cores, rounded (`spd.precision`)"""
    passes: Passes = "auto"
    """whether the masked forward passes of a step go back in one graph or `one_by_one`, with the same
    gradients: the first compiles as a whole, the second layer by layer, and needs the memory of one pass"""
    autocast: Literal["bf16"] | None = None
    """run the target and its replaced sites in mixed precision; importances and losses stay float32"""
    activation_checkpointing: bool = False
    """recompute the layers of a Hugging Face target in the backward pass; nothing is compiled then"""
    grad_clip: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """largest norm of the gradient of all parameters together"""
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


class _Step(NamedTuple):
    batch: Tensor
    progress: Tensor
    noise: Noise
    row_weights: Tensor | None


class Objective(nn.Module):
    """The step as a pure callable: (batch, progress, noise) → (total, terms). This is what is compiled."""

    def __init__(self, model: ComponentModel, config: SPDConfig, problem: Problem) -> None:
        super().__init__()
        self.model = model
        self.losses = {name: spec for name, spec in config.losses.items() if spec.coeff > 0}
        self.recon: ReconKind = problem.recon
        self.prefix = SharedPrefix(model)
        self.kl_kernel: KLKernel | None = None
        self._leading_shapes: dict[torch.Size, dict[str, tuple[torch.Size, bool]]] = {}

    def context(
        self, batch: Tensor, progress: Tensor, noise: Noise, row_weights: Tensor | None = None
    ) -> StepContext:
        target = self.model.target_forward(batch)
        ci = self.model.causal_importances(target.site_inputs)
        step = _Step(batch, progress, noise, row_weights)
        return self._context(step, target, ci)

    def _context(self, step: _Step, target: TargetOutput, ci: CausalImportances) -> StepContext:
        return StepContext(
            model=self.model,
            batch=step.batch,
            # once for all passes, which compare with probabilities
            target_out=target.output.log_softmax(dim=-1) if self.recon == "kl" else target.output,
            site_inputs=target.site_inputs,
            ci=ci,
            recon=self.recon,
            noise=step.noise,
            progress=step.progress,
            row_weights=step.row_weights,
        )

    def forward(
        self, batch: Tensor, progress: Tensor, noise: Noise, row_weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ coefficient × term, and what is worth logging (detached)."""
        ctx = self.context(batch, progress, noise, row_weights)
        return self._results(ctx, loss_terms(self.losses, ctx))

    def backward_one_by_one(
        self, batch: Tensor, progress: Tensor, noise: Noise, row_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What `forward` and the backward pass of its total do, in the memory of one forward pass."""
        with self.prefix.kept(batch) as target:
            with torch.no_grad():
                logits = self.model.importance_logits(target.site_inputs)
            leaves = {path: x.requires_grad_() for path, x in logits.items()}
            ci = CausalImportances.of_logits(leaves, self.model.lower_leak, lazy=True)
            ctx = self._context(_Step(batch, progress, noise, row_weights), target, ci)
            ctx = ctx._replace(
                prefix=self.prefix,
                recompute_masks=not self.prefix.compiled,
                kl_kernel=self.kl_kernel,
            )
            del target  # whose logits the context holds in another form
            _, logged = self._results(ctx, backward_one_by_one(self.losses, ctx, leaves))
            return logged

    def compile_passes(self, compiled: bool) -> None:
        """Whether `backward_one_by_one` runs layers and divergence compiled, from now on."""
        self.prefix.compiled = compiled
        self.kl_kernel = torch.compile(kl_and_gradient, dynamic=False) if compiled else None

    def _results(
        self, ctx: StepContext, terms: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.stack([self.losses[name].coeff * term for name, term in terms.items()]).sum()
        logged = {"loss/total": total.detach()}
        logged |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        for path, g in ctx.ci.lower.items():
            logged[f"l0/{path}"] = ctx.mean((g.detach() > L0_THRESHOLD).float().sum(dim=-1))
        return total, logged

    def noise(
        self, batch: Tensor, *, stream: str, seed: int, step: int, share: Share = ALL_ROWS
    ) -> StepNoise:
        """All uniform draws of one step; each depends on (stream, seed, step, term, sample, site) alone.

        With a `share`, what the draws for the joint batch hold for its rows.
        """
        shapes: dict[str, torch.Size] = {}
        own: dict[str, slice] = {}
        for path, (rows, per_example) in self._rows(batch).items():
            for term, spec in self.losses.items():
                for sample in range(spec.n_noise_samples):
                    key = noise_key(term, sample, path)
                    shapes[key] = torch.Size((*rows, self.model.sites[path].C))
                    if share.of > 1 and per_example:
                        own[key] = share.rows(rows[0])
        return StepNoise(shapes, batch.device, stream=stream, seed=seed, step=step, rows=own)

    def draw_noise(self, batch: Tensor, *, stream: str, seed: int, step: int) -> dict[str, Tensor]:
        """The same, all at once."""
        return dict(self.noise(batch, stream=stream, seed=seed, step=step))

    def _rows(self, batch: Tensor) -> dict[str, tuple[torch.Size, bool]]:
        """The shape of each site's importances without C, and whether every example has its own.

        Found once per batch shape, by running the target on two examples.
        """
        if batch.shape not in self._leading_shapes:
            two = batch[:2] if len(batch) > 1 else torch.cat([batch, batch])
            inputs = self.model.target_forward(two).site_inputs
            self._leading_shapes[batch.shape] = {
                path: _scaled(x.shape[:-1] if x.is_floating_point() else x.shape, len(batch))
                for path, x in inputs.items()
            }
        return self._leading_shapes[batch.shape]


def _scaled(rows_of_two: torch.Size, n_examples: int) -> tuple[torch.Size, bool]:
    """From what two examples give; one row for all of them, as of positions, stays one."""
    first, *rest = rows_of_two
    if first % 2:
        return rows_of_two, False
    return torch.Size((first // 2 * n_examples, *rest)), True
