"""What several starts are made from, and the loss by which they are compared."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd.config import UserError
from spd.engine import starts
from spd.engine.prepare import Prepared, prepare
from spd.engine.starts import (
    Handed,
    Replayed,
    choice_loss,
    halving_steps,
    n_kept,
    resumable,
    start_of,
    start_seed,
    with_choice,
)
from spd.experiments.resid_mlp import resid_mlp_decomposition
from spd.experiments.tms import tms_decomposition
from spd.noise import Share
from spd.problem import Problem
from spd.runs.cli import checked_config
from tests.engine.test_ensemble import TERMS, prepared_toy, sparse_batches
from tests.run_fixtures import make_target
from tests.toy import TiedMLP, make_config, tensors


def with_starts(n: int = 4, **changes: Any) -> Prepared:
    return prepared_toy(3, starts=n, n_choice_batches=2, **changes)


def test_the_first_start_has_the_seed_of_the_run_and_each_another_one():
    seeds = [start_seed(seed, index) for seed in (0, 1) for index in range(50)]
    assert seeds[0] == 0 and seeds[50] == 1 and len(set(seeds)) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("steps", "halve_at", "expected"),
    [
        (1000, (0.15, 0.3, 0.5), [150, 300, 500, 1000]),
        (4, (0.1, 0.3, 0.35, 0.9), [1, 4]),
        (10, (), [10]),
    ],
    ids=["in full", "short", "at the end alone"],
)
def test_the_steps_of_the_halvings(steps: int, halve_at: tuple[float, ...], expected: list[int]):
    config = make_config(TERMS, steps=steps, halve_at=halve_at)
    assert halving_steps(config) == expected


def test_the_better_half_stays_and_at_the_end_the_best():
    config = make_config(TERMS, steps=10)
    assert [n_kept(n, 5, config) for n in (8, 5, 3, 2)] == [4, 3, 2, 1]
    assert n_kept(5, 10, config) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": 0}, "starts: input should be greater than or equal to 1, got 0"),
        (
            {"halve_at": [0.3, 0.3]},
            r"halve_at: \[0.3, 0.3\]: fractions between 0 and 1, each above",
        ),
        ({"halve_at": [0.0, 0.5]}, r"halve_at: \[0.0, 0.5\]: fractions between 0 and 1"),
        ({"halve_at": [0.5, 1.0]}, r"halve_at: \[0.5, 1.0\]: fractions between 0 and 1"),
        ({"halve_at": [0.5, ".nan"]}, r"halve_at"),
        ({"n_choice_batches": 0}, "n_choice_batches: input should be greater"),
    ],
)
def test_settings_without_a_meaning_are_refused_in_one_line(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said) as caught:
        make_config(TERMS, **changes)
    assert "\n" not in str(caught.value)


# --- a start --------------------------------------------------------------------------------------------


def test_a_start_shares_the_target_and_has_its_own_sites_and_noise():
    base = with_choice(with_starts())
    before = {k: p.clone() for k, p in base.objective.model.subcomponent_parameters().items()}
    first, second = (start_of(base, index, iter(())) for index in (0, 1))
    own, other = (s.objective.model.subcomponent_parameters() for s in (first, second))
    for name, value in before.items():
        assert torch.equal(own[name], value) and own[name].data_ptr() != value.data_ptr()
    assert not torch.equal(other["enc.subcomponents.V"], before["enc.subcomponents.V"])
    batch = base.eval_batches[0]
    assert isinstance(batch, Tensor)
    targets = [run.objective.model.target for run in (base, first, second)]
    frozen = [
        {p.data_ptr() for p in target.parameters() if not p.requires_grad} for target in targets
    ]
    assert frozen[0] == frozen[1] == frozen[2]
    assert torch.equal(targets[0](batch), targets[2](batch))
    assert [p.config.seed for p in (first, second)] == [3, start_seed(3, 1)]
    noise = [
        dict(run.objective.noise(batch, stream="train", seed=run.config.seed, step=0))
        for run in (base, first, second)
    ]
    assert all(torch.equal(noise[0][key], noise[1][key]) for key in noise[0])
    assert not any(torch.equal(noise[0][key], noise[2][key]) for key in noise[0])
    base.objective.model(batch)  # is not over


def test_a_target_that_cannot_be_copied_is_said():
    class Single(TiedMLP):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            raise TypeError("there is one of me")

    problem = Problem(Single(), sparse_batches(0, "train"), sparse_batches(0, "eval"))
    config = make_config(TERMS, sites={"enc": 3, "dec": 3}, starts=2)
    base = with_choice(prepare(problem, config))
    with pytest.raises(UserError, match="starts: .* Single cannot be copied .*there is one of me"):
        start_of(base, 0, iter(()))


# --- the loss of the choice -------------------------------------------------------------------------------


def own_choice(base: Prepared, batches: Iterator[Tensor]) -> Prepared:
    return base._replace(problem=replace(base.problem, choice_batches=batches))


def test_the_loss_of_the_choice_is_the_total_on_batches_of_its_own():
    """With the coefficients, the progress of the step, and the same noise for all starts."""
    losses = {**TERMS, "recon": {"coeff": 0.5}}
    base = with_choice(own_choice(with_starts(losses=losses), sparse_batches(3, "choice")))
    stream = tensors(islice(sparse_batches(3, "choice"), 2))
    assert all(
        isinstance(b, Tensor) and torch.equal(b, own)
        for b, own in zip(base.choice_batches, stream, strict=True)
    )
    start = start_of(base, 1, iter(()))
    parameters = {k: p.detach() for k, p in start.objective.model.subcomponent_parameters().items()}
    expected = 0.0
    for index, batch in enumerate(stream):
        noise = start.objective.draw_noise(batch, stream="choice", seed=3, step=index)
        total, _, _ = start.objective(batch, torch.tensor(4 / 7), noise)
        expected += total.item() / 2
    assert choice_loss(base, parameters, 4, {}) == pytest.approx(expected, rel=1e-5)
    loaded = base.objective.model.subcomponent_parameters()
    assert all(torch.equal(loaded[name], value) for name, value in parameters.items())


def test_the_loss_of_the_choice_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch):
    seen = []
    original = starts.contexts

    def watched(*args: Any, **options: Any) -> Any:
        seen.append((args[2], options["progress"]))
        return original(*args, **options)

    monkeypatch.setattr(starts, "contexts", watched)
    base = with_choice(with_starts())
    parameters = dict(base.objective.model.subcomponent_parameters())
    for step in (0, 4, 8):
        choice_loss(base, {k: p.detach() for k, p in parameters.items()}, step, {})
    assert seen == [("choice", 0.0), ("choice", 4 / 7), ("choice", 1.0)]


def test_without_batches_of_its_own_those_after_the_verdict_serve():
    base = with_choice(with_starts(n_eval_batches=3))
    stream = tensors(islice(sparse_batches(3, "eval"), 5))
    found = [*tensors(base.eval_batches), *tensors(base.choice_batches)]
    assert all(torch.equal(b, own) for b, own in zip(found, stream, strict=True))


def test_too_few_batches_are_refused():
    base = own_choice(with_starts(), iter([torch.rand(4, 5)]))
    with pytest.raises(
        UserError, match="n_choice_batches: 2 are .* but choice_batches ended after 1"
    ):
        with_choice(base)
    problem = replace(base.problem, eval_batches=iter([torch.rand(4, 5)]), choice_batches=())
    with pytest.raises(UserError, match="but the held-out data after those of the verdict ended"):
        with_choice(base._replace(problem=problem))


def test_several_processes_have_one_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(starts, "own_share", lambda: Share(0, 2))
    with pytest.raises(UserError, match=r"starts: 4, but a run of 2 processes \(torchrun\)"):
        with_choice(with_starts())


def test_starts_that_cannot_go_together_are_refused_where_they_are_to():
    with pytest.raises(UserError, match=r"execution.starts_together: true, but .*one_by_one"):
        with_choice(with_starts(passes="one_by_one", starts_together=True))
    assert not starts.goes_together(with_starts(passes="one_by_one"))
    assert starts.goes_together(with_starts())
    assert not starts.goes_together(with_starts(starts_together=False))


@pytest.mark.parametrize(
    ("name", "build"),
    [("tms_5-2", tms_decomposition.build), ("resid_mlp1", resid_mlp_decomposition.build)],
)
def test_training_choice_and_verdict_never_see_the_same_batch(
    tmp_path: Path, name: str, build: Any
):
    target = make_target(tmp_path / "target", name)
    config = checked_config(name, [f"target={target}", "batch_size=64", "eval_batch_size=64"])
    problem = build(config, torch.device("cpu"))
    streams = (problem.train_batches, problem.eval_batches, problem.choice_batches)
    drawn = [tensors(islice(stream, 4)) for stream in streams]
    everything = [batch for batches in drawn for batch in batches]
    assert all(batch.any() for batch in everything)
    pairs = [(a, b) for i, a in enumerate(everything) for b in everything[i + 1 :]]
    assert not any(torch.equal(a, b) for a, b in pairs)


# --- the data of training -----------------------------------------------------------------------------


def test_each_batch_is_handed_to_every_start():
    source = sparse_batches(0, "train")
    handed = Handed(source, 3)
    expected = tensors(islice(sparse_batches(0, "train"), 3))
    for batch in expected[:2]:
        assert all(torch.equal(next(handed), batch) for _ in range(3))
    state = handed.state_dict()
    next(handed)
    for _ in range(3):  # as each start does it
        handed.load_state_dict(state)
    assert all(torch.equal(next(handed), expected[2]) for _ in range(3))


def test_batches_without_a_position_are_gone_through_again():
    batches = Replayed(iter(range(10)))
    begin = batches.state_dict()
    assert list(islice(batches, 3)) == [0, 1, 2]
    batches.load_state_dict(begin)
    assert list(islice(batches, 4)) == [0, 1, 2, 3]
    batches.forget()
    with pytest.raises(UserError, match="resume: the training batches have no state_dict"):
        batches.load_state_dict(begin)
    state = batches.state_dict()
    assert list(islice(batches, 2)) == [4, 5]
    batches.load_state_dict(state)
    batches.again = False
    assert list(batches) == [4, 5, 6, 7, 8, 9] and not batches.kept


def test_batches_with_a_position_stay_what_they_are():
    source = sparse_batches(0, "train")
    assert resumable(source) is source
    assert isinstance(resumable(iter([1])), Replayed)
