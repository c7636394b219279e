"""What a loss is, and everything that it may depend on: one class for each.

A spec yields its term in *parts*, one per forward pass, whose sum is the term: a caller may add them up
in one graph or run the backward pass of one after another.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import BaseConfig
from spd.importance import CausalImportances
from spd.kernels import KLKernel, kl_per_row
from spd.masks import Mask, SiteInput
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
