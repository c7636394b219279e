"""How much of a language model's prediction survives each kind of mask, on held-out text."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Int
from pydantic import field_validator
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError, counted
from spd.experiments.lm.problem import need_lm, next_token_cross_entropy
from spd.losses import StepContext, kl_divergence
from spd.masks import ROUNDING_THRESHOLD, MaskKind, Thresholds, further_masks, masks_of
from spd.metrics import Conclusion, Metric, MetricSpec, Quantity, share_recovered
from spd.noise import seeded, uniform
from spd.problem import Problem

MOST_BIAS = 0.1
"""nats by which the entropy of a sample may lie below that of the text, as far as can be told"""
FEW_TOKENS = 5000
KEYS: Mapping[MaskKind, str] = {
    "unmasked": "unmasked",
    "importance_masked": "masked",
    "stochastic": "stochastic",
    "rounded": "rounded",
    "ablated": "zero",
}
"""what each kind of masks is called in the keys"""


# --- the mathematics -------------------------------------------------------------------------------


def entropy_of_counts(counts: Int[Tensor, " vocab"]) -> float:
    """Entropy in nats of the distribution that these counts make."""
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log()).sum().item()


def entropy_bias(counts: Int[Tensor, " vocab"]) -> float:
    """How much too low the entropy of counts is in the mean, about: (K − 1) / 2n (Miller and Madow)."""
    return max(int((counts > 0).sum()) - 1, 0) / (2 * counts.sum().item())


def compute_recovered(curve: Sequence[tuple[float, float]], ce: float) -> float | None:
    """The fraction of a target's training after which its held-out cross-entropy was first this low.

    `curve` has fractions and cross-entropies in the order of training, between which lies a line. 1 where
    it was never that low; None where it was lower from the first point on, so that nothing is known.
    """
    (before, above), *rest = curve
    if ce > above:
        return None
    for fraction, value in rest:
        if value <= ce:
            return before + (above - ce) / (above - value) * (fraction - before)
        before, above = fraction, value
    return 1.0


# --- the spec --------------------------------------------------------------------------------------


class CrossEntropyMetric(MetricSpec):
    """Cross-entropy against the next token, KL from the target, and what the masks keep of the first.

    `ce/…` of the target and with the masks `unmasked` (all subcomponents on), `masked` (g itself),
    `stochastic`, `rounded` (g > 0.5) and `zero` (every site ablated); `ce/unigram` is the entropy of the
    predicted tokens by their frequency in the held-out text, left out where these are too few to tell (see
    `entropy_bias`). `scored` is how many predictions there are. `kl/…` is KL(target ‖ masked).
    `recovered/…` is the share of what zero ablation costs that is avoided; left out where that costs
    nothing. `ce_difference/…`, if asked for, is the cross-entropy over that of the target, and
    `compute_recovered/…` the fraction of the target's own training that brought it there. Where tokens are
    excluded, neither their positions count nor the predictions of them.
    """

    quantities = {
        "ce": Quantity(
            label="cross-entropy",
            meaning="against the next token, in nats; with the masks named, of the target itself,"
            " and of guessing by frequency (unigram)",
            headline=False,
        ),
        "kl": Quantity(label="KL from the target", headline=False),
        "scored": Quantity(
            label="tokens scored",
            meaning="the predictions of held-out text that cross-entropies are means over",
            format=",.0f",
            headline=False,
        ),
        "recovered": Quantity(
            label="cross-entropy recovered",
            meaning="the share of what ablating every site costs that is avoided, under masks that no"
            " adversary chose",
            headline=False,
        ),
        "recovered/rounded": Quantity(
            label="cross-entropy recovered rounded",
            meaning="with masks 1 where g > 0.5, no adversary",
        ),
        "ce_difference": Quantity(
            label="cross-entropy over the target's",
            meaning="in nats, with the masks named",
            headline=False,
        ),
        "compute_recovered": Quantity(
            label="compute recovered",
            meaning="the fraction of the target's training after which it was first as good",
            headline=False,
        ),
    }

    type: Literal["cross_entropy"] = "cross_entropy"
    random: bool = False
    """also masks r that ignore the importances: `ce/random` and so on"""
    thresholds: Thresholds = ()
    """also masks that are 1 where g > τ, else 0, for each of these τ: `ce/rounded_above_τ` and so on"""
    differences: bool = False
    """also `ce_difference/…`"""
    target_curve: tuple[tuple[float, float], ...] = ()
    """fractions of the target's training and its held-out cross-entropy there: also
    `compute_recovered/…`"""

    @field_validator("target_curve")
    @classmethod
    def _goes_on(cls, curve: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        fractions = [0.0, *(fraction for fraction, _ in curve)]
        if not all(a < b for a, b in pairwise(fractions)) or fractions[-1] > 1:
            raise ValueError(
                f"fractions of training are needed, up to 1 and each above the one before it, got"
                f" {fractions[1:]}"
            )
        return curve

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        if need_lm(problem, "metrics.cross_entropy").unembed is None:
            raise UserError("metrics.cross_entropy: this model predicts no tokens; remove it")
        return _CrossEntropy(model, self)

    def conclusion(self, values: Mapping[str, float]) -> Conclusion | None:
        """Nothing where the ladder says more: what a recipe may train on is no result by itself."""
        known = {"recovered/masked", "recovered/rounded"} <= values.keys()
        if not known or "ladder/ablated" in values:
            return None
        n = values.get("scored", FEW_TOKENS)
        few = f"; from {counted(n, 'token')} only" if n < FEW_TOKENS else ""
        on = {
            name: sum(value for key, value in values.items() if key.startswith(f"{key_of}/"))
            for name, key_of in (("L0", "l0"), ("alive", "alive"))
            if any(key.startswith(f"{key_of}/") for key in values)
        }
        at = "".join(f"{name} {value:.4g}, " for name, value in on.items())
        return Conclusion(
            headline="not tested against an adversary",
            detail=f"{at}and of the cost of ablation {values['recovered/masked']:.1%} avoided with the"
            f" importances as masks, {values['recovered/rounded']:.1%} with rounded ones,"
            f" g > {ROUNDING_THRESHOLD}{few}; the metric ladder tests it",
        )


class _CrossEntropy:
    def __init__(self, model: ComponentModel, spec: CrossEntropyMetric) -> None:
        self.model, self.spec = model, spec
        self.noise: dict[str, torch.Generator] = {}
        self.ce: dict[str, float] = {}
        self.kl: dict[str, float] = {}
        self.counts: Tensor | None = None
        self.n_positions = 0

    def update(self, ctx: StepContext) -> None:
        tokens, weights = ctx.batch, ctx.row_weights
        assert isinstance(tokens, Tensor), "batches of a language model are token ids"
        kept = torch.ones_like(tokens, dtype=torch.bool) if weights is None else weights > 0
        n_kept, predicted = int(kept.sum()), kept[:, :-1] & kept[:, 1:]
        self._count(tokens[:, 1:][predicted], n_vocab=ctx.target_out.shape[-1])
        self.n_positions += n_kept

        def cross_entropy(logits: Tensor) -> Tensor:
            return next_token_cross_entropy(logits, tokens)[predicted].sum()

        self._add(self.ce, "target", cross_entropy(ctx.target_out))
        for name, masks in self._masks(ctx.ci.lower):
            logits = self.model(tokens, masks)
            self._add(self.ce, name, cross_entropy(logits))
            self._add(self.kl, name, kl_divergence(logits, ctx.target_out, weights) * n_kept)

    def compute(self) -> dict[str, float]:
        assert self.counts is not None, "no batch was seen"
        ce = {kind: total / self.counts.sum().item() for kind, total in self.ce.items()}
        values = {f"ce/{kind}": value for kind, value in ce.items()}
        if entropy_bias(self.counts) <= MOST_BIAS:
            values["ce/unigram"] = entropy_of_counts(self.counts)
        values["scored"] = self.counts.sum().item()
        values |= {f"kl/{kind}": total / self.n_positions for kind, total in self.kl.items()}
        if ce["zero"] > ce["target"]:
            for kind in self._compared():
                share = share_recovered(ce[kind], zero=ce["zero"], target=ce["target"])
                values[f"recovered/{kind}"] = share
        for kind in self._compared() if self.spec.differences else ():
            values[f"ce_difference/{kind}"] = ce[kind] - ce["target"]
        for kind in self._compared() if self.spec.target_curve else ():
            found = compute_recovered(self.spec.target_curve, ce[kind])
            if found is not None:
                values[f"compute_recovered/{kind}"] = found
        return values

    def _compared(self) -> list[str]:
        """The masks that are compared with the target and with ablating everything."""
        return [kind for kind in self.kl if kind != "zero"]

    def _masks(self, g: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Tensor | None]]]:
        for kind, name in KEYS.items():
            yield name, masks_of(kind, g, partial(self._uniform, "cross_entropy"))
        clipped = {path: own.clamp(0, 1) for path, own in g.items()}
        drawn = partial(self._uniform, "cross_entropy of random masks")
        random, thresholds = self.spec.random, self.spec.thresholds
        yield from further_masks(clipped, drawn, random=random, thresholds=thresholds)

    def _count(self, predicted: Int[Tensor, " n"], *, n_vocab: int) -> None:
        counts = torch.bincount(predicted, minlength=n_vocab)
        self.counts = counts if self.counts is None else self.counts + counts

    def _uniform(self, stream: str, like: Tensor) -> Tensor:
        """The same draws in every evaluation, whatever the losses of the run."""
        if stream not in self.noise:
            self.noise[stream] = seeded(like.device, stream, 0)
        return uniform(like.shape, self.noise[stream], like.dtype)

    @staticmethod
    def _add(totals: dict[str, float], kind: str, value: Tensor) -> None:
        totals[kind] = totals.get(kind, 0.0) + value.item()
