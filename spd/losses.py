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
from spd.problem import Batch, ReconKind

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


def safe_power(x: Float[Tensor, "*shape"], p: float) -> Float[Tensor, "*shape"]:
    """x^p for x ≥ 0, with value 0 and gradient 0 at 0, also for p < 1 where the slope is infinite."""
    if p == 1.0:
        return x
    if p == 2.0:
        return x.square()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0) ** p, 0.0)


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

    coeff: float = Field(ge=0.0, allow_inf_nan=False)

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

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        yield faithfulness(ctx.model.sites)


class ImportanceMinimality(LossSpec):
    type: Literal["importance_minimality"] = "importance_minimality"
    pnorm: float = Field(gt=0.0, allow_inf_nan=False)

    def parts(self, ctx: StepContext) -> Iterator[Tensor]:
        for path in ctx.ci.upper:
            upper = {path: ctx.ci.upper[path]}
            yield importance_minimality(upper, self.pnorm, ctx.row_weights)


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
