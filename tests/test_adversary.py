"""The adversary: as good as it says, the same every time, and not to be fooled."""

from collections.abc import Mapping

import torch
from torch import Tensor

from spd.adversary import Attack, Errors, Masks, Scope, attack
from spd.analysis.adversary import ladder, lines
from spd.losses import recon_errors
from spd.masks import stochastic_mask
from spd.metrics import Ladder
from tests.solved_toy import solved_toy
from tests.test_causes import plant_pair, toy

C = 5
ROWS = 20


def small() -> tuple[dict[str, Tensor], Errors]:
    """A toy of 10 subcomponents in all, and importances that leave something to search for."""
    torch.manual_seed(0)  # of the target's bias
    prepared = solved_toy(2, 2, C)
    model, batch = prepared.objective.model, prepared.eval_batches[0][:ROWS]
    output, site_inputs = model.target_forward(batch)
    with torch.no_grad():
        g = dict(model.causal_importances(site_inputs).lower)
    generator = torch.Generator().manual_seed(0)
    g = {path: own * torch.rand(own.shape, generator=generator) for path, own in g.items()}
    for site in model.sites.values():  # what is unused does something
        with torch.no_grad():
            U = site.subcomponents.U
            U.add_(0.3 * torch.randn(U.shape, generator=generator))

    def errors(masks: Masks) -> Tensor:
        return recon_errors(model(batch, masks), output, "mse")

    return g, errors


def worst_corner(errors: Errors, g: Mapping[str, Tensor], scope: Scope) -> float:
    """The largest mean D over all 2^ΣC corners r ∈ {0, 1}^ΣC, to tell how good an attack is.

    D is not convex in r everywhere, so that a point within the cube may still be worse than any corner.
    """
    clipped = {path: own.detach().clamp(0, 1) for path, own in g.items()}
    sizes = [own.shape[-1] for own in g.values()]
    n = sum(sizes)
    assert n <= 16, f"2^{n} corners"
    found: list[Tensor] = []
    for number in range(2**n):
        bits = torch.tensor([number >> place & 1 for place in range(n)], dtype=torch.float32)
        corner = dict(zip(g, bits.split(sizes), strict=True))
        with torch.no_grad():
            found.append(
                errors(
                    {
                        p: stochastic_mask(clipped[p], r.expand_as(clipped[p]))
                        for p, r in corner.items()
                    }
                )
            )
    rows = torch.stack(found)
    if scope == "row":
        return rows.amax(dim=0).mean().item()
    return rows.flatten(start_dim=1).mean(dim=1).max().item()


def test_it_comes_near_the_worst_of_all_corners():
    g, errors = small()
    assert sum(own.shape[-1] for own in g.values()) == 10
    for scope in ("row", "batch"):
        corner = worst_corner(errors, g, scope)
        found = attack(errors, g, Attack(scope, n_steps=30, n_restarts=24)).by_step[-1]
        print(f"{scope}: attack {found:.5f}, worst corner {corner:.5f}, ratio {found / corner:.3f}")
        assert found >= 0.9 * corner
    weak = attack(errors, g, Attack("row", n_steps=1)).by_step[-1]
    assert weak < 0.9 * worst_corner(errors, g, "row"), "one step is no search"


def test_the_curve_never_falls_and_begins_before_the_first_step():
    g, errors = small()
    for scope in ("row", "batch"):
        found = attack(errors, g, Attack(scope, n_steps=7, n_restarts=2))
        assert len(found.by_step) == 8 and found.by_step == sorted(found.by_step)
        assert found.rows.shape == (ROWS,)
    assert abs(found.rows.mean().item() - found.by_step[-1]) < 1e-7


def test_the_same_every_time_and_another_with_another_seed():
    g, errors = small()
    how = Attack("row", n_steps=3, n_restarts=2)
    first = attack(errors, g, how)
    assert first.by_step == attack(errors, g, how).by_step
    assert first.by_step != attack(errors, g, how._replace(seed=1)).by_step
    with torch.no_grad():
        assert first.by_step == attack(errors, g, how).by_step, "gradients are its own affair"


def test_one_source_for_all_rows_does_no_more_than_one_for_each():
    g, errors = small()
    batch, row = (attack(errors, g, Attack(s, 20, 4)).by_step[-1] for s in ("batch", "row"))
    assert batch < row


def test_masks_lie_between_g_and_1():
    seen: list[Tensor] = []
    g = {"site": torch.tensor([[-0.2, 0.3, 1.4]])}

    def errors(masks: Masks) -> Tensor:
        seen.append(masks["site"].detach())
        return masks["site"].sum(dim=-1)

    attack(errors, g, Attack("row", n_steps=15, n_restarts=2))
    for mask in seen:
        assert (mask >= g["site"].clamp(0, 1)).all() and (mask <= 1).all()
    assert seen[-1].tolist() == [[1.0, 1.0, 1.0]]


def test_a_planted_pair_is_seen_by_random_masks_and_the_adversary_alone():
    """± u vᵀ at g = 0: whoever leaves both on, or both off, sees nothing."""

    def with_pair(size: float) -> Ladder:
        prepared = toy()
        plant_pair(prepared, size)
        return ladder(prepared, n_steps=20, n_restarts=1)

    without, planted = with_pair(0.0), with_pair(2.0)
    for name in ("unmasked", "importance_masked", "rounded"):
        assert abs(planted.rungs[name] - without.rungs[name]) < 1e-6
    assert planted.rungs["stochastic"] > 10 * without.rungs["stochastic"] + 1e-3
    for scope in ("batch", "row"):
        worst = planted.attacks[scope].by_step[-1]
        assert worst > planted.rungs["ablated"] > 10 * without.attacks[scope].by_step[-1]
    table = "\n".join(lines(planted))
    assert "one source for the whole batch, 20 steps" in table and "ablated" in table
