"""Edits of single subcomponents, and what they do to the target: the mathematics of `spd.analysis.editing`.

Written in the row convention x W: the published W − (U_c + α û) V_cᵀ is W − V_c (U_c + α û) here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd.component_model import ComponentModel
from spd.config import UserError, nearest
from spd.losses import recon_errors
from spd.metrics import ALIVE_THRESHOLD
from spd.noise import seeded
from spd.problem import Batch, Problem

N_NEAR, N_EXAMPLES = 20, 50
"""tokens on either side of a position where the edited subcomponents are on, of so many positions"""
CPU = torch.device("cpu")

Members = Mapping[str, Sequence[int]]
"""site → indices of its subcomponents"""


class Edit(NamedTuple):
    """What some subcomponents write in place of their U_c: W′ = W + Σ_c V_c (U′_c − U_c)."""

    members: dict[str, list[int]]
    writes: dict[str, Float[Tensor, "n d_out"]]
    """site → U′ of its members"""


class Effect(NamedTuple):
    """What an edit does, on held-out data."""

    n_on: int
    """positions (of a toy: rows) where an edited subcomponent has g above 0.1"""
    before: float | None
    """mean of what is wanted where it is on: p(token), or an output; None: nothing particular is"""
    after: float | None
    predicted: float | None
    """mean change there of the logit (less the mean of all) or output, to first order"""
    measured: float | None
    """the same of the edited model"""
    at: float
    """mean D(original, edited) where it is on"""
    near: float | None
    """on up to 20 tokens on either side of it, where it is off; None: positions have no neighbours"""
    far: float
    """wherever it is off"""


# --- edits -----------------------------------------------------------------------------------------


def scaled(model: ComponentModel, members: Members, factor: float) -> Edit:
    """U′ = factor · U; 0 removes the subcomponents, 1 leaves them."""
    chosen = _checked(model, members)
    writes = {path: factor * _U(model, path, own) for path, own in chosen.items()}
    return Edit(chosen, writes)


def rewritten(
    model: ComponentModel,
    members: Members,
    direction: Float[Tensor, " d_out"],
    alpha: float,
    signs: Mapping[str, Float[Tensor, " n"]] | None = None,
) -> Edit:
    """U′ = s α û: what the subcomponents wrote is gone, and they write û, the direction at length 1.

    `signs` are those of their activations V_c·x where they are on (`activation_signs`): s V_c·x > 0.
    None: −1, as in the published formula W − V_c (U_c + α û).
    """
    chosen = _checked(model, members)
    unit = F.normalize(direction, dim=0)
    writes = {}
    for path, own in chosen.items():
        d_out = model.sites[path].subcomponents.U.shape[1]
        if unit.shape != (d_out,):
            raise UserError(
                f"{path!r} writes vectors of {d_out} entries, and the direction has {len(unit)}: a site"
                " that adds to the residual stream is needed"
            )
        s = -torch.ones(len(own)) if signs is None else signs[path]
        writes[path] = alpha * s.to(unit)[:, None] * unit
    return Edit(chosen, writes)


def edited_matrices(model: ComponentModel, edit: Edit) -> dict[str, Float[Tensor, "C d_out"]]:
    """Site → U′ of all its subcomponents, as `spd.export` takes it."""
    matrices = {}
    for path, own in edit.members.items():
        U = model.sites[path].subcomponents.U.detach()
        matrices[path] = U.index_copy(0, _index(own, U), edit.writes[path].to(U))
    return matrices


@contextmanager
def applied(model: ComponentModel, edit: Edit, share: Tensor | float = 1.0) -> Iterator[None]:
    """Every pass meanwhile runs with a share of the edit: x W + share · Σ_c (x V_c) (U′_c − U_c)."""
    handles = []
    for path, own in edit.members.items():
        parts = model.sites[path].subcomponents
        index = _index(own, parts.V)
        difference = (edit.writes[path].to(parts.U) - parts.U[index]).detach()

        def add(
            module: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            index: Tensor = index,
            difference: Tensor = difference,
        ) -> Tensor:
            acts = module.subcomponents.acts(inputs[0])[..., index].detach()  # pyright: ignore
            return output + (share * (acts @ difference)).to(output.dtype)

        handles.append(model.sites[path].register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activation_signs(
    model: ComponentModel, members: Members, batches: Sequence[Batch]
) -> dict[str, Float[Tensor, " n"]]:
    """The sign of Σ g_c V_c·x of each, over the data; +1 where it is never on."""
    chosen = _checked(model, members)
    sums = {path: torch.zeros(len(own)) for path, own in chosen.items()}
    for batch in batches:
        inputs = model.target_forward(batch).site_inputs
        g = model.causal_importances(inputs).lower
        for path, own in chosen.items():
            acts = model.sites[path].acts(inputs[path])[..., own]
            sums[path] += (acts * g[path][..., own]).flatten(end_dim=-2).sum(dim=0).cpu()
    return {path: torch.where(total < 0, -1.0, 1.0) for path, total in sums.items()}


def random_members(
    model: ComponentModel, members: Members, alive: Mapping[str, Bool[Tensor, " _C"]], seed: int
) -> dict[str, list[int]]:
    """As many others of the same sites, of those that are ever on where there are enough of them."""
    drawn = {}
    for path, own in _checked(model, members).items():
        C = model.sites[path].C
        others = [c for c in range(C) if c not in own]
        if len(others) < len(own):
            raise UserError(
                f"{path!r}: {len(own)} of its {C} subcomponents are edited; there are no {len(own)} others"
                " to compare with"
            )
        order = torch.randperm(len(others), generator=seeded(CPU, "editing", seed, path)).tolist()
        first = [others[i] for i in order if alive[path][others[i]]]
        rest = [others[i] for i in order if not alive[path][others[i]]]
        drawn[path] = sorted([*first, *rest][: len(own)])
    return drawn


# --- effects ---------------------------------------------------------------------------------------


def effect_of(
    model: ComponentModel,
    problem: Problem,
    edit: Edit,
    batches: Sequence[Batch],
    *,
    wanted: int | None = None,
) -> Effect:
    """What an edit does to the target's output; `wanted` is an index into its last axis.

    The prediction is the derivative by the share of the edit that is applied, at none: it comes from
    V, U and the target's own gradients, and no edited model is run for it.
    """
    figures: tuple[str, ...] = ("before", "after", "predicted", "measured", "at", "near", "far")
    sums: dict[str, float] = dict.fromkeys(figures, 0.0)
    places: tuple[str, ...] = ("on", "near", "far")
    n: dict[str, int] = dict.fromkeys(places, 0)
    for batch in batches:
        on = _is_on(model, edit.members, batch)
        original, predicted = _predicted(model, problem, edit, batch, on, wanted)
        with torch.no_grad(), applied(model, edit):
            edited = model(batch, {})
        errors = recon_errors(edited, original, problem.recon)
        on = on.reshape(errors.shape)
        near = _near(on, N_EXAMPLES - n["on"])
        for name, where in (("on", on), ("near", near), ("far", ~on)):
            n[name] += int(where.sum())
            sums["at" if name == "on" else name] += errors[where].sum().item()
        if wanted is not None:
            kind = problem.recon
            sums["before"] += _amount(original[on], wanted, kind).sum().item()
            sums["after"] += _amount(edited[on], wanted, kind).sum().item()
            change = _moved(edited[on], wanted, kind) - _moved(original[on], wanted, kind)
            sums["measured"] += change.sum().item()
            sums["predicted"] += predicted
    means = {k: v / max(n["on"], 1) for k, v in sums.items() if k not in ("near", "far")}
    told = wanted is not None and n["on"] > 0
    own = {k: means[k] if told else None for k in ("before", "after", "predicted", "measured")}
    return Effect(
        n_on=n["on"],
        **own,
        at=means["at"],
        near=sums["near"] / n["near"] if n["near"] else None,
        far=sums["far"] / max(n["far"], 1),
    )


def _predicted(
    model: ComponentModel,
    problem: Problem,
    edit: Edit,
    batch: Batch,
    on: Tensor,
    wanted: int | None,
) -> tuple[Tensor, float]:
    """The target's output, and the predicted change of what is wanted, summed over where it is on."""
    if wanted is None or not on.any():
        with torch.no_grad():
            return model(batch, {}), 0.0
    with torch.enable_grad():
        share = torch.zeros((), device=batch.device, requires_grad=True)
        with applied(model, edit, share):
            output = model(batch, {})
        rows = output.flatten(end_dim=-2)[on.flatten()]
        (slope,) = torch.autograd.grad(_moved(rows, wanted, problem.recon).sum(), share)
    return output.detach(), slope.item()


def _moved(rows: Float[Tensor, "n d"], wanted: int, kind: str) -> Float[Tensor, " n"]:
    """What a prediction is made of: an output, or a logit less the mean of all."""
    own = rows[:, wanted]
    return own - rows.mean(dim=-1) if kind == "kl" else own


def _amount(rows: Float[Tensor, "n d"], wanted: int, kind: str) -> Float[Tensor, " n"]:
    """An output, or the probability of a token."""
    return rows.softmax(dim=-1)[:, wanted] if kind == "kl" else rows[:, wanted]


@torch.no_grad()
def _is_on(model: ComponentModel, members: Members, batch: Batch) -> Bool[Tensor, " rows"]:
    """Where any of the subcomponents has g above the threshold, of all rows or positions in one axis."""
    g = model.importances(batch).lower
    each = [
        g[path][..., list(own)].flatten(end_dim=-2) > ALIVE_THRESHOLD
        for path, own in members.items()
    ]
    return torch.cat(each, dim=1).any(dim=1)


def _near(on: Bool[Tensor, "*rows"], n_left: int) -> Bool[Tensor, "*rows"]:
    """Where it is off, within 20 positions of the first `n_left` where it is on."""
    if on.dim() < 2:
        return torch.zeros_like(on)
    first = (on.flatten().cumsum(dim=0) <= n_left).reshape(on.shape) & on
    width = 2 * N_NEAR + 1
    around = F.max_pool1d(first.float().flatten(end_dim=-2)[:, None], width, 1, N_NEAR)[:, 0] > 0
    return around.reshape(on.shape) & ~on


def ever_on(model: ComponentModel, batches: Sequence[Batch]) -> dict[str, Bool[Tensor, " _C"]]:
    """Which subcomponents of each site have g above 0.1 somewhere in the data."""
    found: dict[str, Tensor] = {}
    for batch in batches:
        for path, g in model.importances(batch).lower.items():
            own = (g.flatten(end_dim=-2) > ALIVE_THRESHOLD).any(dim=0).cpu()
            found[path] = found[path] | own if path in found else own
    return found


def _checked(model: ComponentModel, members: Members) -> dict[str, list[int]]:
    """`UserError` unless every member is a subcomponent, named once."""
    chosen = {path: list(own) for path, own in members.items() if own}
    if not chosen:
        raise UserError("no subcomponent is named; SITE:C is needed")
    for path, own in chosen.items():
        if path not in model.sites:
            raise UserError(
                f"{path!r} is no site{nearest(path, model.sites)} (sites: {', '.join(model.sites)})"
            )
        C = model.sites[path].C
        for c in own:
            if not 0 <= c < C:
                raise UserError(f"{path}:{c}: the site has the subcomponents 0 to {C - 1}")
        if len(set(own)) < len(own):
            raise UserError(f"{path}: a subcomponent is named twice: {own}")
    return chosen


def _index(own: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(own), device=like.device)


def _U(model: ComponentModel, path: str, own: Sequence[int]) -> Tensor:
    U = model.sites[path].subcomponents.U.detach()
    return U[_index(own, U)]
