"""The ladder: D on the same held-out rows under every kind of masks, from harmless ones to adversarial.

A decomposition says that what it calls unimportant can be ablated, in any combination and by any amount.
No mask, random ones, the importances and rounded importances test that more or less; masks that an
adversary searches for test it best, and ablating everything is what all are measured by. More steps are a
stronger adversary, not another quantity, so that every figure has its number of steps in its name.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd.adversary import Attack, Found, Scope, attack
from spd.component_model import ComponentModel
from spd.losses import mean_over_rows, recon_errors
from spd.masks import MASK_KINDS, further_masks, masks_of
from spd.metrics.baselines import NAMES as BASELINES
from spd.metrics.baselines import baseline
from spd.metrics.sparsity import L0_THRESHOLD
from spd.noise import seeded, uniform
from spd.problem import Batch, Problem, of_ids

SCOPES: tuple[Scope, ...] = get_args(Scope)
SOURCES: Mapping[Scope, str] = {
    "batch": "one source for the whole batch",
    "row": "one source for each row or position",
}
IN_SHORT: Mapping[Scope, str] = {"batch": "one source", "row": "one each"}
PERMUTED = "permuted"
"""a control: the importances of other inputs, which must do far worse than those of the input itself"""
STEPS, STEPS_AT_END = (1, 5, 20), (1, 5, 20, 80)
"""of ascent after which the adversary is shown, at every evaluation and at the end of a run"""
N_ROWS, N_SEQUENCES = 256, 4
"""how many rows of the first held-out batch are looked at: vectors, or sequences (images, …)"""


@runtime_checkable
class Predicts(Protocol):
    """A problem whose target predicts the tokens of its batches."""

    def cross_entropy(
        self, logits: Tensor, batch: Batch
    ) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]] | None:
        """Of each example its sum, and how many predictions that is of; None: nothing is predicted."""
        ...


class Ladder(NamedTuple):
    """What is found on some rows."""

    rungs: dict[str, float]
    """mean D by the name of the rung"""
    recovered: dict[str, float]
    """of the cross-entropy that ablating everything costs, the share that is avoided; empty: not known"""
    attacks: dict[Scope, Found]
    l0: float
    """mean number of g > 0.01, over all sites"""
    C: int
    """of all sites"""
    n_rows: int
    baselines: dict[str, dict[str, float]] = {}
    """name of a baseline → its rungs; empty where they were not asked for"""

    def figures(self) -> dict[str, float]:
        """Every figure by the name under which it is logged."""
        found = {f"ladder/{name}": value for name, value in self.rungs.items()}
        whole = self.rungs["ablated"]
        for name in (rung(n, s) for s in SCOPES if (n := deepest(found, s)) and whole > 0):
            found[f"ladder_share/{name}"] = self.rungs[name] / whole
        found |= {f"ladder_recovered/{name}": share for name, share in self.recovered.items()}
        for name, rungs in self.baselines.items():
            found |= {f"ladder_{name}/{key}": value for key, value in rungs.items()}
        return found | {
            "ladder_l0": self.l0,
            "ladder_C": float(self.C),
            "ladder_rows": float(self.n_rows),
        }


def rung(n_steps: int, scope: Scope) -> str:
    """What the adversary's figure after so many steps is called."""
    return f"adversarial_{n_steps}_{scope}"


def deepest(values: Mapping[str, Any], scope: Scope) -> int | None:
    """The largest number of steps after which an adversary is among these figures."""
    names = (
        key.removeprefix("ladder/").split("_") for key in values if key.startswith("ladder/adv")
    )
    steps = [int(parts[1]) for parts in names if parts[0] == "adversarial" and parts[2] == scope]
    return max(steps, default=None)


def share_recovered(cross_entropy: float, *, zero: float, target: float) -> float:
    """(CE_zero − CE) / (CE_zero − CE_target): 1 is the target, 0 as bad as without the sites."""
    return (zero - cross_entropy) / (zero - target)


def some_rows(batch: Batch, n_rows: int | None = None) -> Batch:
    """A seeded choice of a batch's rows, in their order; of vectors those that are not all zeros."""
    indices = torch.arange(len(batch))
    vectors = isinstance(batch, Tensor) and not of_ids(batch) and batch.dim() == 2
    if vectors and isinstance(batch, Tensor) and batch.any():
        indices = batch.any(dim=1).nonzero().flatten().cpu()
    if n_rows is None:
        n_rows = N_ROWS if vectors else N_SEQUENCES
    order = torch.randperm(len(indices), generator=seeded(torch.device("cpu"), "ladder", "rows"))
    return batch[indices[order[:n_rows].sort().values].tolist()]


def permuted(
    g: Mapping[str, Float[Tensor, "*rows _C"]], seed: int
) -> dict[str, Float[Tensor, "*rows _C"]]:
    """The importances of another row or position: a seeded permutation, the same for all sites."""
    found = {}
    for path, own in g.items():
        rows = own.flatten(end_dim=-2)
        generator = seeded(torch.device("cpu"), "ladder", "permuted", seed)
        order = torch.randperm(len(rows), generator=generator)
        found[path] = rows[order.to(own.device)].reshape(own.shape)
    return found


def by_example(
    errors: Float[Tensor, "examples *positions"], g: Mapping[str, Float[Tensor, "*rows _C"]]
) -> Float[Tensor, " n"]:
    """The errors of each example, in which the masks of others have no say: the mean over its positions.

    Of all together where a site's importances are shared by several examples or positions.
    """
    if any(own.shape[:-1].numel() < errors.numel() for own in g.values()):
        return errors.mean().reshape(1)
    return errors.flatten(start_dim=1).mean(dim=1) if errors.dim() > 1 else errors


def weighed(
    errors: Float[Tensor, "examples *positions"], weights: Tensor | None
) -> Float[Tensor, "examples *positions"]:
    """Each error times the weight of its row or position; None: all count alike."""
    if weights is None:
        return errors
    return errors * weights.reshape(*weights.shape, *[1] * (errors.dim() - weights.dim()))


class _Measured:
    """The target on some rows, and how far masked passes are from it."""

    def __init__(self, model: ComponentModel, problem: Problem, batch: Batch) -> None:
        self.model, self.problem, self.batch = model, problem, batch
        target = model.target_forward(batch)
        self.output, self.site_inputs = target
        lower = model.causal_importances(target.site_inputs).lower
        self.g = {path: own.clamp(0, 1) for path, own in lower.items()}
        weights = problem.position_weights
        self.weights = None if weights is None else weights(batch)
        self.predicted: list[Tensor] = []
        """cross-entropy of every pass so far, of each example"""

    def instead(self, model: ComponentModel, g: dict[str, Tensor]) -> "_Measured":
        """The same rows of the same target with other subcomponents."""
        other = copy(self)
        other.model, other.g, other.predicted = model, g, []
        return other

    def l0(self) -> float:
        counts = [(own > L0_THRESHOLD).float().sum(dim=-1) for own in self.g.values()]
        return sum(mean_over_rows(count, self.weights).item() for count in counts)

    def errors(self, masks: Mapping[str, Tensor | None]) -> Float[Tensor, " n"]:
        output = self.model(self.batch, masks)
        if (found := self.cross_entropy(output.detach())) is not None:
            self.predicted.append(found)
        errors = recon_errors(output, self.output, self.problem.recon)
        return by_example(weighed(errors, self.weights), self.g)

    def cross_entropy(self, output: Tensor) -> Float[Tensor, " batch"] | None:
        """Of each example its part of the mean over all predictions; None where nothing is predicted."""
        if not isinstance(self.problem, Predicts):
            return None
        found = self.problem.cross_entropy(output, self.batch)
        if found is None or not found[1].any():
            return None
        return found[0] / found[1].sum()


@torch.no_grad()
def climb(
    model: ComponentModel,
    problem: Problem,
    batch: Batch,
    *,
    steps: Sequence[int],
    n_restarts: int = 1,
    seed: int = 0,
    random: bool = False,
    thresholds: Sequence[float] = (),
    baselines: Sequence[int] = (),
) -> Ladder:
    """Every rung on this batch, the adversary after each of `steps`, the largest error until there.

    With `random` masks that ignore the importances are among them, and rounded ones at each of the
    `thresholds`; with `baselines`, steps again, also those of singular vectors and of neurons, as many on
    at a time.
    """
    seen = _Measured(model, problem, batch)
    noise = seeded(batch.device, "ladder", seed)
    rungs: dict[str, float] = {}
    cross_entropy: dict[str, float] = {}

    def draw(like: Tensor) -> Tensor:
        return uniform(like.shape, noise, like.dtype)

    masks = {kind: masks_of(kind, seen.g, draw) for kind in MASK_KINDS}
    for kind, own in {**masks, PERMUTED: permuted(seen.g, seed)}.items():
        rungs[kind] = seen.errors(own).mean().item()
        if seen.predicted:
            cross_entropy[kind] = seen.predicted.pop().sum().item()
    own_noise = seeded(batch.device, "ladder", "random", seed)  # the other draws stay as they are
    further = further_masks(
        seen.g,
        lambda like: uniform(like.shape, own_noise, like.dtype),
        random=random,
        thresholds=thresholds,
    )
    for name, own in further:
        rungs[name] = seen.errors(own).mean().item()
        if seen.predicted:
            cross_entropy[name] = seen.predicted.pop().sum().item()
    search = partial(Attack, n_steps=max(steps), n_restarts=n_restarts, seed=seed)
    attacks: dict[Scope, Found] = {}
    for scope in SCOPES:
        attacks[scope] = found = attack(seen.errors, seen.g, search(scope))
        for n in steps:
            rungs[rung(n, scope)] = found.by_step[n]
            if seen.predicted:
                cross_entropy[rung(n, scope)] = _at_calls(seen.predicted, found.calls[n])
        seen.predicted.clear()
    ablated = rungs.pop("ablated")
    target = seen.cross_entropy(seen.output)
    beside = {
        name: _of_baseline(name, seen, baselines, search, seed) for name in BASELINES if baselines
    }
    return Ladder(
        {**rungs, "ablated": ablated},
        {} if target is None else _recovered(cross_entropy, target.sum().item()),
        attacks,
        seen.l0(),
        sum(site.C for site in model.sites.values()),
        seen.output[..., 0].numel(),
        beside,
    )


def _of_baseline(
    name: str,
    seen: _Measured,
    steps: Sequence[int],
    search: Callable[[Scope], Attack],
    seed: int,
) -> dict[str, float]:
    """Its rungs under the masks and adversaries of the decomposition."""
    kept = None if seen.weights is None else seen.weights.flatten() > 0
    on_from = L0_THRESHOLD
    found = baseline(name, seen.model, seen.site_inputs, seen.g, on_from=on_from, kept=kept)
    own, rounded = seen.instead(found.model, found.g), seen.instead(found.model, found.g_rounded)
    noise = seeded(seen.output.device, "ladder", name, seed)

    def draw(like: Tensor) -> Tensor:
        return uniform(like.shape, noise, like.dtype)

    rungs = {
        "stochastic": own.errors(masks_of("stochastic", own.g, draw)).mean().item(),
        "importance_masked": own.errors(own.g).mean().item(),
        "rounded": rounded.errors(rounded.g).mean().item(),
    }
    for scope in SCOPES:
        how = search(scope)._replace(n_steps=max(steps))
        by_step = attack(own.errors, own.g, how).by_step
        rungs |= {rung(n, scope): by_step[n] for n in steps}
        own.predicted.clear()
    return rungs


def _at_calls(values: Sequence[Float[Tensor, " batch"]], calls: Int[Tensor, " n"]) -> float:
    """The sum over the examples, each at the call that is its own, or all at the same."""
    every = torch.stack(list(values))
    return every.gather(0, calls.expand(every.shape[1])[None]).sum().item()


def _recovered(cross_entropy: Mapping[str, float], target: float) -> dict[str, float]:
    zero = cross_entropy["ablated"]
    if zero <= target:
        return {}
    recovered = partial(share_recovered, zero=zero, target=target)
    return {name: recovered(own) for name, own in cross_entropy.items() if name != "ablated"}
