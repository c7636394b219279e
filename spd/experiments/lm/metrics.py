"""How much of a language model's prediction survives each kind of mask, on held-out text."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from spd.component_model import ComponentModel
from spd.config import UserError, counted
from spd.experiments.lm.problem import need_lm, next_token_cross_entropy
from spd.losses import StepContext, kl_divergence
from spd.masks import ROUNDING_THRESHOLD, MaskKind, masks_of
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


# --- the spec --------------------------------------------------------------------------------------


class CrossEntropyMetric(MetricSpec):
    """Cross-entropy against the next token, KL from the target, and what the masks keep of the first.

    `ce/…` of the target and with the masks `unmasked` (all subcomponents on), `masked` (g itself),
    `stochastic`, `rounded` (g > 0.5) and `zero` (every site ablated); `ce/unigram` is the entropy of the
    predicted tokens by their frequency in the held-out text, left out where these are too few to tell (see
    `entropy_bias`). `scored` is how many predictions there are. `kl/…` is KL(target ‖ masked).
    `recovered/…` is the share of what zero ablation costs that is avoided; left out where that costs
    nothing. Where tokens are excluded, neither their positions count nor the predictions of them.
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
    }

    type: Literal["cross_entropy"] = "cross_entropy"

    def build(self, model: ComponentModel, problem: Problem) -> Metric:
        if need_lm(problem, "metrics.cross_entropy").unembed is None:
            raise UserError("metrics.cross_entropy: this model predicts no tokens; remove it")
        return _CrossEntropy(model)

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
    def __init__(self, model: ComponentModel) -> None:
        self.model = model
        self.noise: torch.Generator | None = None
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
        for kind, name in KEYS.items():
            logits = self.model(tokens, masks_of(kind, ctx.ci.lower, self._uniform))
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
            for kind in KEYS.values():
                if kind == "zero":
                    continue
                share = share_recovered(ce[kind], zero=ce["zero"], target=ce["target"])
                values[f"recovered/{kind}"] = share
        return values

    def _count(self, predicted: Int[Tensor, " n"], *, n_vocab: int) -> None:
        counts = torch.bincount(predicted, minlength=n_vocab)
        self.counts = counts if self.counts is None else self.counts + counts

    def _uniform(self, like: Tensor) -> Tensor:
        """The same draws in every evaluation, whatever the losses of the run."""
        if self.noise is None:
            self.noise = seeded(like.device, "cross_entropy", 0)
        return uniform(like.shape, self.noise, like.dtype)

    @staticmethod
    def _add(totals: dict[str, float], kind: str, value: Tensor) -> None:
        totals[kind] = totals.get(kind, 0.0) + value.item()
