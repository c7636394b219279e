"""The verdict by causes on a decomposition that was trained: as it is, and spoiled in every known way.

Each of these still matches the published pattern of importances, or did before it was looked at closely.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spd import settings
from spd.component_model import ComponentModel, Site
from spd.config import load_config
from spd.engine.prepare import Prepared, evaluate, prepare
from spd.experiments.tms.tms_decomposition import TMSConfig, build
from spd.metrics.causes import Causes, causes_of
from spd.optimize import Silent, run_steps

pytestmark = [pytest.mark.slow, pytest.mark.compiled]

CONFIG = settings.PACKAGE_DIR / "experiments" / "tms" / "tms_5-2_fast_config.yaml"
PROBES = 0.75 * torch.eye(5)
SITES = ("linear1", "linear2")


@pytest.fixture(scope="module", name="trained")
def trained_fixture(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPD_OUT_DIR", str(tmp_path_factory.mktemp("out")))
        config = load_config(TMSConfig, CONFIG, ["figures={}", "seed=0"])
        prepared = prepare(build(config, torch.device("cpu")), config)
        run_steps(prepared, Silent())
        return prepared


def spoiled(trained: Prepared, spoil: Callable[[ComponentModel], None]) -> Prepared:
    """A copy of what was trained, changed."""
    objective = copy.deepcopy(trained.objective)
    with torch.no_grad():
        spoil(objective.model)
    return trained._replace(objective=objective)


def judge(prepared: Prepared) -> Causes:
    return causes_of(prepared.objective.model, prepared.problem, prepared.eval_batches)  # pyright: ignore


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
        self.inner, self.change = site.importance, change

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
    assert evaluate(trained)["eval/errors/total"] == 0


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
    assert evaluate(spoiled(trained, spoil))["eval/errors/total"] == 0


@pytest.mark.parametrize("factor", [0.90, 0.85])
def test_importances_that_are_a_little_lower_are_right_too(trained: Prepared, factor: float):
    def lower(model: ComponentModel) -> None:
        change_logits(model, lambda path: lambda z, h: factor * z)

    causes = judge(spoiled(trained, lower))
    assert causes.solved, causes.failures()
