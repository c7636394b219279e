"""The verdict that needs no solution beside the full one, over finished runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from spd.evals.confusion import Confusion, Near, beside_the_best, confusion, judged, main, runs_in
from tests.evals.many_runs import ended_study

FINE = {
    "unfaithful/linear1": 0.01,
    "lost_effect/linear1": 0.02,
    "idle_importance/linear1": 0.0,
    "adversarial/20_steps": 0.03,
    "effect_errors/linear1": 0,
    "wrong_weights/linear1": 0,
}


def run(
    place: Path, *, solved: bool | None, target_seed: int | None = None, **figures: Any
) -> Path:
    """A finished run with these figures, named with `__` for `/`, in place of fine ones."""
    place.mkdir(parents=True)
    values = {**FINE, "loss/total": 1.0} | {k.replace("__", "/"): v for k, v in figures.items()}
    rows = [{"metric": k, "key": k, "value": v} for k, v in values.items() if v is not None]
    whole = {"experiment": "toy", "seed": 0, "steps": 10, "seconds": 1.0, "solved": solved}
    (place / "result.json").write_text(json.dumps({**whole, "rows": rows}))
    (place / "config.yaml").write_text(f"target_seed: {json.dumps(target_seed)}\n")
    return place


def test_a_table_counts_who_says_what():
    pairs = [(True, True)] * 7 + [(True, False)] + [(False, False)] * 2
    found = confusion(pairs)
    assert found == Confusion(both=7, only_full=1, only_without=0, neither=2)
    assert found.agreement.k == 9 and found.agreement.n == 10
    assert found.agreement.interval == pytest.approx((0.596, 0.982), abs=1e-3)
    assert "9 of 10 (0.60–0.98)" in found.lines("accepted")[-1]
    assert found.lines("accepted")[-1].endswith('false "solved": 0 of 2 not solved')


def test_what_compares_with_a_solution_is_not_looked_at(tmp_path: Path):
    """Errors in the mechanisms alone cannot be seen without one; a figure beyond its limit can."""
    unseen = judged(run(tmp_path / "a", solved=False, effect_errors__linear1=3))
    seen = judged(run(tmp_path / "b", solved=False, lost_effect__linear1=0.4))
    assert unseen is not None and unseen.without_solution and not unseen.solved
    assert seen is not None and not seen.without_solution
    assert "data" in seen.open_points[0]


def test_a_loss_far_above_the_lowest_of_its_group_refuses(tmp_path: Path):
    """Each target has a group of its own."""
    given = [(1.0, 0), (1.06, 0), (1.07, 0), (5.0, 1), (5.2, 1)]
    runs = [
        judged(run(tmp_path / f"{i}", solved=True, target_seed=target, loss__total=loss))
        for i, (loss, target) in enumerate(given)
    ]
    found = beside_the_best([own for own in runs if own is not None], Near(loss=0.065))
    assert [len(why) for why in found] == [0, 0, 1, 0, 0]
    assert "7.0% above the lowest" in found[2][0]


def test_an_adversary_that_costs_more_than_the_best_run_refuses(tmp_path: Path):
    """The best is the run of the lowest loss, also where another one withstands more."""
    given = [(1.0, 0.030), (1.01, 0.020), (1.02, 0.034), (1.03, 0.035), (1.04, None)]
    runs = [
        judged(run(tmp_path / f"{i}", solved=True, loss__total=loss, adversarial__20_steps=cost))
        for i, (loss, cost) in enumerate(given)
    ]
    found = beside_the_best([own for own in runs if own is not None], Near(adversary=0.15))
    assert [len(why) for why in found] == [0, 0, 0, 1, 1]
    assert "17% more than the best" in found[3][0] and "no figure" in found[4][0]


def test_a_run_without_a_known_solution_is_left_out(tmp_path: Path):
    none = dict.fromkeys(("effect_errors__linear1", "wrong_weights__linear1"))
    assert judged(run(tmp_path / "a", solved=True, **none)) is None


def test_runs_are_found_in_a_folder_in_a_study_and_by_themselves(tmp_path: Path):
    study = ended_study(tmp_path / "out", 2)
    assert [place.name for place in runs_in(study.directory)] == ["many-seed0", "many-seed1"]
    alone = run(tmp_path / "runs" / "a", solved=True)
    run(alone / "starts" / "1", solved=True)  # of a start that was dropped
    assert runs_in(tmp_path / "runs") == runs_in(alone) == [alone]


def test_the_command_prints_each_group_and_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path / "a", solved=True)
    run(tmp_path / "b", solved=False, effect_errors__linear1=2, loss__total=1.2)
    run(tmp_path / "c", solved=True, target_seed=1, lost_effect__linear1=0.2)
    main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "toy, 10 steps, target seed 1: 1 run" in said
    whole = said.partition("all: 3 runs")[2]
    assert "agreement: 1 of 3" in whole and "agreement: 2 of 3" in whole
    assert "c: solved, but linear1: data: 0.2 of the effects lie where g < 0.5" in whole


def test_a_place_without_runs_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "no finished run there" in capsys.readouterr().err
