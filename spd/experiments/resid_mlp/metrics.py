"""Neuron contributions of residual MLPs, and how much of the target's performance is kept."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd.component_model import ComponentModel
from spd.experiments.resid_mlp.model import Labels
from spd.experiments.resid_mlp.problem import need_all_sites, need_resid_mlp
from spd.losses import StepContext, recon_error
from spd.masks import stochastic_mask
from spd.metrics import Metric, MetricSpec, Quantity
from spd.noise import seeded, uniform
from spd.problem import Problem

# --- the mathematics -------------------------------------------------------------------------------


class Contributions(NamedTuple):
    """What each neuron of one layer contributes from each feature's input to its own output."""

    target: Float[Tensor, "n_features d_mlp"]
    subcomponents: Float[Tensor, "n_features d_mlp"]
    """the same through one subcomponent of `mlp_in` alone"""
    chosen: Int[Tensor, " n_features"]
    """that subcomponent"""


def target_contributions(
    W_E: Float[Tensor, "n_features d_embed"],
    W_in: Float[Tensor, "d_embed d_mlp"],
    W_out: Float[Tensor, "d_mlp d_embed"],
    W_U: Float[Tensor, "d_embed n_features"],
) -> Float[Tensor, "n_features d_mlp"]:
    """(W_U[:, i]ᵀ W_out) ⊙ (W_in W_E[i]) for every feature i (paper, section 3.2)."""
    return (W_E @ W_in) * (W_out @ W_U).mT


def subcomponent_contributions(
    W_E: Float[Tensor, "n_features d_embed"],
    V_in: Float[Tensor, "d_embed C"],
    U_in: Float[Tensor, "C d_mlp"],
    W_out: Float[Tensor, "d_mlp d_embed"],
    W_U: Float[Tensor, "d_embed n_features"],
) -> Float[Tensor, "n_features C d_mlp"]:
    """`target_contributions` with each U_c V_cᵀ in place of `W_in`; `W_out` is the sum of them all."""
    return (W_E @ V_in)[:, :, None] * U_in * (W_out @ W_U).mT[:, None, :]


@torch.no_grad()
def neuron_contributions(model: ComponentModel, place: str) -> list[Contributions]:
    """Per layer. The subcomponent that stands for feature i is that with the largest single entry.

    It is chosen without looking at the target.
    """
    target, layers = need_all_sites(model, place)
    found = []
    for mlp_in, mlp_out in (map(model.sites.__getitem__, layer) for layer in layers):
        of_target = target_contributions(
            target.W_E, mlp_in.target_weight, mlp_out.target_weight, target.W_U
        )
        W_out = mlp_out.subcomponents.V @ mlp_out.subcomponents.U
        V, U = mlp_in.subcomponents.V, mlp_in.subcomponents.U
        single = subcomponent_contributions(target.W_E, V, U, W_out, target.W_U)
        chosen = single.amax(dim=-1).argmax(dim=-1)
        rows = torch.arange(len(chosen), device=chosen.device)
        found.append(Contributions(of_target, single[rows, chosen], chosen))
    return found


class Agreement(NamedTuple):
    """How the contributions of the subcomponents relate to the target's."""

    correlation: float
    """Pearson"""
    slope: float
    """least squares through the origin, subcomponents on target"""


def agreement(layers: Sequence[Contributions]) -> Agreement:
    """Correlation and slope over all layers, features and neurons pooled."""
    x = torch.cat([layer.target.flatten() for layer in layers]).double()
    y = torch.cat([layer.subcomponents.flatten() for layer in layers]).double()
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
    return Agreement(float(correlation.nan_to_num()), float((x @ y) / (x @ x)))


# --- the specs -------------------------------------------------------------------------------------


class NeuronContributionsMetric(MetricSpec):
    """Correlation and slope of the neuron contributions (paper, section 3.2)."""

    quantities = {
        "correlation": Quantity(
            label="correlation",
            meaning="of what each neuron contributes through single subcomponents with what it"
            " contributes in the target (1 is perfect)",
        ),
        "slope": Quantity(label="slope", meaning="of the same, through the origin (1 is perfect)"),
    }

    type: Literal["neuron_contributions"] = "neuron_contributions"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        need_resid_mlp(problem, place="metrics.neuron_contributions")
        need_all_sites(model, "metrics.neuron_contributions")
        return _NeuronContributions(model)


class _NeuronContributions:
    def __init__(self, model: ComponentModel) -> None:
        self.model = model

    def update(self, ctx: StepContext) -> None:
        pass

    def compute(self) -> dict[str, float]:
        found = agreement(neuron_contributions(self.model, "metrics.neuron_contributions"))
        return {f"{name}/neuron_contributions": v for name, v in found._asdict().items()}


class LabelPerformanceMetric(MetricSpec):
    """MSE to the labels that the target was trained on, of the target and of its decomposition.

    The latter with all subcomponents on, under the importances as masks, and stochastically masked.
    """

    quantities = {
        "mse_to_labels": Quantity(
            label="MSE to labels",
            meaning="mean squared error to what the target was trained to give out",
            headline=False,
        )
    }

    type: Literal["label_performance"] = "label_performance"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _LabelPerformance(need_resid_mlp(problem, place="metrics.label_performance").labels)


class _LabelPerformance:
    """Draws noise of its own, the same at every evaluation: a function of batch number and site."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.totals: dict[str, float] = {}
        self.n_batches = 0

    def update(self, ctx: StepContext) -> None:
        assert isinstance(ctx.batch, Tensor), "batches of features are one Tensor"
        labels = self.labels(ctx.batch)
        outputs = {
            "target": ctx.target_out,
            "unmasked": ctx.model(ctx.batch),
            "importance_masked": ctx.model(ctx.batch, ctx.ci.lower),
            "stochastic": ctx.model(ctx.batch, self._stochastic_masks(ctx)),
        }
        for name, out in outputs.items():
            error = recon_error(out, labels, "mse").item()
            self.totals[name] = self.totals.get(name, 0.0) + error
        self.n_batches += 1

    def compute(self) -> dict[str, float]:
        return {f"mse_to_labels/{name}": t / self.n_batches for name, t in self.totals.items()}

    def _stochastic_masks(self, ctx: StepContext) -> dict[str, Tensor]:
        device = ctx.batch.device

        def draw(path: str, shape: torch.Size) -> Tensor:
            return uniform(shape, seeded(device, "label performance", self.n_batches, path))

        return {path: stochastic_mask(g, draw(path, g.shape)) for path, g in ctx.ci.lower.items()}
