"""New importances for one behaviour on one prompt (VPD paper, section 4.3), with an adversary at work.

The preactivations of the subcomponents with g > 0 at a position are trained, all else is fixed; nodes are
those that stay above 0. A graph pruned without an adversary looks simple and is unfaithful, so that the
probability under adversarial masks belongs beside every one.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spd.component_model import ComponentModel
from spd.importance import CausalImportances
from spd.losses import safe_power
from spd.masks import SiteMask, stochastic_mask
from spd.noise import seeded, uniform
from spd.problem import Problem

Masks = Mapping[str, Tensor]
REMAINDER = 0.01
"""‖W − V U‖ / ‖W‖ from which on the remainder is part of the passes, with a mask of its own"""


class Pruning(NamedTuple):
    """How hard it is pruned."""

    steps: int = 2000
    lr: float = 0.03
    minimality: float = 0.1
    """coefficient; p is 0.3"""
    adversarial: float = 0.5
    """share of the adversarial term, the rest is the stochastic one"""
    n_attacks: int = 4
    """steps of the adversary, of 1, within each step"""
    seed: int = 0


DEFAULT = Pruning()


class Judgement(NamedTuple):
    """How well importances keep the behaviour: p of the wanted token, or the value of a toy's output."""

    target: float
    """of the target itself"""
    masked: float
    """under the importances as masks"""
    stochastic: float
    """under random masks, the mean"""
    adversarial: float
    """the worst that was found: what is not important attacked, where g > 0; the rest at random"""
    n_nodes: int
    n_steps: int
    """of the adversary, of 0.1, from 3 starts"""


class Behaviour(NamedTuple):
    """What was found for a behaviour."""

    importances: dict[str, Float[Tensor, "*rows C"]]
    before: Judgement
    """with the importances of the run"""
    after: Judgement


def prune(
    model: ComponentModel,
    problem: Problem,
    batch: Tensor,
    *,
    position: int,
    wanted: int,
    how: Pruning = DEFAULT,
) -> Behaviour:
    """Importances of as few subcomponents as keep an output of one example at one position.

    The loss is the cross-entropy of the wanted token there (of a toy: the squared error of the output),
    half of it under stochastic and half under adversarial masks, and a minimality term.
    """
    inputs = model.target_forward(batch).site_inputs
    start = {path: z.detach() for path, z in model.importance_logits(inputs).items()}
    alive = {path: z > 0 for path, z in start.items()}
    task = _Task(model, problem, batch, position, wanted)
    logits = {path: z.clamp(max=1.0).clone().requires_grad_() for path, z in start.items()}
    optimizer = torch.optim.AdamW(list(logits.values()), lr=how.lr, weight_decay=0.0)
    warmup = max(how.steps // 50, 1)
    for step in range(how.steps):
        ramp = min((step + 1) / warmup, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / how.steps))
        optimizer.param_groups[0]["lr"] = how.lr * ramp * cosine
        g = CausalImportances.of_logits(logits, "gradient")
        lower = {path: own * alive[path] for path, own in g.lower.items()}
        loss = _loss(task, g, lower, alive, how, step)
        gradients = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
        for parameter, gradient in zip(logits.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    with torch.no_grad():
        found = CausalImportances.of_logits(logits, "gradient").lower
        pruned = {path: own.detach() * alive[path] for path, own in found.items()}
        first = {path: z.clamp(0, 1) for path, z in start.items()}
    return Behaviour(pruned, judge(task, first, how.seed), judge(task, pruned, how.seed))


def _loss(
    task: "_Task",
    g: CausalImportances,
    lower: Masks,
    alive: Masks,
    how: Pruning,
    step: int,
) -> Tensor:
    draw = _draws(how.seed, "prune", step)
    upper = [safe_power(own[alive[path]], 0.3).sum() for path, own in g.upper.items()]
    total = how.minimality * torch.stack(upper).sum() / max(task.n_rows, 1)
    if how.adversarial < 1:
        sources = task.sources(lower, draw)
        total = total + (1 - how.adversarial) * task.error(lower, sources)
    if how.adversarial > 0:
        fixed = {path: own.detach() for path, own in lower.items()}
        found = ascend(task, fixed, alive, draw, n_steps=how.n_attacks, step_size=1.0)
        total = total + how.adversarial * task.error(lower, found.sources)
    return total


class _Task:
    """What is to be kept, and how masks fare at it."""

    def __init__(
        self, model: ComponentModel, problem: Problem, batch: Tensor, position: int, wanted: int
    ) -> None:
        self.model, self.batch, self.position, self.wanted = model, batch, position, wanted
        self.of_tokens = problem.recon == "kl"
        with torch.no_grad():
            self.target = self.row(model(batch, {}))
        off = [
            (site.target_weight - site.subcomponents.V @ site.subcomponents.U).norm()
            / site.target_weight.norm().clamp(min=1e-12)
            for site in model.sites.values()
        ]
        self.with_remainder = bool(torch.stack(off).max() > REMAINDER)
        self.n_rows = 1

    def row(self, output: Tensor) -> Float[Tensor, " d"]:
        return output.flatten(end_dim=-2)[self.position]

    def sources(self, g: Masks, draw: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """r of every subcomponent, and in a last column that of the remainder."""
        return {
            path: draw(path, torch.cat([own, own[..., :1]], dim=-1).detach())
            for path, own in g.items()
        }

    def output(self, g: Masks, sources: Masks) -> Float[Tensor, " d"]:
        masks = {
            path: SiteMask(
                stochastic_mask(own, sources[path][..., :-1]),
                sources[path][..., -1] if self.with_remainder else None,
            )
            for path, own in g.items()
        }
        return self.row(self.model(self.batch, masks))

    def error(self, g: Masks, sources: Masks) -> Float[Tensor, ""]:
        row = self.output(g, sources)
        if self.of_tokens:
            return F.cross_entropy(row[None], torch.tensor([self.wanted], device=row.device))
        return (row[self.wanted] - self.target[self.wanted]).square()

    def amount(self, row: Tensor) -> float:
        """p of the wanted token, or the value of a toy's output."""
        return (row.softmax(dim=-1) if self.of_tokens else row)[self.wanted].item()


class Ascended(NamedTuple):
    """The worst sources that were met."""

    sources: dict[str, Tensor]
    error: float


def ascend(
    task: _Task,
    g: Masks,
    alive: Masks,
    draw: Callable[[str, Tensor], Tensor],
    *,
    n_steps: int,
    step_size: float,
) -> Ascended:
    """r ← clamp(r + η sign ∂error/∂r) of what is alive, and of the remainder; the rest stays."""
    sources = task.sources(g, draw)
    moves = {path: F.pad(own.float(), (0, 1), value=1.0) for path, own in alive.items()}
    best, worst = sources, -math.inf
    for step in range(n_steps + 1):
        leaves = {path: own.detach().requires_grad_() for path, own in sources.items()}
        error = task.error(g, leaves)
        if error.item() > worst:
            best, worst = {path: own.detach() for path, own in leaves.items()}, error.item()
        if step == n_steps:
            break
        slopes = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
        sources = {
            path: own.detach()
            if slope is None
            else (own.detach() + step_size * moves[path] * slope.sign()).clamp(0, 1)
            for (path, own), slope in zip(leaves.items(), slopes, strict=True)
        }
    return Ascended(best, worst)


def judge(
    task: _Task, g: Masks, seed: int = 0, *, n_steps: int = 20, n_random: int = 20
) -> Judgement:
    """The wanted output under the target, the importances, random masks, and the worst of three attacks.

    What is attacked is what is a node with g below 1, and the remainder where there is one.
    """
    ones = {path: torch.ones_like(own) for path, own in task.sources(g, lambda _, x: x).items()}
    alive = {path: own > 0 for path, own in g.items()}
    fixed = {path: own.detach() for path, own in g.items()}
    with torch.no_grad():
        masked = task.output(fixed, {path: 0 * own for path, own in ones.items()})
        random = [
            task.amount(task.output(fixed, task.sources(fixed, _draws(seed, "judge", i))))
            for i in range(n_random)
        ]
    attacks = [
        ascend(task, fixed, alive, _draws(seed, "attack", i), n_steps=n_steps, step_size=0.1)
        for i in range(3)
    ]
    worst = max(attacks, key=lambda found: found.error)
    with torch.no_grad():
        attacked = task.amount(task.output(fixed, worst.sources))
    n_nodes = sum(int(own.sum()) for own in alive.values())
    figures = (task.amount(task.target), task.amount(masked), sum(random) / len(random), attacked)
    return Judgement(*figures, n_nodes, n_steps)


def _draws(seed: int, what: str, step: int) -> Callable[[str, Tensor], Tensor]:
    def draw(path: str, like: Tensor) -> Tensor:
        generator = seeded(like.device, "behaviour", seed, what, step, path)
        return uniform(like.shape, generator, dtype=like.dtype)

    return draw
