"""What terms carry from step to step, groups of parameters, and the phase before the first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spd.config import UserError
from spd.engine.ensemble import Alone, Ensemble, parameter_groups
from spd.losses import faithfulness
from spd.optimize import Interrupted, Member, Silent, run_side_by_side, run_steps
from tests.carried_state import LOSSES, config, prepared, result_of
from tests.engine.test_distributed import said, torchrun
from tests.toy import make_config

pytestmark = pytest.mark.undrawn


class Recorder(Silent):
    """Remembers what was logged."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append(dict(values))


def alone(folder: Path, **changes: Any) -> dict[str, Tensor]:
    run = prepared(config(**changes))
    run_steps(run, Silent(), checkpoints=folder)
    return result_of(run, folder)


def assert_near(own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "without", [{"components": {}}, {"importances": {}}, {"faithfulness_warmup": None}]
)
def test_what_follows_is_of_runs_with_groups_and_a_phase(tmp_path: Path, without: dict[str, Any]):
    own, other = alone(tmp_path / "own"), alone(tmp_path / "other", **without)
    assert max((own[name] - other[name]).abs().max() for name in own) > 1e-4


# --- what terms carry ------------------------------------------------------------------------------


def test_the_running_mean_is_that_of_a_loop_by_hand():
    run = prepared(config())
    objective = run.objective
    batch, progress = run.eval_batches[0], torch.tensor(0.0)
    noise = objective.draw_noise(batch, stream="train", seed=0, step=0)
    state = objective.initial_state()
    assert set(state) == {f"running.{path}" for path in objective.model.sites}
    upper = objective.context(batch, progress, noise).ci.upper
    for expected in (1.0, None):
        _, terms, new = objective(batch, progress, noise, None, state)
        by_hand = sum((g.mean(dim=0) * state[f"running.{path}"]).sum() for path, g in upper.items())
        torch.testing.assert_close(terms["loss/running"], by_hand.detach())  # pyright: ignore
        if expected:
            assert all((value == expected).all() for value in state.values())
        for path, g in upper.items():
            mean = 0.5 * state[f"running.{path}"] + 0.5 * g.mean(dim=0)
            torch.testing.assert_close(new[f"running.{path}"], mean.detach())
            assert not new[f"running.{path}"].requires_grad
        state = new


@pytest.mark.parametrize("passes", ["together", "one_by_one"])
def test_stopped_and_resumed_it_goes_on_bit_for_bit(tmp_path: Path, passes: str):
    whole = alone(tmp_path / "whole", passes=passes)
    stops = iter([0, 0, 0, 15])
    with pytest.raises(Interrupted):
        run_steps(
            prepared(config(passes=passes)),
            Silent(),
            checkpoints=tmp_path / "parts",
            stop_requested=lambda: next(stops),
        )
    again = prepared(config(passes=passes))
    run_steps(again, Silent(), checkpoints=tmp_path / "parts", resume=True)
    result = result_of(again, tmp_path / "parts")
    assert result.keys() == whole.keys() and "running.first" in whole
    assert not torch.equal(whole["running.first"], torch.ones_like(whole["running.first"]))
    for name, value in whole.items():
        assert torch.equal(result[name], value), name


def test_side_by_side_each_seed_has_its_own(tmp_path: Path):
    runs = [prepared(config(seed=seed)) for seed in (0, 1)]
    folders = [tmp_path / "0", tmp_path / "1"]
    run_side_by_side([Member(r, Silent(), f) for r, f in zip(runs, folders, strict=True)])
    own = [result_of(run, folder) for run, folder in zip(runs, folders, strict=True)]
    assert not torch.equal(own[0]["running.first"], own[1]["running.first"])
    for seed, result in enumerate(own):
        assert_near(result, alone(tmp_path / f"alone{seed}", seed=seed))


@pytest.mark.slow
def test_two_processes_carry_what_one_does(tmp_path: Path):
    process = torchrun("-m", "tests.carried_state", tmp_path, folder=tmp_path)
    output = said(process)
    assert process.returncode == 0, output
    assert_near(load_file(tmp_path / "result.safetensors"), alone(tmp_path / "one"))


# --- groups of parameters --------------------------------------------------------------------------


def test_every_parameter_is_in_one_group():
    model = prepared(config()).objective.model
    parameters = model.subcomponent_parameters()
    groups = parameter_groups(parameters)
    components = [name for name in parameters if name.endswith((".V", ".U"))]
    assert [id(p) for p in groups["components"]] == [id(parameters[name]) for name in components]
    assert len(groups["components"]) + len(groups["importances"]) == len(parameters)


def trained(**changes: Any) -> tuple[dict[str, Tensor], list[Mapping[str, float]]]:
    run, recorder = prepared(make_config(LOSSES, steps=4, log_every=1, **changes)), Recorder()
    run_steps(run, recorder)
    parameters = run.objective.model.subcomponent_parameters()
    return {name: p.detach() for name, p in parameters.items()}, recorder.rows


def test_a_group_has_a_rate_and_a_schedule_of_its_own():
    start = prepared(make_config(LOSSES)).objective.model.subcomponent_parameters()
    slow = {"lr": 1e-9, "lr_schedule": {"type": "linear"}}
    result, rows = trained(lr=1e-2, importances=slow)
    assert [row["lr"] for row in rows] == [1e-2] * 4
    assert [row["lr/importances"] for row in rows] == pytest.approx(
        [1e-9, 0.75e-9, 0.5e-9, 0.25e-9]
    )
    for name, value in result.items():
        moved = (value - start[name]).abs().max()
        assert moved < 1e-6 if ".importance." in name else moved > 1e-3, name
    _, rows = trained(lr=1e-2)
    assert "lr/importances" not in rows[0] and "lr/components" not in rows[0]


def test_groups_that_say_nothing_change_nothing():
    plain, _ = trained(lr=1e-2)
    same, _ = trained(lr=1e-2, importances={"lr": 1e-2}, components={"lr": 1e-2})
    for name, value in plain.items():
        assert torch.equal(same[name], value), name


def test_a_group_is_clipped_by_itself():
    """A clip so small that AdamW's ε outweighs the gradient keeps a group where it is."""
    start = prepared(make_config(LOSSES)).objective.model.subcomponent_parameters()
    result, _ = trained(lr=1e-2, components={"grad_clip": 1e-14})
    for name, value in result.items():
        moved = (value - start[name]).abs().max()
        assert moved < 1e-6 if name.endswith((".V", ".U")) else moved > 1e-3, name


@pytest.mark.parametrize(("norm", "factor"), [(0.01, 0.99990001), (1.0, 0.0099999900)])
def test_a_clip_by_hand(norm: float, factor: float):
    """min(1, c / (norm + 1e-6)) with c = 0.01, as PyTorch has it, alone and side by side."""
    alone = Alone(prepared(config()).objective)
    several = Ensemble([prepared(config(seed=seed)).objective for seed in (0, 1)])
    for trained in (alone, several):
        (parameter, *_) = trained.parameters
        gradient = torch.zeros_like(parameter)
        gradient.flatten(start_dim=trained.n_members - 1)[..., 0] = norm
        parameter.grad = gradient.clone()
        trained.clip_gradients_([parameter], 0.01)
        assert parameter.grad.max().item() == pytest.approx(norm * factor, rel=1e-6)


def test_all_together_or_by_group_but_not_both():
    with pytest.raises(UserError, match="components.grad_clip a group: one of them must be null"):
        make_config(LOSSES, grad_clip=1.0, components={"grad_clip": 1.0})


# --- the phase before the first step ---------------------------------------------------------------


def test_a_warm_up_brings_the_sums_to_the_weights_and_touches_nothing_else(tmp_path: Path):
    warm = {"steps": 200, "lr": 1e-2}
    settings = {"lr": 1e-9, "importances": {}, "save_every": 1, "steps": 2}
    cold, warmed = (
        prepared(config(**settings, faithfulness_warmup=phase)) for phase in (None, warm)
    )
    for run, name in ((cold, "cold"), (warmed, "warm")):
        run_steps(run, Silent(), checkpoints=tmp_path / name)
    errors = [faithfulness(run.objective.model.sites).item() for run in (cold, warmed)]
    assert errors[1] < 1e-3 * errors[0]
    own, other = (run.objective.model.subcomponent_parameters() for run in (warmed, cold))
    for name, value in own.items():
        near = torch.allclose(value, other[name], atol=1e-6)
        assert near == (not name.endswith((".V", ".U"))), name
    before = {name: value.detach().clone() for name, value in own.items()}
    again = prepared(config(**settings, faithfulness_warmup=warm))
    run_steps(again, Silent(), checkpoints=tmp_path / "warm", resume=True)
    for name, value in again.objective.model.subcomponent_parameters().items():
        assert torch.equal(value, before[name]), "resumed, there is no second warm-up"
