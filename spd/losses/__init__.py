"""Every training loss: the formula as a free function, and the spec that names it in a configuration."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from spd.component_model import ComponentModel, Site
from spd.config import BY_TYPE, NAME_IS_TYPE, UserError, nearest
from spd.config.limits import Samples
from spd.kernels import kl_per_row
from spd.losses.minimality import Activity, Frequency
from spd.losses.spec import (
    LossSpec,
    Noise,
    State,
    StepContext,
    mean_of_columns,
    mean_over_rows,
    noise_key,
    recon_error,
    recon_errors,
    state_key,
)
from spd.masks import stochastic_mask

__all__ = [
    "Activity",
    "EmbeddingRecon",
    "Faithfulness",
    "Frequency",
    "ImportanceMinimality",
    "Loss",
    "LossSpec",
    "Losses",
    "Noise",
    "OutRecon",
    "Recon",
    "ReconLayerwise",
    "Schatten",
    "State",
    "StepContext",
    "StochasticRecon",
    "StochasticReconLayerwise",
    "faithfulness",
    "importance_minimality",
    "kl_divergence",
    "loss_terms",
    "mean_of_columns",
    "mean_over_rows",
    "noise_key",
    "recon_error",
    "recon_errors",
    "relative_faithfulness",
    "safe_power",
    "schatten",
    "state_key",
]

# --- the mathematics -------------------------------------------------------------------------------


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
