"""The losses of a run on held-out data."""

from collections.abc import Mapping
from typing import ClassVar

from spd.losses import Loss, StepContext, loss_terms
from spd.metrics.spec import Quantity


class HeldOutLosses:
    """Every loss of the run as a mean over the held-out batches: `loss/<name>`, and their weighted sum.

    What moves over the run is what it is at the progress of the contexts, as in a step of training.
    """

    quantities: ClassVar[Mapping[str, Quantity]] = {
        "loss": Quantity(label="held-out", format=".3g", headline=False),
        "loss/total": Quantity(label="held-out total", format=".3g"),
    }

    def __init__(self, losses: Mapping[str, Loss]) -> None:
        self.losses = losses
        self.totals = dict.fromkeys(losses, 0.0)
        self.coefficients: dict[str, float] = {}
        self.n_batches = 0

    def update(self, ctx: StepContext) -> None:
        self.coefficients = {
            name: float(spec.coefficient(ctx.progress)) for name, spec in self.losses.items()
        }
        for name, term in loss_terms(self.losses, ctx).items():
            self.totals[name] += term.item()
        self.n_batches += 1

    def compute(self) -> dict[str, float]:
        means = {name: total / self.n_batches for name, total in self.totals.items()}
        weighted = sum(self.coefficients[name] * mean for name, mean in means.items())
        return {"loss/total": weighted, **{f"loss/{name}": mean for name, mean in means.items()}}
