"""The verdict by causes on a decomposition that was trained: as it is, and spoiled in every known way.

Each of these still matches the published pattern of importances, or did before it was looked at closely.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spd.adversary import Scope
from spd.analysis.adversary import ladder
from spd.component_model import ComponentModel, Site
from spd.engine.prepare import Prepared, evaluate
from spd.metrics import Ladder, PatternErrorsMetric
from spd.metrics.causes import ADVERSARIAL, Causes, causes_of
from spd.runs.run import load_run
from spd.settings import PACKAGE_DIR

pytestmark = pytest.mark.slow

EXPERIMENT = "spd.experiments.tms.tms_decomposition"
CONFIG = PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_fast_config.yaml"
N_BATCHES = 6
"""of held-out data: enough for the 1,024 rows with an input that the verdict takes"""
SCOPES: tuple[Scope, ...] = ("batch", "row")
PROBES = 0.75 * torch.eye(5)
SITES = ("linear1", "linear2")


@pytest.fixture(scope="module", name="trained")
def trained_fixture(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """One run for all tests, trained in a process of its own, where it may be compiled."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["seed=0", "figures={}", "metrics={}", f"n_eval_batches={N_BATCHES}"]
    done = subprocess.run(
        [sys.executable, "-m", EXPERIMENT, CONFIG, *overrides, "--run_dir", folder / "run"],
        env={**os.environ, "SPD_OUT_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return load_run(folder / "run").prepared


def spoiled(trained: Prepared, spoil: Callable[[ComponentModel], None]) -> Prepared:
    """A copy of what was trained, changed."""
    objective = copy.deepcopy(trained.objective)
    with torch.no_grad():
        spoil(objective.model)
    return trained._replace(objective=objective)


def judge(prepared: Prepared) -> Causes:
    return causes_of(prepared.objective.model, prepared.problem, prepared.eval_batches)  # pyright: ignore


def matches(prepared: Prepared) -> bool:
    """Whether it has the published pattern of importances, which is not the verdict."""
    config = prepared.config.model_copy(update={"metrics": {"errors": PatternErrorsMetric()}})
    looked_at = prepared._replace(config=config, eval_batches=prepared.eval_batches[:1])
    return evaluate(looked_at)["eval/errors/total"] == 0


def points(causes: Causes) -> set[str]:
    """Which points fail."""
    lines = causes.failures()
    return {line.split(": ")[0 if line.startswith("adversary") else 1] for line in lines}


def shared(model: ComponentModel) -> tuple[Tensor, Tensor]:
    """V and U of `linear1`; the recipe gives `linear2` its own."""
    own = model.sites["linear1"].subcomponents
    return own.V, own.U


def own_columns(model: ComponentModel, path: str = "linear1") -> list[int]:
    """The subcomponent of each feature."""
    g = model.importances(PROBES).lower[path]
    return g.argmax(dim=1).tolist()


def unused(model: ComponentModel, path: str = "linear1") -> Tensor:
    own = set(own_columns(model, path))
    return torch.tensor([c for c in range(model.sites[path].C) if c not in own])


class Changed(nn.Module):
    """An importance function whose logits are changed by hand."""

    def __init__(self, site: Site, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = site.own_importance(), change

    def forward(self, h: Tensor) -> Tensor:
        return self.change(self.inner(h), h)


def change_logits(
    model: ComponentModel, change_of: Callable[[str], Callable[[Tensor, Tensor], Tensor]]
) -> None:
    changes = {path: change_of(path) for path in SITES}
    for path, change in changes.items():
        site = model.sites[path]
        site.importance = Changed(site, change)  # pyright: ignore


def no_U(model: ComponentModel) -> None:
    shared(model)[1].zero_()


def random(model: ComponentModel) -> None:
    U = shared(model)[1]
    U.copy_(torch.randn(U.shape, generator=torch.Generator().manual_seed(0)) * U.std())


def flipped(model: ComponentModel) -> None:
    shared(model)[1].neg_()


def exchanged(model: ComponentModel) -> None:
    U, own = shared(model)[1], own_columns(model)
    U[own] = U[own].roll(1, dims=0)


def idling(model: ComponentModel) -> None:
    idle = {path: unused(model, path) for path in SITES}
    change_logits(model, lambda path: lambda z, h: z.index_fill(-1, idle[path], 0.0999))


def right_at_the_probe_alone(model: ComponentModel) -> None:
    """Within 6 % of an input of 0.75; 0 elsewhere."""
    inputs = model.target_forward(PROBES).site_inputs
    own_of = {path: own_columns(model, path) for path in SITES}

    def change_of(path: str) -> Callable[[Tensor, Tensor], Tensor]:
        V, x = model.sites[path].subcomponents.V, inputs[path]
        assert isinstance(x, Tensor)
        own = own_of[path]
        at_probe = (x @ V)[range(5), own]

        def change(z: Tensor, h: Tensor) -> Tensor:
            near = torch.ones_like(z)
            near[..., own] = ((h[..., own] - at_probe).abs() <= 0.06 * at_probe.abs()).float()
            return torch.where(near > 0, z, z.clamp(max=0.0))

        return change

    change_logits(model, change_of)


def rotated_pair(model: ComponentModel) -> None:
    (V, U), pair = shared(model), own_columns(model)[:2]
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    V[:, pair], U[pair] = V[:, pair] @ turn, turn.mT @ U[pair]


def two_halves(model: ComponentModel) -> None:
    (V, U), whole = shared(model), own_columns(model)[0]
    other = int(unused(model)[0])
    U[whole] /= 2
    V[:, other], U[other] = V[:, whole], U[whole]

    def copied(z: Tensor, h: Tensor) -> Tensor:
        z = z.clone()
        z[..., other] = z[..., whole]
        return z

    change_logits(model, lambda path: copied)


WRONG: dict[Callable[[ComponentModel], None], str] = {
    no_U: "faithful",
    random: "faithful",
    flipped: "faithful",
    exchanged: "weights",
    idling: "data",
    right_at_the_probe_alone: "data",
    rotated_pair: "weights",
    two_halves: "mechanisms",
}


def test_what_was_trained_is_solved(trained: Prepared):
    causes = judge(trained)
    assert causes.solved, causes.failures()
    assert matches(trained)


@pytest.mark.parametrize(("spoil", "point"), WRONG.items(), ids=[f.__name__ for f in WRONG])
def test_what_is_wrong_is_refused_by_name(
    trained: Prepared, spoil: Callable[[ComponentModel], None], point: str
):
    causes = judge(spoiled(trained, spoil))
    assert not causes.solved
    assert point in points(causes), causes.failures()


@pytest.mark.parametrize(
    "spoil", [no_U, random, flipped, exchanged, idling, right_at_the_probe_alone]
)
def test_the_published_pattern_sees_nothing(
    trained: Prepared, spoil: Callable[[ComponentModel], None]
):
    """Which is why it is not the verdict."""
    assert matches(spoiled(trained, spoil))


@pytest.mark.parametrize("factor", [0.90, 0.85])
def test_importances_that_are_a_little_lower_are_right_too(trained: Prepared, factor: float):
    def lower(model: ComponentModel) -> None:
        change_logits(model, lambda path: lambda z, h: factor * z)

    causes = judge(spoiled(trained, lower))
    assert causes.solved, causes.failures()


def planted(size: float) -> Callable[[ComponentModel], None]:
    """± u vᵀ in two subcomponents of `linear1` that are never on; of no size: the run without them."""

    def plant(model: ComponentModel) -> None:
        (V, U), (one, other) = shared(model), unused(model)[:2].tolist()
        V[:, [one, other]] = 0.5
        U[one], U[other] = size, -size

        def off(z: Tensor, h: Tensor) -> Tensor:
            return z.index_fill(-1, torch.tensor([one, other]), 0.0)

        change_logits(model, lambda path: off if path == "linear1" else lambda z, h: z)

    return plant


def test_a_planted_pair_is_seen_by_random_masks_and_refused_by_the_adversary(trained: Prepared):
    """Whoever leaves both on, or both off, sees nothing of ± u vᵀ."""

    def climbed(size: float) -> tuple[Causes, Ladder]:
        prepared = spoiled(trained, planted(size))
        return judge(prepared), ladder(prepared, n_steps=20, n_restarts=1, n_rows=256)

    (clean, without), (seen, pair) = climbed(0.0), climbed(2.0)
    for name in ("unmasked", "importance_masked", "rounded", "ablated"):
        assert abs(pair.rungs[name] - without.rungs[name]) < 1e-6, name
    assert pair.rungs["stochastic"] > 10 * without.rungs["stochastic"]
    for scope in SCOPES:
        assert pair.attacks[scope].by_step[-1] > pair.rungs["ablated"]
    assert clean.solved, clean.failures()
    assert "adversary" in points(seen) and seen.adversarial > 10 * ADVERSARIAL


def test_the_search_of_a_solved_run_has_ended_after_20_steps(trained: Prepared):
    """As a running maximum the curve at step 80 is at most a quarter above that at step 20."""
    found = ladder(trained, n_steps=80, n_restarts=1)
    for scope in SCOPES:
        by_step = found.attacks[scope].by_step
        assert by_step[80] <= 1.25 * by_step[20], (scope, by_step[20], by_step[80])
