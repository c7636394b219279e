"""The ladder as a metric of a configuration: its settings, and how its figures are called.

What is measured stands in `spd.metrics.ladder`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from spd.component_model import ComponentModel
from spd.config import counted
from spd.losses import StepContext
from spd.masks import ROUNDING_THRESHOLD, Thresholds
from spd.metrics.baselines import NAMES as BASELINES
from spd.metrics.baselines import against
from spd.metrics.ladder import (
    IN_SHORT,
    PERMUTED,
    SCOPES,
    SOURCES,
    STEPS,
    STEPS_AT_END,
    Ladder,
    Predicts,
    climb,
    deepest,
    rung,
    some_rows,
)
from spd.metrics.sparsity import L0_THRESHOLD
from spd.metrics.spec import Conclusion, Metric, MetricSpec, Quantity
from spd.problem import Batch, Problem

_MASKS = {
    "unmasked": "all subcomponents on",
    "stochastic": "masks g + (1 − g) r, r random",
    "importance_masked": "masks g",
    "rounded": f"masks 1 where g > {ROUNDING_THRESHOLD}, else 0",
    "random": "masks r, random whatever g is",
    PERMUTED: "masks g of another row or position, drawn at random",
    "ablated": "all subcomponents off",
}
LONGEST = 320
"""steps of ascent that a configuration may ask for at the end of a run, beside those that it has anyway"""
_ADVERSARIAL = {
    rung(
        n, scope
    ): f"masks g + (1 − g) r, r from {counted(n, 'step')} of an adversary, {SOURCES[scope]}"
    for scope in SCOPES
    for n in (*STEPS_AT_END, LONGEST)
}

_LABELS = {
    "importance_masked": "importance masks",
    **{
        rung(n, scope): f"adversary, {counted(n, 'step')}, {IN_SHORT[scope]}"
        for scope in SCOPES
        for n in STEPS_AT_END
    },
}


AscentSteps = Annotated[int, Field(ge=1, le=100_000)]


class LadderMetric(MetricSpec):
    """D under every kind of masks, adversarial ones among them, on the first held-out batch.

    `ladder/…`: `unmasked`, `stochastic`, `importance_masked`, `rounded`, `permuted`, `ablated`, and
    `adversarial_N_batch` and `adversarial_N_row` after N steps of 0.1 from one seeded start, with one
    source for the batch and one for each row or position: the largest error until there. Of a language
    model, `ladder_recovered/…` is the share of the cross-entropy that ablating costs which is avoided.
    `ladder_share/…` is the error after the most steps over that of ablating. `ladder_l0` of `ladder_C`
    subcomponents are on, on these `ladder_rows` rows. At the end of a run of a language model,
    `ladder_svd/…` and `ladder_neurons/…` are the same of two baselines with as many on (`baselines`).
    """

    quantities = {
        "ladder": Quantity(label="D", headline=False),
        **{
            f"ladder/{name}": Quantity(
                label=f"D {_LABELS.get(name, name)}", meaning=meaning, headline=False
            )
            for name, meaning in (_MASKS | _ADVERSARIAL).items()
        },
        "ladder_share": Quantity(
            label="adversary over ablation",
            meaning="the error under its masks over that of ablating everything",
            format=".3f",
            headline=False,
        ),
        **{
            f"ladder_share/{rung(n, scope)}": Quantity(
                label=f"adversary over ablation, {n} steps, {words}", format=".3f"
            )
            for scope, words in IN_SHORT.items()
            for n in (STEPS_AT_END[-1], LONGEST)
        },
        "ladder_recovered": Quantity(
            label="CE recovered",
            meaning="the share of the cross-entropy that ablating everything costs which is avoided",
            headline=False,
        ),
        **{
            f"ladder_{name}": Quantity(label=f"D of {words}", headline=False)
            for name, words in BASELINES.items()
        },
        "ladder_l0": Quantity(
            label="L0 of all matrices",
            meaning=f"subcomponents with an importance above {L0_THRESHOLD}, mean over the ladder's rows",
        ),
        "ladder_C": Quantity(label="C of all matrices", headline=False),
        "ladder_rows": Quantity(
            label="rows of the ladder", meaning="or positions, held out", headline=False
        ),
    }

    type: Literal["ladder"] = "ladder"
    n_rows: int | None = Field(default=None, ge=1)
    """of the first held-out batch, a seeded choice; None: 256 vectors, or 4 sequences"""
    steps_at_end: tuple[AscentSteps, ...] = Field(default=STEPS_AT_END, min_length=1, max_length=20)
    """after which the adversary is shown at the end of a run"""
    random: bool = False
    """also masks r that ignore the importances: `ladder/random`"""
    thresholds: Thresholds = ()
    """also masks that are 1 where g > τ, else 0, for each of these τ: `ladder/rounded_above_τ`"""

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        return _Climbing(self.n_rows, self._climb(model, problem, STEPS))

    def build_at_end(self, model: ComponentModel, problem: Problem) -> Metric:
        beside = STEPS if isinstance(problem, Predicts) else ()
        how = self._climb(model, problem, self.steps_at_end, baselines=beside)
        return _Climbing(self.n_rows, how)

    def _climb(
        self, model: ComponentModel, problem: Problem, steps: Sequence[int], **further: Any
    ) -> Callable[[Batch], Ladder]:
        how = partial(climb, model, problem, steps=steps, **further)
        return partial(how, random=self.random, thresholds=self.thresholds)

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        shares = {
            scope: (n, values[f"ladder_share/{rung(n, scope)}"])
            for scope in SCOPES
            if (n := deepest(values, scope)) and f"ladder_share/{rung(n, scope)}" in values
        }
        if set(shares) != set(SCOPES):
            return None
        n, of_batch = shares["batch"]
        compared = against(values)
        on = f"L0 {values['ladder_l0']:.4g} of {values['ladder_C']:.0f}"
        return Conclusion(
            headline=f"masks from {counted(n, 'step')} of an adversary cost {of_batch:.1%} of ablating"
            f" everything, at {on}",
            detail=f"{SOURCES['batch']}; with {SOURCES['row']} {shares['row'][1]:.1%}; on"
            f" {values['ladder_rows']:,.0f} held-out rows or positions"
            + (f". {compared}" if compared else ""),
        )


class _Climbing:
    """Looks at the first batch that it sees."""

    def __init__(self, n_rows: int | None, climb_on: Callable[[Batch], Ladder]) -> None:
        self.climb, self.n_rows = climb_on, n_rows
        self.found: dict[str, float] | None = None

    def update(self, ctx: StepContext) -> None:
        if self.found is None:
            self.found = self.climb(some_rows(ctx.batch, self.n_rows)).figures()

    def compute(self) -> dict[str, float]:
        return self.found or {}
