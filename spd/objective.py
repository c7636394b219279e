"""The step as a pure callable: batch, progress, noise and state in; total, terms and new state out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spd.component_model import ComponentModel, TargetOutput
from spd.config import UserError
from spd.importance import CausalImportances
from spd.losses import (
    Loss,
    Noise,
    State,
    StepContext,
    ascended,
    last_ascents,
    loss_terms,
    state_key,
)
from spd.metrics import L0_THRESHOLD
from spd.noise import Share, StepNoise
from spd.problem import Batch, ReconKind
from spd.sources import draw_sources, kept_names, source_name, source_shape

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
        slots: Tensor | None = None,
        probes: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Σ coefficient × term, what is worth logging (detached), and the state for the next step.

        With adversaries that state is not the next step's yet: `climb` takes it there, by the gradients of
        `probes`.
        """
        ctx = self.context(batch, progress, noise, row_weights, state)
        ctx = ctx._replace(
            over_processes=self.over_processes, slots=slots, probes=probes or {}, functional=True
        )
        ctx = ascended(self.losses, ctx)
        terms = loss_terms(self.losses, ctx)
        total = torch.stack(
            [self.losses[name].graph_coefficient(progress) * term for name, term in terms.items()]
        ).sum()
        return total, self.logged(ctx, total, terms), self.next_state(ctx)

    @torch.no_grad()
    def climb(
        self,
        state: State,
        slopes: Mapping[str, Tensor],
        progress: Tensor,
        slots: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The state after the last ascent of a step, by the gradients of its total in all sources."""
        ctx = StepContext(
            model=self.model,
            batch=progress,
            target_out=progress,
            site_inputs={},
            ci=CausalImportances({}, {}),
            recon=self.recon,
            noise={},
            progress=progress,
            state=state,
            over_processes=self.over_processes,
            slots=slots,
        )
        return last_ascents(self.losses, ctx, slopes)

    def initial_state(self) -> dict[str, Tensor]:
        """What all terms carry from step to step, before the first."""
        return {
            state_key(term, name): value
            for term, spec in self.losses.items()
            for name, value in spec.initial_state(self.model).items()
        }

    @property
    def kept_by_example(self) -> set[str]:
        """Which entries of the state have the examples of a batch along their first axis."""
        return {
            state_key(term, name)
            for term, spec in self.losses.items()
            if spec.ascent is not None and spec.ascent.by_example
            for path in self.model.sites
            for name in kept_names(path)
        }

    @property
    def source_keys(self) -> list[str]:
        """Which entries of the state are sources of adversaries."""
        return [
            state_key(term, source_name(path))
            for term, spec in self.losses.items()
            if spec.ascent is not None
            for path in self.model.sites
        ]

    def source_shapes(self, batch: Batch) -> dict[str, torch.Size]:
        """Their shapes for such a batch, by the key in the state."""
        return {
            state_key(term, source_name(path)): shape
            for term, spec in self.losses.items()
            if spec.ascent is not None
            for path, shape in self._source_shapes(term, spec, batch).items()
        }

    def probes(self, state: State, slots: Tensor | None = None) -> dict[str, Tensor]:
        """Zeros of the shape of the sources that the rows of a batch have, to take gradients by.

        Of several runs side by side everything has an axis more, the first.
        """
        by_example, found = self.kept_by_example, {}
        for key in self.source_keys:
            shape = [*state[key].shape]
            if slots is not None and key in by_example:
                shape[slots.dim() - 1] = slots.shape[-1]
            found[key] = state[key].new_zeros(shape).requires_grad_()
        return found

    def begun(
        self,
        state: State,
        batch: Batch,
        *,
        seed: int,
        share: Share = ALL_ROWS,
        training: bool = True,
    ) -> State:
        """The state with the sources of all adversaries, which are drawn for the first batch that comes.

        `batch` is the joint one, of which this process has a share. A batch on which nothing is trained
        takes the sources of the slots in turn.
        """
        new = dict(state)
        for term, spec in self.losses.items():
            if spec.ascent is None:
                continue
            expected = self._source_shapes(term, spec, batch)
            if state_key(term, source_name(next(iter(expected)))) not in state:
                own = share if spec.ascent.by_example else ALL_ROWS
                drawn = {
                    path: draw_sources(shape, batch.device, own, seed, term, path)
                    for path, shape in expected.items()
                }
                kept = spec.ascent.begun(drawn)
                new |= {state_key(term, name): value for name, value in kept.items()}
                continue
            n_processes = share.of if spec.ascent.by_example else 1
            for path, shape in expected.items():
                for name in kept_names(path):
                    key = state_key(term, name)
                    kept_for = (new[key].shape[0] * n_processes, *new[key].shape[1:])
                    if kept_for == shape:
                        continue
                    if not training:
                        new[key] = _taken_in_turn(new[key], shape)
                        continue
                    raise UserError(
                        f"losses.{term}.source.scope: {spec.ascent.scope} keeps sources for batches of one"
                        f" size, and after {_size(kept_for)} a batch of {_size(shape)} came; a constant"
                        " size, or scope c, is allowed"
                    )
        return new

    def _source_shapes(self, term: str, spec: Loss, batch: Batch) -> dict[str, torch.Size]:
        ascent = spec.ascent
        assert ascent is not None
        shapes = {}
        for path, rows in self._rows(batch).items():
            if ascent.scope != "c" and (not rows or rows[0] != len(batch)):
                raise UserError(
                    f"losses.{term}.source.scope: {ascent.scope} needs sites with rows for each example"
                    f" of a batch, and {path!r} has none of its own for each; c is allowed"
                )
            with _about(f"losses.{term}.source"):
                shapes[path] = source_shape(ascent.scope, rows, self.model.sites[path].C)
        return shapes

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
        shapes = self._draws(batch)
        own: dict[str, slice] = {}
        if share.of > 1:
            others = self._draws(batch[:1] if len(batch) > 1 else batch[[0, 0]])
            # what has the same shape whatever the number of examples, as of positions, all share
            own = {key: share.rows(s[0]) for key, s in shapes.items() if others[key] != s}
        return StepNoise(shapes, batch.device, stream=stream, seed=seed, step=step, rows=own)

    def _draws(self, batch: Batch) -> dict[str, torch.Size]:
        """The shape of every uniform draw of a step, by its key."""
        sites = self.model.sites
        of_importances = {
            path: torch.Size((*rows, sites[path].C)) for path, rows in self._rows(batch).items()
        }
        found: dict[str, torch.Size] = {}
        for term, spec in self.losses.items():
            with _about(f"losses.{term}.source"):
                own = spec.draws(of_importances, len(batch))
            found |= {state_key(term, name): shape for name, shape in own.items()}
        return found

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


@contextmanager
def _about(place: str) -> Iterator[None]:
    """A mistake that is found within names the place in the configuration."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}.{error}") from None


def _taken_in_turn(kept: Tensor, shape: torch.Size) -> Tensor:
    """Of what is kept for each slot and position, that of the first again after the last."""
    for axis, n in enumerate(shape):
        if kept.shape[axis] != n:
            places = torch.arange(n, device=kept.device) % kept.shape[axis]
            kept = kept.index_select(axis, places)
    return kept


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape[:-1]))
