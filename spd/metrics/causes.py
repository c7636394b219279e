"""Whether a decomposition is right, by what its subcomponents cause and not by what importances say.

For a site l with all other masks 1: D0_l(x) is D where all of l is ablated, E_l(x, c) where only its
subcomponent c is, both against the target's output. A run is *solved* when five points hold: it is
faithful, its mechanisms are the known ones, their weights are those of the target, no mask between g and 1
does much harm, and on data importances are where effects are, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd.adversary import Attack, attack
from spd.component_model import ComponentModel
from spd.config import counted
from spd.losses import recon_errors
from spd.metrics.ladder import by_example, weighed
from spd.metrics.sparsity import ALIVE_THRESHOLD, size_of
from spd.noise import seeded
from spd.problem import Dense, Identity, Pattern, Problem, ReconKind, of_ids

FAITHFUL = 0.05
"""‖P (W − V U)‖ over ‖P W‖, at most"""
NEEDED, UNNEEDED = 0.5, 0.02
"""effect of ablating one subcomponent over that of ablating its matrix, on a probe: of a feature's own one
at least, of any other at most"""
REPRODUCED = 0.1
"""what the used subcomponents of a matrix leave of it, at most"""
COSINE, LENGTH = 0.99, 0.05
"""of a feature's weights with the target's, at least, and how far the ratio of lengths may be from 1"""
ADVERSARIAL = 0.10
"""mean D under adversarial masks over that of ablating everything, at most"""
LOST, IDLE = 0.10, 0.20
"""share of the effects that lie where g < 0.5, and of g that lies where there is no effect, at most"""
WITHOUT_EFFECT = 0.002
LIMITS = {
    "unfaithful": FAITHFUL,
    "effect_errors": 0.0,
    "wrong_weights": 0.0,
    "lost_effect": LOST,
    "idle_importance": IDLE,
    "adversarial": ADVERSARIAL,
}
"""name of a figure → the most that a solved run has"""
BY_SOLUTION = ("effect_errors", "wrong_weights")
"""the figures that compare with a known solution; the others can be had without one"""
SAID = {
    "unfaithful": "faithful: W - V U is {} of W",
    "effect_errors": "mechanisms: {} in the effects on the probes",
    "wrong_weights": "weights: those of {} are not the target's",
    "lost_effect": "data: {} of the effects lie where g < 0.5",
    "idle_importance": "data: {} of g lies where nothing depends on it",
    "adversarial": "adversary: masks between g and 1 cost {} of ablating everything",
}
"""the point that does not hold where the figure of that name is larger"""
COUNTED = {"effect_errors": "error", "wrong_weights": "feature"}
"""what there is a number of, of the figures that are none of something"""
ATTACK = Attack("row", n_steps=20, n_restarts=3)
N_ROWS = 1024
"""held-out rows with input"""
N_SAMPLED = 1024
"""subcomponents of a site whose effects are measured, at most: a seeded sample of larger ones"""


class SiteCauses(NamedTuple):
    """What is found at one site. None: nothing is known to compare with."""

    unfaithful: float
    effect_errors: int | None
    wrong_weights: int | None
    lost: float
    idle: float
    never_active: float
    """Σ ‖U_c‖ ‖V_c‖ over the subcomponents with g ≤ 0.1 on all rows, over ‖W‖"""
    n_measured: int
    """subcomponents whose effects were measured"""
    C: int


class Causes(NamedTuple):
    """What is found in all."""

    sites: Mapping[str, SiteCauses]
    adversarial: float
    """mean D under adversarial masks over that of ablating everything"""
    attack: Attack
    n_rows: int

    def failures(self) -> list[str]:
        """The points that do not hold, each in one line; none: solved."""
        return beyond(self.figures())

    def figures(self) -> dict[str, float]:
        """Every figure by the name under which it is logged; the adversary's has its number of steps."""
        found: dict[str, float] = {}
        for path, own in self.sites.items():
            found[f"unfaithful/{path}"] = own.unfaithful
            if own.effect_errors is not None and own.wrong_weights is not None:
                found[f"effect_errors/{path}"] = float(own.effect_errors)
                found[f"wrong_weights/{path}"] = float(own.wrong_weights)
            found[f"lost_effect/{path}"] = own.lost
            found[f"idle_importance/{path}"] = own.idle
        found[f"adversarial/{self.attack.n_steps}_steps"] = self.adversarial
        return found

    @property
    def solved(self) -> bool:
        return not self.failures()

    @property
    def judged_by_solution(self) -> bool:
        """Whether the mechanisms and weights of every site were compared with a known solution."""
        return all(own.effect_errors is not None for own in self.sites.values())


def beyond(figures: Mapping[str, float]) -> list[str]:
    """What is beyond its limit, of figures by the names that they are logged under, each in one line."""
    found = []
    for key, value in figures.items():
        name, _, place = key.partition("/")
        if name in LIMITS and not value <= LIMITS[name]:
            noun = COUNTED.get(name)
            said = SAID[name].format(counted(value, noun) if noun else f"{value:.3g}")
            where = "" if name == "adversarial" else f"{place}: "
            found.append(f"{where}{said} (at most {LIMITS[name]:g})")
    return found


@torch.no_grad()
def causes_of(
    model: ComponentModel,
    problem: Problem,
    batches: Sequence[Tensor],
    *,
    how: Attack = ATTACK,
    n_rows: int = N_ROWS,
    n_sampled: int = N_SAMPLED,
    seed: int = 0,
) -> Causes:
    """The five points of a decomposition, on the problem's probes and on held-out `batches`."""
    rows = _rows_with_input(batches, n_rows)
    weigh = problem.position_weights
    on_data = _Measured(model, rows, problem.recon, None if weigh is None else weigh(rows))
    on_probes = None
    if problem.probes is not None and problem.solution:
        on_probes = _Measured(model, problem.probes, problem.recon)
    sites = {}
    for path, site in model.sites.items():
        columns = _sample(site.C, n_sampled, seed, path, rows.device)
        pattern = problem.solution.get(path)
        effects = on_data.effects(path, columns)
        g = on_data.counted(on_data.g[path].flatten(end_dim=-2))
        effect_errors = wrong_weights = None
        if on_probes is not None and pattern is not None:
            seen = on_probes.effects(path, torch.arange(site.C, device=rows.device))
            share = seen / on_probes.ablated(path)[:, None]
            effect_errors, wrong_weights = against_solution(pattern, share, model, path)
        sites[path] = SiteCauses(
            unfaithfulness(model, path, pattern),
            effect_errors,
            wrong_weights,
            *_on_data(
                on_data.counted(effects), on_data.counted(on_data.ablated(path)), g[:, columns]
            ),
            size_of(site, (g <= ALIVE_THRESHOLD).all(dim=0)),
            len(columns),
            site.C,
        )
    everything = on_data.errors({p: torch.zeros(s.C) for p, s in model.sites.items()})
    worst = attack(on_data.errors, on_data.g, how).rows
    adversarial = _ratio(worst.mean().item(), everything.mean().item())
    return Causes(sites, adversarial, how, on_data.n_rows)


class _Measured:
    """The target on some rows, and how far masked passes are from it."""

    def __init__(
        self,
        model: ComponentModel,
        batch: Tensor,
        recon: ReconKind,
        weights: Tensor | None = None,
    ) -> None:
        self.model, self.batch, self.weights = model, batch, weights
        self.recon: ReconKind = recon
        target = model.target_forward(batch)
        self.output = target.output
        lower = model.causal_importances(target.site_inputs).lower
        self.g = {path: own.clamp(0, 1) for path, own in lower.items()}
        self.n_rows = len(self.counted(self.output[..., 0].flatten()))

    def counted(self, values: Float[Tensor, "rows *columns"]) -> Float[Tensor, "counted *columns"]:
        """Without the rows of weight 0; all of what has not one value for every row."""
        if self.weights is None or len(values) != self.weights.numel():
            return values
        return values[self.weights.flatten() > 0]

    def errors(self, masks: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        on_device = {path: mask.to(self.batch.device) for path, mask in masks.items()}
        errors = recon_errors(self.model(self.batch, on_device), self.output, self.recon)
        return by_example(weighed(errors, self.weights), self.g)

    def one_off(self, path: str, mask: Float[Tensor, " C"]) -> Float[Tensor, " rows"]:
        """D of every row where `path` has this mask and all other masks are 1."""
        all_on = dict.fromkeys(self.model.sites)
        masks = {**all_on, path: mask}
        return recon_errors(self.model(self.batch, masks), self.output, self.recon).flatten()

    def ablated(self, path: str) -> Float[Tensor, " rows"]:
        """D0_l."""
        return self.one_off(path, torch.zeros(self.model.sites[path].C, device=self.batch.device))

    def effects(self, path: str, columns: Tensor) -> Float[Tensor, "rows columns"]:
        """E_l(x, c) of these c."""
        found = []
        for c in columns.tolist():
            mask = torch.ones(self.model.sites[path].C, device=self.batch.device)
            mask[c] = 0.0
            found.append(self.one_off(path, mask))
        return torch.stack(found, dim=1)


def unfaithfulness(model: ComponentModel, path: str, pattern: Pattern | None) -> float:
    """‖P (W − V U)‖ over ‖P W‖, where P projects onto what is read of the matrix's output."""
    site = model.sites[path]
    weight = site.target_weight
    left = weight - site.subcomponents.V @ site.subcomponents.U
    if isinstance(pattern, Dense) and pattern.read_basis is not None:
        weight, left = weight @ pattern.read_basis, left @ pattern.read_basis
    return _ratio(left.norm().item(), weight.norm().item())


def against_solution(
    pattern: Pattern, share: Float[Tensor, "probes C"], model: ComponentModel, path: str
) -> tuple[int, int]:
    """Errors in the effects on the probes, over those of the whole matrix; features with other weights."""
    site = model.sites[path]
    weight, V, U = site.target_weight, site.subcomponents.V, site.subcomponents.U
    match pattern:
        case Identity():
            partner, errors = identity_effects(share)
            return errors, wrong_weights(pattern, partner, weight, V, U)
        case Dense():
            used = (share >= UNNEEDED).any(dim=0)
            return dense_shortfall(used, pattern, weight=weight, V=V, U=U), 0


def partners(values: Float[Tensor, "probes C"]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the one-to-one assignment with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # half a second that few runs need

    return linear_sum_assignment(values.numpy(force=True), maximize=True)


def identity_effects(share: Float[Tensor, "probes C"]) -> tuple[Tensor, int]:
    """The subcomponent of each probe, and the entries that contradict a bijection.

    An effect counts as wrong if it is below 0.5 of a probe's own, or above 0.02 of another.
    """
    share = share.nan_to_num(nan=0.0, posinf=1e9)
    probes, columns = partners(share.clamp(max=1e3))
    own = torch.zeros_like(share, dtype=torch.bool)
    own[torch.as_tensor(probes), torch.as_tensor(columns)] = True
    n_wrong = (own & (share < NEEDED)).sum() + (~own & (share > UNNEEDED)).sum()
    missing = len(share) - len(probes)
    partner = torch.full((len(share),), -1)
    partner[torch.as_tensor(probes)] = torch.as_tensor(columns)
    return partner, int(n_wrong) + missing


def wrong_weights(
    pattern: Identity,
    partner: Tensor,
    weight: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
) -> int:
    """How many features' weights differ from the target's in direction or length."""
    known = (partner >= 0).to(V.device)
    partner = partner.clamp(min=0).to(V.device)
    if pattern.writes:
        target = weight.mT
        own = V.mT[partner] * U[partner].diagonal()[:, None]
    else:
        if pattern.reads is not None:
            weight, V = pattern.reads @ weight, pattern.reads @ V
        target = weight
        own = V.gather(1, partner[:, None]) * U[partner]
    cosine = torch.nn.functional.cosine_similarity(own, target, dim=-1)
    ratio = own.norm(dim=-1) / target.norm(dim=-1)
    right = (cosine >= COSINE) & ((ratio - 1).abs() <= LENGTH) & known
    return int((~right).sum())


def dense_shortfall(
    used: Bool[Tensor, " C"],
    pattern: Dense,
    *,
    weight: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
) -> int:
    """|columns used − k|, plus 1 if they leave more than a tenth of P W, plus 1 if their rank is below k.

    The rank is below k where the k-th singular value is below a tenth of that of P W.
    """
    approximation = V[:, used] @ U[used]
    if pattern.read_basis is not None:
        weight, approximation = weight @ pattern.read_basis, approximation @ pattern.read_basis
    leaves = (weight - approximation).norm() > REPRODUCED * weight.norm()
    singular, reference = torch.linalg.svdvals(approximation), torch.linalg.svdvals(weight)
    rank_lost = singular[pattern.k - 1] < 0.1 * reference[pattern.k - 1]
    return abs(int(used.sum()) - pattern.k) + int(leaves) + int(rank_lost)


def _on_data(
    effects: Float[Tensor, "rows columns"],
    ablated: Float[Tensor, " rows"],
    g: Float[Tensor, "rows columns"],
) -> tuple[float, float]:
    """The shares of effects where g is off, and of g where there is no effect."""
    lost = _ratio((effects * (g < 0.5)).sum().item(), effects.sum().item())
    without = effects <= WITHOUT_EFFECT * ablated.mean()
    return lost, _ratio((g * without).sum().item(), g.sum().item())


def _ratio(part: float, whole: float) -> float:
    """0 of nothing is nothing; something of nothing is infinitely much."""
    return part / whole if whole else (0.0 if part == 0 else float("inf"))


def _rows_with_input(batches: Sequence[Tensor], n_rows: int) -> Tensor:
    """Up to so many rows, of vectors those that are not all zeros."""
    rows = torch.cat([batch for batch in batches if batch.shape[1:] == batches[0].shape[1:]])
    if not of_ids(rows):
        rows = rows[(rows != 0).flatten(start_dim=1).any(dim=1)]
    return rows[:n_rows]


def _sample(C: int, n: int, seed: int, path: str, device: torch.device) -> Tensor:
    if n >= C:
        return torch.arange(C, device=device)
    order = torch.randperm(C, generator=seeded(torch.device("cpu"), "causes", seed, path))
    return order[:n].sort().values.to(device)
