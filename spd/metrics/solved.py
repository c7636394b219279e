"""The verdict of a run: solved by causes, or what is beyond its limits."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError, counted
from spd.losses import StepContext
from spd.metrics.causes import ATTACK, beyond, causes_of
from spd.metrics.spec import Conclusion, Metric, MetricSpec, Quantity
from spd.problem import Problem


class CausesMetric(MetricSpec):
    """Whether the run is solved: five points by what its subcomponents cause (`spd.metrics.causes`).

    Without a known solution those on mechanisms and weights are left out.
    """

    at_end = True
    quantities = {
        "solved": Quantity(
            label="solved",
            meaning="1 if matrices, mechanisms, weights, adversarial masks and importances on data are all"
            " within the limits that docs/running.md names",
            headline=False,
        ),
        "unfaithful": Quantity(
            label="unfaithful", meaning="‖W − V U‖ over ‖W‖", format=".3f", headline=False
        ),
        "effect_errors": Quantity(
            label="effect errors",
            meaning="deviations of the effects of ablating single subcomponents on the probes from the"
            " known mechanisms",
            headline=False,
        ),
        "wrong_weights": Quantity(
            label="wrong weights",
            meaning="features whose weights are not the target's",
            headline=False,
        ),
        "lost_effect": Quantity(
            label="lost effect",
            meaning="share of the effects that lies where g < 0.5",
            format=".3f",
            headline=False,
        ),
        "idle_importance": Quantity(
            label="idle importance",
            meaning="share of g that lies where ablation does nothing",
            format=".3f",
            headline=False,
        ),
        f"adversarial/{ATTACK.n_steps}_steps": Quantity(
            label=f"adversarial error after {counted(ATTACK.n_steps, 'step')}",
            meaning="mean D under masks that so many steps of gradient ascent found for each row, over that"
            " of ablating everything",
            format=".3f",
            headline=False,
        ),
    }

    type: Literal["causes"] = "causes"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _Causes(model, problem)

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        if "solved" not in values:
            return None
        known = any(key.startswith("effect_errors/") for key in values)
        if values["solved"]:
            how = "by causes" if known else "as far as it is known without a solution"
            return Conclusion(headline=f"solved {how}", solved=True)
        return Conclusion(
            headline="not solved by causes",
            detail="beyond the limits: " + "; ".join(beyond(values)),
            solved=False,
        )


class _Causes:
    def __init__(self, model: ComponentModel, problem: Problem) -> None:
        self.model, self.problem = model, problem
        self.batches: list[Tensor] = []

    def update(self, ctx: StepContext) -> None:
        if not isinstance(ctx.batch, Tensor):
            raise UserError(
                "metrics.causes: batches have names here, and only batches of one Tensor can be judged;"
                " remove it"
            )
        self.batches.append(ctx.batch)

    def compute(self) -> dict[str, float]:
        causes = causes_of(self.model, self.problem, self.batches)
        return {**causes.figures(), "solved": float(causes.solved)}
