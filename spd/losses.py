"""Every training loss: the formula as a free function, and the spec that names it in a configuration.

A spec yields its term in *parts*, one per forward pass, whose sum is the term: a caller may add them up
in one graph or run the backward pass of one after another.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from spd.component_model import ComponentModel, Site
from spd.config import (
    BY_TYPE,
    NAME_IS_TYPE,
    BaseConfig,
    UserError,
    nearest,
)
from spd.config.limits import Samples
from spd.importance import CausalImportances
from spd.kernels import KLKernel, kl_per_row
from spd.masks import Mask, SiteInput, stochastic_mask
from spd.minimality import Penalty, RunningMean, cost_of_estimate, frequency_cost, safe_power
from spd.problem import Batch, ReconKind
from spd.schedule import Scheduled, peak_of, value_at

Noise = Mapping[str, Tensor]
State = Mapping[str, Tensor]


class StepContext(NamedTuple):
    """Everything a loss may depend on."""

    model: ComponentModel
    batch: Batch
    target_out: Tensor
    """output of the unchanged target; with KL as recon, logits that are log-probabilities"""
    site_inputs: dict[str, SiteInput]
    """what the unchanged target feeds to each site"""
    ci: CausalImportances
    recon: ReconKind
    noise: Noise
    """uniform draws in [0, 1) under `noise_key(term, sample, site)`, shaped like that site's g"""
    progress: Tensor
    """fraction of the run that is over, a 0-d tensor"""
    row_weights: Tensor | None = None
    """one for each row of `batch`, or each of its positions, with mean 1: how many rows of the data it
    stands for; 0 for what does not count; None: one each"""
    state: State = {}
    """what terms carry from step to step, under `state_key(term, name)`"""
    term: str = ""
    """name of the loss that is being computed"""
    run: Callable[[Batch, Mapping[str, Mask | None] | None], Tensor] | None = None
    """runs the model under masks without computing again what they share; None: passes are whole"""
    recompute_masks: bool = False
    """make the masks of all sites anew in the backward pass, so that none is stored"""
    kl_kernel: KLKernel | None = None
    """what computes the KL divergence of masked passes, where it is compiled by itself"""
    over_processes: Callable[[Tensor], Tensor] | None = None
    """mean over the processes that have a batch among them; None: all of it is here"""

    def uniform(self, sample: int, site: str) -> Tensor:
        """This term's noise for one mask sample and site."""
        return self.noise[noise_key(self.term, sample, site)]

    def carried(self, name: str) -> Tensor:
        """What this term has kept under `name` since the step before."""
        return self.state[state_key(self.term, name)]

    def masks(self, make: Callable[[str], Tensor]) -> Mapping[str, Mask]:
        """`make(site)` for every site."""
        if self.recompute_masks:
            return {path: partial(make, path) for path in self.model.sites}
        return {path: make(path) for path in self.model.sites}

    def masked_error(self, masks: Mapping[str, Mask] | None = None) -> Float[Tensor, ""]:
        """D(output with these masks, target); None: all sites, all subcomponents on."""
        run = self.model if self.run is None else self.run
        prediction = run(self.batch, masks)
        return recon_error(
            prediction,
            self.target_out,
            self.recon,
            self.row_weights,
            normalized=True,
            kernel=self.kl_kernel,
        )

    def mean(self, values: Float[Tensor, "*rows"]) -> Float[Tensor, ""]:
        """Mean over batch and positions; what every term that is a mean over the data must use."""
        return mean_over_rows(values, self.row_weights)

    def frequencies(self, values: Float[Tensor, "*rows C"]) -> Float[Tensor, " C"]:
        """Mean over batch and positions of each column, those of all processes together.

        The gradient is that of the rows that are here, of which the loop takes the mean over processes.
        """
        own = mean_of_columns(values, self.row_weights)
        if self.over_processes is None:
            return own
        return own + (self.over_processes(own.detach()) - own.detach())

    def counted(self, values: Float[Tensor, "*rows C"]) -> Float[Tensor, "_n C"]:
        """The rows of a site's importances that count: those whose weight is not 0."""
        rows, weights = values.reshape(-1, values.shape[-1]), self.row_weights
        if weights is None or weights.numel() != len(rows):
            return rows
        return rows[weights.flatten() > 0]


def state_key(term: str, name: str) -> str:
    """Where the state of a step has what a term keeps under `name`."""
    return f"{term}.{name}"


def noise_key(term: str, sample: int, site: str) -> str:
    return f"{term}.{sample}.{site}"


# --- the mathematics -------------------------------------------------------------------------------


def mean_over_rows(
    values: Float[Tensor, "*rows"], weights: Float[Tensor, "*leading"] | None = None
) -> Float[Tensor, ""]:
    """Mean over batch and positions; `weights`, one for each row or position of the batch, have mean 1."""
    if weights is None:
        return values.mean()
    if weights.numel() == values.numel():  # a site may see batch and positions as one axis
        return (values * weights.reshape(values.shape)).mean()
    return (values * weights.reshape(*weights.shape, *[1] * (values.dim() - weights.dim()))).mean()


def mean_of_columns(
    values: Float[Tensor, "*rows C"], weights: Float[Tensor, "*leading"] | None = None
) -> Float[Tensor, " C"]:
    """The same of each column by itself."""
    rows = values.reshape(-1, values.shape[-1])
    if weights is None:
        return rows.mean(dim=0)
    flat = weights.reshape(*weights.shape, *[1] * (values.dim() - 1 - weights.dim()))
    if weights.numel() != len(rows):
        flat = flat.expand(values.shape[:-1])
    return (rows * flat.reshape(-1, 1)).mean(dim=0)


def recon_error(
    prediction: Float[Tensor, "*rows d"],
    target: Float[Tensor, "*rows d"],
    kind: ReconKind,
    weights: Float[Tensor, "*leading"] | None = None,
    *,
    normalized: bool = False,
    kernel: KLKernel | None = None,
) -> Float[Tensor, ""]:
    """D: mean squared error over every element, or KL(target ‖ prediction) of logits, mean over rows."""
    if kind == "kl":
        rows = kl_per_row(prediction, target, normalized=normalized, kernel=kernel)
        return mean_over_rows(rows, weights)
    if weights is None:
        return (prediction - target).square().mean()
    return mean_over_rows((prediction - target).square().mean(dim=-1), weights)


def recon_errors(
    prediction: Float[Tensor, "*rows d"], target: Float[Tensor, "*rows d"], kind: ReconKind
) -> Float[Tensor, "*rows"]:
    """D of every row by itself; with KL both are logits."""
    if kind == "kl":
        return kl_per_row(prediction, target)
    return (prediction - target).square().mean(dim=-1)


def kl_divergence(
    logits: Float[Tensor, "*rows d"],
    target_logits: Float[Tensor, "*rows d"],
    weights: Float[Tensor, "*leading"] | None = None,
) -> Float[Tensor, ""]:
    """KL(target ‖ prediction) over the last axis, mean over the rest."""
    return mean_over_rows(kl_per_row(logits, target_logits), weights)


def faithfulness(sites: Mapping[str, Site]) -> Float[Tensor, ""]:
    """(1/N) Σ_l ‖W^l − Σ_c U_c V_cᵀ‖²_F with N the number of entries of all W^l (paper, section 2)."""
    errors, n_entries = [], 0
    for site in sites.values():
        weight = site.target_weight
        errors.append((weight - site.subcomponents.V @ site.subcomponents.U).square().sum())
        n_entries += weight.numel()
    return torch.stack(errors).sum() / n_entries


def relative_faithfulness(sites: Mapping[str, Site]) -> Float[Tensor, ""]:
    """Mean over the sites of ‖W − V U‖²_F / ‖W‖²_F."""
    errors = []
    for site in sites.values():
        weight = site.target_weight
        error = weight - site.subcomponents.V @ site.subcomponents.U
        errors.append(error.square().sum() / weight.float().square().sum())
    return torch.stack(errors).mean()


def importance_minimality(
    upper: Mapping[str, Float[Tensor, "*rows _C"]],
    pnorm: float,
    weights: Float[Tensor, "*leading"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over batch and positions of Σ_l Σ_c g^p (paper, section 2)."""
    sums = [safe_power(g, pnorm).sum(dim=-1) for g in upper.values()]
    return torch.stack([mean_over_rows(values, weights) for values in sums]).sum()


def schatten(
    upper: Mapping[str, Float[Tensor, "*rows _C"]],
    sites: Mapping[str, Site],
    pnorm: float,
    weights: Float[Tensor, "*leading"] | None = None,
) -> Float[Tensor, ""]:
    """Σ_l mean over batch and positions of Σ_c g^p (‖V_c‖² + ‖U_c‖²)."""
    terms = []
    for path, g in upper.items():
        parts = sites[path].subcomponents
        size = parts.V.square().sum(dim=0) + parts.U.square().sum(dim=1)
        terms.append(mean_over_rows((safe_power(g, pnorm) * size).sum(dim=-1), weights))
    return torch.stack(terms).sum()


# --- the specs -------------------------------------------------------------------------------------


class LossSpec(BaseConfig):
    """Base of all specs: the coefficient. 0 switches the term off, at no cost."""

    coeff: Scheduled

    @property
    def is_on(self) -> bool:
        """Whether the term is computed at all."""
        return peak_of(self.coeff) > 0

    def coefficient(self, progress: Tensor) -> float | Tensor:
        """What the term is multiplied with at that fraction of the run."""
        return value_at(self.coeff, progress)

    @property
    def n_noise_samples(self) -> int:
        """How many draws of noise the term needs for each site."""
        return 0

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        """0-d tensors whose sum is the (unweighted) term; they share no graph but that of `ctx.ci`."""
        raise NotImplementedError

    def check(self, model: ComponentModel) -> None:
        """Raise `UserError` where the term makes no sense for the model's sites."""

    def initial_state(self, model: ComponentModel) -> dict[str, Tensor]:
        """What the term carries from step to step, before the first: floating-point tensors by name.

        Checkpoints save it, runs side by side have one each, and several processes go on with its mean.
        """
        return {}

    def next_state(self, ctx: StepContext) -> dict[str, Tensor]:
        """What the next step finds, under the names of `initial_state`; computed without gradient."""
        return {}


class Faithfulness(LossSpec):
    type: Literal["faithfulness"] = "faithfulness"
    normalization: Literal["entries", "relative"] = "entries"
    """`entries`: the sum over all sites over the number of their entries; `relative`: of each site the
    share of ‖W‖², mean over sites"""

    def error(self, sites: Mapping[str, Site]) -> Float[Tensor, ""]:
        """The term, which is also what a warm-up brings down."""
        formula = relative_faithfulness if self.normalization == "relative" else faithfulness
        return formula(sites)

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        yield self.error(ctx.model.sites)

    def check(self, model: ComponentModel) -> None:
        zero = [path for path, site in model.sites.items() if not site.target_weight.any()]
        if zero and self.normalization == "relative":
            raise UserError(
                f"losses.faithfulness.normalization: relative divides by ‖W‖², and the weight of"
                f" {zero[0]!r} is all zeros; leave it out of the sites, or choose entries"
            )


class ImportanceMinimality(LossSpec):
    type: Literal["importance_minimality"] = "importance_minimality"
    pnorm: float = Field(gt=0.0, allow_inf_nan=False)

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            upper = {path: ctx.ci.upper[path]}
            yield importance_minimality(upper, self.pnorm, ctx.row_weights)


class Activity(LossSpec):
    """Σ_l Σ_c f_c, f_c the mean over the data of a penalty of the importance of subcomponent c."""

    type: Literal["activity"] = "activity"
    penalty: Penalty

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            yield ctx.mean(self.penalty(ctx.ci.upper[path], ctx.progress).sum(dim=-1))


class Frequency(LossSpec):
    """Σ_l Σ_c f_c log2(1 + a′ f_c), the mean f_c that of all processes, for each site and c by itself."""

    type: Literal["frequency"] = "frequency"
    penalty: Penalty
    reference_count: float = Field(gt=0.0, allow_inf_nan=False)
    """a′, in rows or positions: published runs have batch size × positions"""
    half_life: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """of the running mean, in steps, that stands for f_c where one batch tells too little; null: none"""

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            f = ctx.frequencies(self.penalty(ctx.ci.upper[path], ctx.progress))
            if self.half_life is None:
                yield frequency_cost(f, self.reference_count).sum()
                continue
            mean = RunningMean(self.half_life)
            updated = mean.updated(ctx.carried(f"mean.{path}"), f.detach())
            estimate = mean.estimate(updated, ctx.carried("n_updates") + 1)
            yield cost_of_estimate(f, estimate, self.reference_count).sum()

    def initial_state(self, model: ComponentModel) -> dict[str, Tensor]:
        if self.half_life is None:
            return {}
        columns = {path: site.subcomponents.V[0] for path, site in model.sites.items()}
        means = {f"mean.{path}": torch.zeros_like(V) for path, V in columns.items()}
        return {**means, "n_updates": next(iter(columns.values())).new_zeros(())}

    def next_state(self, ctx: StepContext) -> dict[str, Tensor]:
        if self.half_life is None:
            return {}
        mean, found = RunningMean(self.half_life), {}
        for path in ctx.ci.upper:
            f = ctx.frequencies(self.penalty(ctx.ci.upper[path], ctx.progress))
            found[f"mean.{path}"] = mean.updated(ctx.carried(f"mean.{path}"), f)
        return {**found, "n_updates": ctx.carried("n_updates") + 1}


class Schatten(LossSpec):
    type: Literal["schatten"] = "schatten"
    pnorm: float = Field(gt=0.0, allow_inf_nan=False)

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            upper = {path: ctx.ci.upper[path]}
            yield schatten(upper, ctx.model.sites, self.pnorm, ctx.row_weights)


class OutRecon(LossSpec):
    """D(all subcomponents on, target)."""

    type: Literal["out_recon"] = "out_recon"

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        yield ctx.masked_error()


class Recon(LossSpec):
    """D(all sites masked with g itself, target)."""

    type: Literal["recon"] = "recon"

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        yield ctx.masked_error(ctx.masks(ctx.ci.lower.__getitem__))


class ReconLayerwise(LossSpec):
    """Mean over sites of D(only that site masked with g, target)."""

    type: Literal["recon_layerwise"] = "recon_layerwise"

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.lower:
            yield ctx.masked_error({path: ctx.ci.lower[path]}) / len(ctx.ci.lower)


class _Sampled(LossSpec):
    n_samples: Samples = 1

    @property
    def n_noise_samples(self) -> int:
        return self.n_samples

    def mask(self, ctx: StepContext, sample: int, path: str) -> Tensor:
        return stochastic_mask(ctx.ci.lower[path], ctx.uniform(sample, path))


class StochasticRecon(_Sampled):
    """Mean over samples of D(all sites stochastically masked, target) (paper, section 2)."""

    type: Literal["stochastic_recon"] = "stochastic_recon"

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for sample in range(self.n_samples):
            masks = ctx.masks(partial(self.mask, ctx, sample))
            yield ctx.masked_error(masks) / self.n_samples


class StochasticReconLayerwise(_Sampled):
    """Mean over samples and sites of D(only that site stochastically masked, target)."""

    type: Literal["stochastic_recon_layerwise"] = "stochastic_recon_layerwise"

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for sample in range(self.n_samples):
            for path in ctx.ci.lower:
                masks = {path: self.mask(ctx, sample, path)}
                error = ctx.masked_error(masks)
                yield error / (self.n_samples * len(ctx.ci.lower))


class EmbeddingRecon(_Sampled):
    """How well the masked embedding, the only site, reproduces the target's, mean over samples.

    Squared error summed over d, mean over positions; with `unembed`, the path of the target's
    unembedding module, the KL divergence of what that module makes of either embedding.
    """

    type: Literal["embedding_recon"] = "embedding_recon"
    unembed: str | None = None

    def check(self, model: ComponentModel) -> None:
        sites = list(model.sites.values())
        if len(sites) != 1 or not isinstance(sites[0].original, torch.nn.Embedding):
            raise UserError(
                "losses.embedding_recon: needs exactly one site, an embedding; the sites are"
                f" {', '.join(model.sites)}"
            )
        modules = dict(model.target.named_modules())
        if self.unembed is not None and self.unembed not in modules:
            raise UserError(
                f"losses.embedding_recon.unembed: {self.unembed!r} is no module of the target"
                f"{nearest(self.unembed, modules)}"
            )

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        ((path, site),) = ctx.model.sites.items()
        ids = ctx.site_inputs[path]
        assert isinstance(ids, Tensor), "an embedding reads ids at every position"
        expected = site.original(ids)
        for sample in range(self.n_samples):
            mask = self.mask(ctx, sample, path)
            masked = site.subcomponents(ids, mask)
            if self.unembed is None:
                error = ctx.mean((masked - expected).square().sum(dim=-1))
            else:
                unembed = ctx.model.target.get_submodule(self.unembed)
                error = kl_divergence(unembed(masked), unembed(expected), ctx.row_weights)
            yield error / self.n_samples


Loss = (
    Faithfulness
    | ImportanceMinimality
    | Activity
    | Frequency
    | Schatten
    | OutRecon
    | Recon
    | ReconLayerwise
    | StochasticRecon
    | StochasticReconLayerwise
    | EmbeddingRecon
)
Losses = Annotated[Mapping[str, Annotated[Loss, BY_TYPE]], NAME_IS_TYPE]


def loss_terms(losses: Mapping[str, Loss], ctx: StepContext) -> dict[str, Tensor]:
    """The unweighted terms, under the names that the configuration gives them."""
    terms = {}
    for name, spec in losses.items():
        parts = list(spec.parts(ctx._replace(term=name)))
        terms[name] = torch.stack(parts).sum()
    return terms
