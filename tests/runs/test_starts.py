"""Several starts for a library user: the survivor is the run that its seed would have been alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spd
from spd.engine.prepare import Prepared
from spd.engine.starts import start_seed, with_choice
from spd.optimize import NonFiniteError, Silent
from spd.problem import Problem
from spd.reports.results import Start, Starts
from spd.runs import starts
from spd.runs.library import Result
from spd.runs.starts import Keeping, halve, judged
from spd.spd_config import SPDConfig
from tests.engine.test_ensemble import TERMS, TOLERANCE, prepared_toy, sparse_batches
from tests.little_lm import little_model
from tests.test_optimize import Recorder
from tests.toy import MLP, TiedMLP, make_config

pytestmark = pytest.mark.undrawn

STEPS = 20


def toy_problem() -> Problem:
    torch.manual_seed(0)
    return Problem(
        TiedMLP(),
        sparse_batches(0, "train"),
        sparse_batches(0, "eval"),
        choice_batches=sparse_batches(0, "choice"),
        independent_rows=True,
        tied_sites=(("enc", "dec"),),
    )


def toy_config(**changes: Any) -> SPDConfig:
    settings = {
        **{"sites": {"enc": 6, "dec": 6}, "steps": STEPS, "lr": 1e-2, "log_every": 1},
        **{"eval_every": 5, "starts": 4, "n_choice_batches": 2, "lr_schedule": {"type": "linear"}},
    }
    return make_config(TERMS, **{**settings, **changes})


def alone(problem: Problem, config: SPDConfig, seed: int) -> Result:
    own = config.model_copy(update={"starts": 1, "seed": seed})
    return spd.decompose(problem, own, quiet=True)


def chosen_of(result: Result) -> Start:
    (chosen,) = (start for start in result.starts if start.chosen)
    return chosen


def parameters_of(result: Result) -> dict[str, Tensor]:
    return {k: p.detach() for k, p in result.model.subcomponent_parameters().items()}


@pytest.mark.parametrize(
    "together",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["together", "one after the other"],
)
def test_the_survivor_is_the_run_of_its_seed_alone(together: bool):
    """To the last bit where it was trained alone, to the rounding of an ensemble where it was not."""
    # the lowest losses are those of another start than the first
    config = toy_config(seed=1, starts_together=together)
    result = spd.decompose(toy_problem(), config, quiet=True)
    chosen = chosen_of(result)
    assert chosen.index > 0 and chosen.seed == start_seed(1, chosen.index)
    single = alone(toy_problem(), config, chosen.seed)
    assert len(result.history) == len(single.history) == STEPS + 5
    for row, own in zip(result.history, single.history, strict=True):
        assert row.keys() == own.keys()
        assert row == (pytest.approx(own, rel=1e-5, abs=1e-5) if together else own)
    for name, value in parameters_of(single).items():
        torch.testing.assert_close(parameters_of(result)[name], value, **TOLERANCE)
        assert together or torch.equal(parameters_of(result)[name], value)


def test_what_became_of_each_start():
    config = toy_config(halve_at=(0.2, 0.5))
    result = spd.decompose(toy_problem(), config, quiet=True)
    assert [start.index for start in result.starts] == [0, 1, 2, 3]
    dropped = [start.dropped for start in result.starts]
    assert sorted(dropped, key=str) == [10, 4, 4, None]
    for start in result.starts:
        steps = {4} if start.dropped == 4 else {4, 10}
        assert set(start.losses) == steps and (start.reason == "") == start.chosen
    (last,) = (start for start in result.starts if start.dropped == 10)
    chosen = chosen_of(result)
    assert chosen.losses[10] < last.losses[10]
    assert last.reason == "place 2 of 2 by its loss on the data of the choice"
    assert f"Start {chosen.index} of 0 to 3 (seed {chosen.seed}), chosen by" in result.summary()
    assert "before step 4;" in result.summary() and "before step 10." in result.summary()


def test_without_a_halving_the_best_at_the_end_is_chosen():
    config = toy_config(halve_at=(), starts=3)
    result = spd.decompose(toy_problem(), config, quiet=True)
    assert [set(start.losses) for start in result.starts] == [{STEPS}] * 3
    best = min(result.starts, key=lambda start: start.losses[STEPS])
    assert chosen_of(result) == best
    assert [start.dropped for start in result.starts if start is not best] == [STEPS] * 2
    assert result.history[-1]["step"] == STEPS and "eval/loss/total" in result.history[-1]


@pytest.mark.slow
def test_the_choice_does_not_look_at_the_verdict():
    """Other held-out data lead to the same choice, by the same losses."""
    config = toy_config()
    first = spd.decompose(toy_problem(), config, quiet=True)
    other = replace(toy_problem(), eval_batches=sparse_batches(7, "other"), independent_rows=False)
    same = replace(
        toy_problem(), independent_rows=False
    )  # whose share of zero rows is not estimated
    found = [spd.decompose(problem, config, quiet=True) for problem in (other, same)]
    assert found[0].starts == found[1].starts
    assert found[0].history[-1] != found[1].history[-1]
    assert [start.index for start in first.starts] == [0, 1, 2, 3]


def test_a_user_is_told_of_the_survivor_alone(capsys: pytest.CaptureFixture[str]):
    recorder = Recorder()
    result = spd.decompose(toy_problem(), toy_config(), observer=recorder)
    assert capsys.readouterr() == ("", "")
    assert result.history == [{"step": step, **values} for step, values in recorder.lines]
    shown = spd.decompose(toy_problem(), toy_config())
    out, err = capsys.readouterr()
    assert shown.history == result.history
    assert out.splitlines()[-1].startswith(f"step {STEPS}:") and f"{STEPS}/{STEPS}" in err


def plain_problem(**changes: Any) -> Problem:
    """With batches that do not know their position."""

    def drawn(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.rand(16, 4, generator=generator)

    torch.manual_seed(0)
    return Problem(
        **{"target": MLP(), "train_batches": drawn(0), "eval_batches": drawn(1)} | changes
    )


@pytest.mark.parametrize(
    "together",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["together", "one after the other"],
)
def test_batches_that_do_not_know_their_position_will_do(together: bool):
    config = toy_config(
        sites={"first": 6}, steps=8, eval_every=4, starts_together=together, halve_at=(0.25, 0.5)
    )
    result = spd.decompose(plain_problem(), config, quiet=True)
    single = alone(plain_problem(), config, chosen_of(result).seed)
    for name, value in parameters_of(single).items():
        torch.testing.assert_close(parameters_of(result)[name], value, **TOLERANCE)
    assert getattr(result.prepared.problem.train_batches, "kept", None) == []


@pytest.mark.slow
def test_language_models_go_one_after_the_other():
    def problem() -> Problem:
        def tokens(seed: int) -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield torch.randint(40, (2, 6), generator=generator)

        torch.manual_seed(0)
        return Problem(little_model("llama"), tokens(0), tokens(1), recon="kl")

    config = toy_config(
        sites={"model.layers.0.mlp.up_proj": 3},
        steps=4,
        starts=3,
        n_eval_batches=1,
        halve_at=(0.5,),
    )
    result = spd.decompose(problem(), config, quiet=True)
    single = alone(problem(), config, chosen_of(result).seed)
    assert result.history == single.history
    for name, value in parameters_of(single).items():
        assert torch.equal(parameters_of(result)[name], value)


# --- starts that fail --------------------------------------------------------------------------------


def broken_in(monkeypatch: pytest.MonkeyPatch, *indices: int) -> None:
    """What these starts begin with is not finite."""
    original = starts.start_of

    def broken(prepared: Prepared, index: int, batches: Any) -> Prepared:
        start = original(prepared, index, batches)
        if index in indices:
            model = start.objective.model
            with torch.no_grad():
                next(iter(model.subcomponent_parameters().values())).fill_(1e30)
        return start

    monkeypatch.setattr(starts, "start_of", broken)


@pytest.mark.parametrize(
    "together",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["together", "one after the other"],
)
def test_a_start_that_is_not_finite_is_dropped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, together: bool
):
    config = toy_config(starts_together=together, log_every=2)
    whole = spd.decompose(toy_problem(), config, quiet=True)
    bad = next(start.index for start in whole.starts if start.dropped == 3)
    broken_in(monkeypatch, bad)
    result = spd.decompose(toy_problem(), config, quiet=True)
    found = result.starts[bad]
    assert found.dropped == 0 and found.reason.startswith("step 0: loss/") and not found.losses
    assert sum(3 in start.losses for start in result.starts) == 3
    assert sorted(str(start.dropped) for start in result.starts) == ["0", "3", "6", "None"]


@pytest.mark.parametrize(
    "together",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["together", "one after the other"],
)
def test_where_no_start_is_left_the_run_fails(monkeypatch: pytest.MonkeyPatch, together: bool):
    broken_in(monkeypatch, 0, 1)
    config = toy_config(starts=2, starts_together=together)
    with pytest.raises(
        NonFiniteError, match="no start is left: start 0: step 0: .*; start 1: step"
    ):
        spd.decompose(toy_problem(), config, quiet=True)


def test_the_only_one_that_is_left_is_the_run(monkeypatch: pytest.MonkeyPatch):
    broken_in(monkeypatch, 0)
    result = spd.decompose(toy_problem(), toy_config(starts=2), quiet=True)
    assert chosen_of(result).index == 1 and not chosen_of(result).losses
    single = alone(toy_problem(), toy_config(), start_seed(0, 1))
    for name, value in parameters_of(single).items():
        torch.testing.assert_close(parameters_of(result)[name], value, **TOLERANCE)


@pytest.mark.slow
def test_starts_that_do_not_fit_into_memory_go_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    original, widths = starts.run_side_by_side, []

    def small(members: Any, **options: Any) -> None:
        widths.append(len(members))
        if len(members) > 1:
            raise torch.OutOfMemoryError("no room")
        original(members, **options)

    monkeypatch.setattr(starts, "run_side_by_side", small)
    records: list[Starts] = []
    base = with_choice(prepared_toy(0, starts=3, n_choice_batches=1, halve_at=[0.5]))
    keeping = Keeping(
        lambda index: tmp_path / str(index), lambda *_: Silent(), lambda _: {}, records.append
    )
    found = halve(base, keeping)
    assert widths == [3, 1, 1, 1, 1, 1]  # to the half, and two of them to the end
    assert [record.together for record in records] == [True, *[False] * (len(records) - 1)]
    assert found.chosen is not None and not found.together


def test_the_lowest_finite_losses_stay():
    record = Starts(together=True, starts=tuple(Start(index=i, seed=i) for i in range(5)))
    losses = {0: 3.0, 1: float("nan"), 2: 1.0, 3: 2.0, 4: float("inf")}
    found = judged(record, losses, 7, keep=2)
    assert [start.index for start in found.left] == [2, 3]
    assert found.starts[1].reason == "its loss on the data of the choice is nan"
    assert found.starts[4].reason == "its loss on the data of the choice is inf"
    assert found.starts[0].reason == "place 3 of 5 by its loss on the data of the choice"
    assert [start.losses for start in found.starts] == [{7: 3.0}, {}, {7: 1.0}, {7: 2.0}, {}]
    assert {start.dropped for start in found.starts} == {7, None}
    tied = judged(record, dict.fromkeys(range(5), 1.0), 7, keep=2)
    assert [start.index for start in tied.left] == [0, 1]
