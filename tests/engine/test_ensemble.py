"""Several seeds side by side: each member is what it would be alone."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd.config import UserError
from spd.engine.checkpoint import load_state
from spd.engine.ensemble import Ensemble, StepInputs
from spd.engine.prepare import Prepared, prepare
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.optimize import (
    Interrupted,
    Member,
    NonFiniteError,
    run_side_by_side,
    run_steps,
)
from spd.problem import Problem
from spd.registry import get_experiment
from spd.runs.cli import checked_config
from tests.little_lm import little_model
from tests.run_fixtures import make_target
from tests.test_optimize import Recorder
from tests.toy import ALL_LOSSES, TiedMLP, make_config

SEEDS = (0, 1, 5)
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
TERMS = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 3e-3, "pnorm": 1.0},
    "stochastic_recon": {"coeff": 1.0, "n_samples": 2},
    "stochastic_recon_layerwise": {"coeff": 1.0},
}
OTHER_TERMS = {name: spec for name, spec in ALL_LOSSES.items() if name not in TERMS} | {
    "importance_minimality": {"coeff": 1e-3, "pnorm": 0.9}
}


@pytest.fixture(scope="module", name="targets")
def targets_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("targets")
    names = ("tms_5-2", "tms_5-2-id", "resid_mlp2")
    return {name: make_target(folder / name, name) for name in names}


def experiment(name: str, target: Path, seed: int, *overrides: str) -> Prepared:
    """A registered experiment, prepared for 20 short steps."""
    short = (
        *("steps=20", "eval_every=20", "log_every=5", "compile=false", "figures={}", "lr=1e-2"),
        "metrics.ladder.n_rows=8",
        *("batch_size=512", "n_eval_batches=1", "eval_batch_size=512", f"target={target}"),
    )
    config = checked_config(name, [*short, f"seed={seed}", *overrides])
    build = importlib.import_module(get_experiment(name).module).build
    return prepare(build(config, torch.device("cpu")), config)


def run_both(members: list[Prepared], singles: list[Prepared]) -> list[tuple[Recorder, Recorder]]:
    """The trackers of every member, and of the same run alone."""
    trackers = [(Recorder(), Recorder()) for _ in members]
    pairs = zip(members, trackers, strict=True)
    run_side_by_side([Member(prepared, tracker) for prepared, (tracker, _) in pairs])
    for prepared, (_, tracker) in zip(singles, trackers, strict=True):
        run_steps(prepared, tracker)
    return trackers


def assert_same(member: Prepared, single: Prepared, lines: Recorder, own_lines: Recorder) -> None:
    """Parameters and everything that was logged."""
    parameters = single.objective.model.subcomponent_parameters()
    for name, value in member.objective.model.subcomponent_parameters().items():
        torch.testing.assert_close(value, parameters[name], **TOLERANCE, msg=name)
    assert [step for step, _ in lines.lines] == [step for step, _ in own_lines.lines]
    for (_, values), (_, own) in zip(lines.lines, own_lines.lines, strict=True):
        found = {name: value for name, value in values.items() if "adversarial" not in name}
        expected = {name: value for name, value in own.items() if "adversarial" not in name}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        # steps along signs magnify what is rounded
        assert values == pytest.approx(own, rel=2e-2, abs=1e-5)


SITES = {
    "tms_5-2": "sites={linear1: 8, linear2: 8}",
    "tms_5-2-id": "sites={linear1: 8, hidden_layers.0: 6, linear2: 8}",
    "resid_mlp2": "sites={layers.*.mlp_*: 12}",
}
CASES = {
    "tms": ("tms_5-2", TERMS, "both"),
    "tms, other terms": ("tms_5-2", OTHER_TERMS, "both"),
    "tms, leak in the gradient": ("tms_5-2", TERMS, "gradient"),
    "tms with an identity": ("tms_5-2-id", TERMS, "gradient"),
    "residual MLP": ("resid_mlp2", TERMS, "both"),
    "residual MLP, other terms": ("resid_mlp2", OTHER_TERMS, "gradient"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "losses", "leak"),
    [pytest.param(*case, id=name) for name, case in CASES.items()],
)
def test_members_are_single_runs(
    targets: dict[str, Path], name: str, losses: dict[str, Any], leak: str
):
    """With zero rows merged."""
    changes = (f"losses={losses}".replace("'", ""), f"lower_leak={leak}", SITES[name])
    members, singles = (
        [experiment(name, targets[name], seed, *changes) for seed in SEEDS] for _ in range(2)
    )
    start = singles[0].objective.model.subcomponent_parameters()
    before = {key: value.detach().clone() for key, value in start.items()}
    assert all(prepared.zero_rows.share is not None for prepared in members)
    trackers = run_both(members, singles)
    for member, single, (lines, own_lines) in zip(members, singles, trackers, strict=True):
        assert_same(member, single, lines, own_lines)
        assert len(lines.lines) == 7
    assert all((value - before[key]).abs().max() > 1e-3 for key, value in start.items())


# --- small problems ----------------------------------------------------------------------------------


def sparse_batches(seed: int, stream: str, *, full_at: int = -1, n: int = 5) -> SparseFeatures:
    """Of which four in five rows have no input, but for one batch that is full of it."""

    class Full(SparseFeatures):
        def __next__(self) -> Tensor:
            full = self.position == full_at
            batch = super().__next__()
            return batch + 0.1 if full else batch

    config = SparseFeatureConfig(feature_probability=0.05)
    return Full(config, n, batch_size=512, seed=seed, stream=stream)


def prepared_toy(seed: int, *, full_at: int = -1, **changes: Any) -> Prepared:
    """A tied toy model that is the same for every seed."""
    torch.manual_seed(0)
    problem = Problem(
        TiedMLP(),
        sparse_batches(seed, "train", full_at=full_at),
        sparse_batches(seed, "eval"),
        independent_rows=True,
        tied_sites=(("enc", "dec"),),
    )
    settings = {
        **{"losses": {**TERMS, "recon": {"coeff": 0.5}}, "sites": {"enc": 6, "dec": 6}},
        **{"steps": 8, "lr": 1e-2, "log_every": 1, "save_every": 4, "eval_every": 4},
        **{"seed": seed, **changes},
    }
    return prepare(problem, make_config(**settings))


def toys(**changes: Any) -> list[Prepared]:
    return [prepared_toy(seed, **changes) for seed in SEEDS]


def parameters_of(prepared: Prepared) -> list[Tensor]:
    return [p.detach() for p in prepared.objective.model.subcomponent_parameters().values()]


@pytest.mark.slow
def test_gradients_are_clipped_by_each_members_own_norm():
    members, singles = (toys(grad_clip=0.05) for _ in range(2))
    for pair in zip(members, singles, run_both(members, singles), strict=True):
        assert_same(pair[0], pair[1], *pair[2])
    unclipped = toys()
    run_both(unclipped, toys())
    assert (parameters_of(unclipped[0])[0] - parameters_of(singles[0])[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_groups_and_the_phase_before_the_first_step_are_those_of_single_runs():
    settings: dict[str, Any] = {
        "components": {"grad_clip": 0.02},
        "importances": {"lr": 3e-3, "lr_schedule": {"type": "linear"}},
        "faithfulness_warmup": {"steps": 5, "lr": 1e-2},
    }
    members, singles = (toys(**settings) for _ in range(2))
    for pair in zip(members, singles, run_both(members, singles), strict=True):
        assert_same(pair[0], pair[1], *pair[2])
        assert "lr/importances" in pair[2][0].lines[1][1]
    for left_out in settings:
        others = {name: value for name, value in settings.items() if name != left_out}
        other = prepared_toy(SEEDS[0], **others)
        run_steps(other, Recorder())
        pairs = zip(parameters_of(other), parameters_of(singles[0]), strict=True)
        assert max((a - b).abs().max() for a, b in pairs) > 1e-4, left_out


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_members_are_eager_single_runs():
    """The compiler must take the gradients that are written out, not those of what is computed."""
    settings = {"lower_leak": "gradient", "losses": {"recon": {"coeff": 1.0}}}
    members, singles = toys(compile=True, **settings), toys(**settings)
    for pair in zip(members, singles, run_both(members, singles), strict=True):
        assert_same(pair[0], pair[1], *pair[2])


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_residual_mlps_are_eager_single_runs(targets: dict[str, Path]):
    """Whose products the compiler takes in another order."""
    changes = ("losses={stochastic_recon_layerwise: {coeff: 1}}", SITES["resid_mlp2"])
    members, singles = (
        [experiment("resid_mlp2", targets["resid_mlp2"], s, *changes, compiled) for s in SEEDS]
        for compiled in ("compile=true", "compile=false")
    )
    for pair in zip(members, singles, run_both(members, singles), strict=True):
        assert_same(pair[0], pair[1], *pair[2])


def test_a_batch_without_room_is_taken_whole_beside_the_others():
    members, singles = (
        [prepared_toy(seed, full_at=3 if seed == 1 else -1) for seed in SEEDS] for _ in range(2)
    )
    full = sparse_batches(1, "train", full_at=0)
    assert singles[1].zero_rows.merge(next(full)).weights is None
    assert singles[1].zero_rows.merge(next(full)).weights is not None
    for pair in zip(members, singles, run_both(members, singles), strict=True):
        assert_same(pair[0], pair[1], *pair[2])


def test_batches_that_need_no_weights_get_none():
    objectives = [prepared.objective for prepared in toys()]
    ensemble = Ensemble(objectives)
    progress, noise = torch.tensor(0.0), {"a": torch.rand(4, 2)}
    same = ensemble.inputs([StepInputs(torch.rand(4, 5), progress, noise) for _ in SEEDS])
    assert same.row_weights is None and same.batch.shape == (3, 4, 5)
    shorter = StepInputs(
        torch.rand(2, 5), progress, {"a": torch.rand(2, 2)}, torch.tensor([0.5, 1.5])
    )
    mixed = ensemble.inputs([StepInputs(torch.rand(4, 5), progress, noise), shorter])
    assert mixed.row_weights is not None
    assert mixed.row_weights.tolist() == [[1, 1, 1, 1], [1, 3, 0, 0]]


def test_a_member_that_is_no_longer_finite_ends_alone():
    def broken(prepared: Prepared) -> Prepared:
        batches = iter(
            [torch.full((512, 5), torch.inf) if i == 5 else torch.rand(512, 5) for i in range(8)]
        )
        return prepared._replace(problem=replace(prepared.problem, train_batches=batches))

    prepared = toys()
    members = [Member(p, Recorder()) for p in (prepared[0], broken(prepared[1]), prepared[2])]
    run_side_by_side(members)
    assert [type(member.failure) for member in members] == [type(None), NonFiniteError, type(None)]
    assert "step 5: loss/" in str(members[1].failure)
    lost = members[1].observer
    assert isinstance(lost, Recorder) and lost.lines[-1][0] == 4
    for member, single in zip(
        (members[0], members[2]), (prepared_toy(0), prepared_toy(5)), strict=True
    ):
        recorder = Recorder()
        run_steps(single, recorder)
        assert isinstance(member.observer, Recorder)
        assert_same(member.prepared, single, member.observer, recorder)


def test_a_checkpoint_of_nothing_finite_is_not_evaluated(tmp_path: Path):
    """What is not finite when it is looked at ends with a message, not in the middle of a metric."""
    prepared = prepared_toy(0)
    with torch.no_grad():
        parameters_of(prepared)[0].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 0: enc\.subcomponents\.V not finite"):
        run_steps(prepared, Recorder())


def run_members(prepared: list[Prepared], folder: Path, **options: Any) -> list[Prepared]:
    members = [
        Member(p, Recorder(), folder / f"seed{p.config.seed}" / "checkpoints") for p in prepared
    ]
    run_side_by_side(members, **options)
    return prepared


def test_a_member_goes_on_alone_from_its_checkpoint_and_the_other_way_round(tmp_path: Path):
    stops = iter([False] * 6 + [True])
    with pytest.raises(Interrupted, match="before step 6 of 8"):
        run_members(toys(), tmp_path, stop_requested=lambda: next(stops))
    undisturbed = toys()
    for single in undisturbed:
        run_steps(single, Recorder(), checkpoints=tmp_path / "alone" / str(single.config.seed))

    alone = prepared_toy(1)
    run_steps(alone, Recorder(), checkpoints=tmp_path / "seed1" / "checkpoints", resume=True)
    others = run_members([prepared_toy(0), prepared_toy(5)], tmp_path, resume=True)
    for own, expected in zip((others[0], alone, others[1]), undisturbed, strict=True):
        for value, other in zip(parameters_of(own), parameters_of(expected), strict=True):
            torch.testing.assert_close(value, other, **TOLERANCE)
    for seed in SEEDS:
        states = [
            load_state(folder / "00000008")
            for folder in (tmp_path / f"seed{seed}" / "checkpoints", tmp_path / "alone" / str(seed))
        ]
        assert states[0].keys() == states[1].keys() and states[0]["data"] == states[1]["data"]
        mine, other = (state["optimizer"] for state in states)
        assert mine["param_groups"] == other["param_groups"]
        for index, moments in other["state"].items():
            for name, value in moments.items():
                torch.testing.assert_close(mine["state"][index][name], value, **TOLERANCE)
        (size, other_size) = (
            (folder / "00000008" / "training_state").stat().st_size
            for folder in (tmp_path / f"seed{seed}" / "checkpoints", tmp_path / "alone" / str(seed))
        )
        assert size < 1.05 * other_size, "a member saves its own part of the stacks alone"


# --- what cannot go side by side ----------------------------------------------------------------------


def test_targets_that_differ_are_refused():
    torch.manual_seed(1)
    other = prepare(
        Problem(TiedMLP(), sparse_batches(1, "train"), sparse_batches(1, "eval")),
        make_config(TERMS, sites={"enc": 6, "dec": 6}),
    )
    with pytest.raises(
        UserError, match=r"seeds: the target's enc.original.weight depends on the seed"
    ):
        run_side_by_side([Member(prepared_toy(0), Recorder()), Member(other, Recorder())])


def test_passes_one_by_one_are_refused():
    members = [Member(p, Recorder()) for p in toys(passes="one_by_one")]
    with pytest.raises(UserError, match=r"seeds: .* passes: one_by_one .*one seed at a time"):
        run_side_by_side(members)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"seeds: .* share one process, here are 2 \(torchrun\)"):
        run_side_by_side([Member(p, Recorder()) for p in toys()])


def test_language_models_are_refused():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    members = []
    for seed in (0, 1):
        problem = Problem(little_model("llama"), iter([tokens]), iter([tokens] * 4), recon="kl")
        sites = {"model.layers.0.mlp.up_proj": 3}
        config = make_config(TERMS, sites=sites, passes="together", seed=seed)
        members.append(Member(prepare(problem, config), Recorder()))
    with pytest.raises(UserError, match="seeds: .*not for language models"):
        run_side_by_side(members)
