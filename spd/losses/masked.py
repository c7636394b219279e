"""D under masks whose sources are named: uniform draws, adversaries that climb, or both in one pass."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from spd.config import BaseConfig, UserError
from spd.losses.spec import LossSpec, StepContext, state_key
from spd.masks import Mask, SiteMask, stochastic_mask, uniform_k_subsets
from spd.schedule import ScheduledShare, value_at
from spd.sources import (
    COUNTS,
    AdamAscent,
    Scope,
    kept_names,
    source_name,
    source_shape,
    to_slots,
)

Routing = Literal["uniform_k"]
Sources = dict[str, Tensor]
ROUTING = "routing"
ADVERSARIAL = "adversarial"


# --- masks of given sources --------------------------------------------------------------------------


def masked_by(
    g: Float[Tensor, "*rows C"], r: Float[Tensor, "*#rows channels"], *, delta: bool
) -> SiteMask:
    """m = g + (1 − g) r of the first C channels; with `delta` the last is δ, as it is."""
    C = g.shape[-1]
    m = stochastic_mask(g, r[..., :C])
    return SiteMask(m, r[..., C].expand(g.shape[:-1]) if delta else None)


def adversarial_masks(
    g: Callable[[str], Tensor], sources: Mapping[str, Tensor], *, delta: bool
) -> dict[str, SiteMask]:
    """Of all sites, everywhere."""
    return {path: masked_by(g(path), r, delta=delta) for path, r in sources.items()}


def uniform_mask(ctx: StepContext, path: str, *, delta: bool, sample: int = 0) -> SiteMask:
    """From this term's draws."""
    g = ctx.ci.lower[path]
    m = stochastic_mask(g, ctx.uniform(sample, path))
    return SiteMask(m, ctx.draw(delta_name(sample, path)) if delta else None)


def delta_name(sample: int, path: str) -> str:
    return f"delta.{sample}.{path}"


def uniform_draws(
    shapes: Mapping[str, torch.Size], *, n_samples: int, delta: bool, routing: Routing | None = None
) -> dict[str, torch.Size]:
    """What uniform masks are made of: of each sample for every site, with `routing` one joint draw."""
    found: dict[str, torch.Size] = {}
    for path, shape in shapes.items():
        for sample in range(n_samples):
            found[f"{sample}.{path}"] = shape
            if delta:
                found[delta_name(sample, path)] = shape[:-1]
    if routing is not None:
        found[ROUTING] = torch.Size((*_common_rows(shapes), len(shapes) + 1))
    return found


def _common_rows(shapes: Mapping[str, torch.Size]) -> torch.Size:
    """The rows of a batch, which all sites have."""
    rows = {path: shape[:-1] for path, shape in shapes.items()}
    (first, own), *others = rows.items()
    for path, other in others:
        if other.numel() != own.numel():
            raise UserError(
                f"routing: uniform_k chooses among the sites at every position, but {first!r} has"
                f" {own.numel()} positions in a batch and {path!r} {other.numel()}; null is allowed here"
            )
    return max(rows.values(), key=len)


def routes(ctx: StepContext) -> Callable[[str], Bool[Tensor, "*rows"]]:
    """Where each site is replaced, from the joint draw of this term."""
    chosen = uniform_k_subsets(ctx.draw(ROUTING))
    index = {path: i for i, path in enumerate(ctx.model.sites)}

    def of(path: str) -> Bool[Tensor, "*rows"]:
        return chosen[..., index[path]].reshape(ctx.ci.lower[path].shape[:-1])

    return of


def of_examples(
    values: Float[Tensor, " examples"] | Bool[Tensor, " examples"], rows: torch.Size
) -> Tensor:
    """The value of its example for every position."""
    per_example = rows.numel() // len(values)
    return values[:, None].expand(-1, per_example).reshape(rows)


# --- where sources come from --------------------------------------------------------------------------


class Uniform(BaseConfig):
    """r ~ U(0, 1) at every position of every site, drawn anew in every step."""

    type: Literal["uniform"] = "uniform"
    routing: Routing | None = None
    """`uniform_k`: at every position by itself k of the sites are masked, k uniform, the others frozen"""

    @property
    def ascent(self) -> AdamAscent | None:
        return None

    def draws(self, shapes: Mapping[str, torch.Size], *, delta: bool) -> dict[str, torch.Size]:
        return uniform_draws(shapes, n_samples=1, delta=delta, routing=self.routing)

    def masks(self, ctx: StepContext, *, delta: bool) -> Mapping[str, Mask]:
        route = None if self.routing is None else routes(ctx)

        def make(path: str) -> SiteMask:
            mask = uniform_mask(ctx, path, delta=delta)
            return mask if route is None else mask._replace(routed=route(path))

        return ctx.masks(make)


class FreshPGD(BaseConfig):
    """r ~ U(0, 1) anew in every step, then `n_steps` times r ← clamp(r + η sign ∂D/∂r, 0, 1).

    V, U and g are fixed meanwhile, and all sites are masked.
    """

    type: Literal["pgd"] = "pgd"
    scope: Scope = "c"
    n_steps: int = Field(default=20, ge=1, le=10_000)
    step_size: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)

    @property
    def ascent(self) -> AdamAscent | None:
        return None

    def draws(self, shapes: Mapping[str, torch.Size], *, delta: bool) -> dict[str, torch.Size]:
        return {
            source_name(path): source_shape(self.scope, shape[:-1], shape[-1])
            for path, shape in shapes.items()
        }

    def masks(self, ctx: StepContext, *, delta: bool) -> Mapping[str, Mask]:
        sources = {path: ctx.draw(source_name(path)) for path in ctx.model.sites}
        for _ in range(self.n_steps):
            slopes = ctx.slopes(lambda r: adversarial_error(ctx, r, delta=delta), sources)
            if "b" not in self.scope:
                slopes = agreed(ctx, slopes)
            sources = {
                path: (r + self.step_size * slopes[path].sign()).clamp(0.0, 1.0)
                for path, r in sources.items()
            }
        return ctx.masks(lambda path: masked_by(ctx.ci.lower[path], sources[path], delta=delta))


class Persistent(AdamAscent):
    """Sources that are kept from step to step, each of which climbs D further; all sites are masked."""

    type: Literal["persistent"] = "persistent"

    @property
    def ascent(self) -> AdamAscent | None:
        return self

    def draws(self, shapes: Mapping[str, torch.Size], *, delta: bool) -> dict[str, torch.Size]:
        return {}

    def masks(self, ctx: StepContext, *, delta: bool) -> Mapping[str, Mask]:
        sources = ctx.sources()
        return ctx.masks(lambda path: masked_by(ctx.ci.lower[path], sources[path], delta=delta))


class Merged(AdamAscent):
    """Of the examples of a batch some have persistent sources, the others uniform ones, in one pass.

    In expectation `adv_fraction` times the persistent term and the rest of the uniform one. Ascents before
    a step take all examples as adversarial.
    """

    type: Literal["merged"] = "merged"
    adv_fraction: ScheduledShare = 0.5
    """the probability with which an example is adversarial, all its positions together"""
    routing: Routing | None = "uniform_k"
    """of the others"""

    @property
    def ascent(self) -> AdamAscent | None:
        return self

    def draws(self, shapes: Mapping[str, torch.Size], *, delta: bool) -> dict[str, torch.Size]:
        return uniform_draws(shapes, n_samples=1, delta=delta, routing=self.routing)

    def masks(self, ctx: StepContext, *, delta: bool) -> Mapping[str, Mask]:
        sources = ctx.sources()
        chosen = ctx.draw(ADVERSARIAL) < value_at(self.adv_fraction, ctx.progress)
        route = None if self.routing is None else routes(ctx)

        def make(path: str) -> SiteMask:
            g = ctx.ci.lower[path]
            rows = g.shape[:-1]
            adversarial = of_examples(chosen, rows)
            r = torch.where(
                adversarial[..., None], sources[path], _uniform_source(ctx, path, delta)
            )
            mask = masked_by(g, r, delta=delta)
            return mask if route is None else mask._replace(routed=adversarial | route(path))

        return ctx.masks(make)


def _uniform_source(ctx: StepContext, path: str, delta: bool) -> Float[Tensor, "*rows channels"]:
    components = ctx.uniform(0, path)
    last = ctx.draw(delta_name(0, path)) if delta else torch.zeros_like(components[..., 0])
    return torch.cat([components, last[..., None]], dim=-1)


def adversarial_error(ctx: StepContext, sources: Sources, *, delta: bool) -> Float[Tensor, ""]:
    """D as a function of the sources alone: g is fixed, every site masked everywhere."""

    def make(path: str) -> SiteMask:
        return masked_by(ctx.ci.lower[path].detach(), sources[path], delta=delta)

    return ctx.masked_error(ctx.masks(make))


def agreed(ctx: StepContext, slopes: Sources) -> Sources:
    """The mean over the processes, of sources that they share."""
    if ctx.over_processes is None:
        return slopes
    return {path: ctx.over_processes(slope) for path, slope in slopes.items()}


Source = Annotated[Uniform | FreshPGD | Persistent | Merged, Field(discriminator="type")]


class MaskedRecon(LossSpec):
    """D(all sites masked from sources of one kind, target)."""

    type: Literal["masked_recon"] = "masked_recon"
    source: Source
    delta: bool = True
    """whether the remainder W − V U of each site is part of the pass, under a source of its own"""

    @property
    def ascent(self) -> AdamAscent | None:
        return self.source.ascent

    def draws(self, shapes: Mapping[str, torch.Size], n_examples: int) -> dict[str, torch.Size]:
        found = self.source.draws(shapes, delta=self.delta)
        if isinstance(self.source, Merged):
            found[ADVERSARIAL] = torch.Size((n_examples,))
        return found

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        yield ctx.masked_error(self.source.masks(ctx, delta=self.delta))

    def climbed_error(self, ctx: StepContext, sources: Sources) -> Float[Tensor, ""]:
        return adversarial_error(ctx, sources, delta=self.delta)

    def next_state(self, ctx: StepContext) -> dict[str, Tensor]:
        """What was carried into the step, warm-ups included; its last ascent comes after the gradients."""
        if self.ascent is None:
            return {}
        names = [name for path in ctx.model.sites for name in kept_names(path)]
        return {name: ctx.carried(name) for name in (*names, *COUNTS)}


# --- ascents ------------------------------------------------------------------------------------------


def ascended(losses: Mapping[str, LossSpec], ctx: StepContext) -> StepContext:
    """The same with the sources of all adversaries after the ascents that come before a step."""
    if all(spec.ascent is None for spec in losses.values()):
        return ctx
    state = dict(ctx.state)
    for term, spec in losses.items():
        ascent = spec.ascent
        if ascent is None:
            continue
        for _ in range(ascent.n_warmup):
            own = ctx._replace(term=term, state=state, probes={})
            slopes = own.slopes(lambda r: spec.climbed_error(own, r), own.sources())  # noqa: B023
            state |= _moved(ascent, own, slopes, 1.0)
    return ctx._replace(state=state)


@torch.no_grad()
def last_ascents(
    losses: Mapping[str, LossSpec], ctx: StepContext, slopes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is carried on, after the ascent by the gradients of the step itself.

    `slopes` are those of the total, under the keys that the sources have in the state.
    """
    state = dict(ctx.state)
    for term, spec in losses.items():
        if spec.ascent is None:
            continue
        own = ctx._replace(term=term, state=state)
        found = {path: slopes[state_key(term, source_name(path))] for path in ctx.model.sites}
        state |= _moved(spec.ascent, own, found, 1.0 / spec.graph_coefficient(ctx.progress))
    return state


def _moved(
    ascent: AdamAscent, ctx: StepContext, slopes: Sources, factor: float | Tensor
) -> dict[str, Tensor]:
    """A term's part of the state after one update.

    The slopes of D, a mean over the data, times `factor`, become those of the sum over slots of the means
    over the data of each.
    """
    term, model = ctx.term, ctx.model
    names = [name for path in model.sites for name in kept_names(path)]
    kept = {name: ctx.carried(name) for name in (*names, *COUNTS)}
    summed = {}
    for path, slope in slopes.items():
        shape = kept[source_name(path)].shape
        whole = to_slots(slope, ctx.slots, shape[0]) if ascent.by_example else slope
        summed[path] = whole * (shape[:-1].numel() * factor)
    if not ascent.by_example:
        summed = agreed(ctx, summed)
    moved = ascent.moved(kept, summed, ctx.progress)
    return {state_key(term, name): value for name, value in moved.items()}
