"""Seeds side by side are what each would be alone; the best is kept, and a bad best is refused."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spd.experiments.target_training import (
    TargetError,
    TargetTrainConfig,
    choose_seed,
    eval_losses,
    refuse_lost_features,
    seed_table,
    stack_seeds,
    train_side_by_side,
    training_record,
)
from spd.schedule import ScheduleConfig

CPU = torch.device("cpu")
SETTINGS = TargetTrainConfig(
    seed=3,
    n_seeds=4,
    steps=25,
    batch_size=16,
    lr=0.02,
    lr_schedule=ScheduleConfig(type="cosine"),
    weight_decay=0.1,
)


def draw(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "w": torch.randn(3, 2, generator=generator),
        "fixed": torch.randn(2, generator=generator),
    }


def loss(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
    return ((batch @ weights["w"]).tanh() - weights["fixed"]).square().mean()


def batches() -> Iterator[Tensor]:
    for i in itertools.count():
        yield torch.randn(16, 3, generator=torch.Generator().manual_seed(i))


def side_by_side(seeds: list[int]) -> dict[str, Tensor]:
    initial = stack_seeds(draw, seeds, CPU)
    frozen = {"fixed": initial.pop("fixed")}
    return train_side_by_side(loss, initial, batches(), frozen=frozen, config=SETTINGS)


def test_side_by_side_equals_a_plain_training_loop_per_seed():
    trained = side_by_side(SETTINGS.seeds)
    initial = stack_seeds(draw, SETTINGS.seeds, CPU)
    for i in range(SETTINGS.n_seeds):
        w = initial["w"][i].clone().requires_grad_()
        optimizer = torch.optim.AdamW([w], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: float(torch.cos(torch.tensor(0.5 * torch.pi * t / 24)))
        )
        for batch in itertools.islice(batches(), SETTINGS.steps):
            optimizer.zero_grad()
            loss({"w": w, "fixed": initial["fixed"][i]}, batch).backward()
            optimizer.step()
            cosine.step()
        torch.testing.assert_close(trained["w"][i], w.detach(), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(w, initial["w"][i], atol=1e-2), "nothing was learned"


def test_a_seed_does_not_depend_on_its_neighbours():
    torch.testing.assert_close(side_by_side([5])["w"][0], side_by_side([3, 4, 5, 6])["w"][2])


def test_training_twice_gives_the_same_bits_and_leaves_the_surroundings_alone():
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    assert torch.equal(side_by_side([3, 4])["w"], side_by_side([3, 4])["w"])
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.slow
def test_compiled_training_equals_eager_training():
    initial = stack_seeds(draw, [0, 1], CPU)
    frozen = {"fixed": initial.pop("fixed")}
    config = SETTINGS.model_copy(update={"steps": 600})
    eager, compiled = (
        train_side_by_side(
            loss, initial, batches(), frozen=frozen, config=config, compiled=compiled
        )
        for compiled in (False, True)
    )
    torch.testing.assert_close(eager["w"], compiled["w"], atol=1e-3, rtol=1e-3)


def test_the_given_parameters_keep_their_values():
    initial = stack_seeds(draw, [0, 1], CPU)
    frozen = {"fixed": initial.pop("fixed")}
    before = initial["w"].clone()
    trained = train_side_by_side(loss, initial, batches(), frozen=frozen, config=SETTINGS)
    assert torch.equal(initial["w"], before) and not initial["w"].requires_grad
    assert not torch.equal(trained["w"], before) and not trained["w"].requires_grad


def test_eval_losses_are_means_over_batches_for_each_seed():
    weights = stack_seeds(draw, [0, 1], CPU)
    losses = eval_losses(loss, weights, batches())
    for i in range(2):
        member = {name: value[i] for name, value in weights.items()}
        naive = [loss(member, batch) for batch in itertools.islice(batches(), 10)]
        torch.testing.assert_close(losses[i], torch.stack(naive).mean())


def test_the_seed_with_most_features_wins_then_the_lowest_loss():
    outputs = torch.tensor([[0.7, 0.3], [0.4, 0.4], [0.375, 0.9], [0.7, float("nan")]])
    losses = torch.tensor([0.1, 0.4, 0.3, float("nan")])
    assert choose_seed(outputs, losses, required=0.375) == 2
    assert choose_seed(outputs[[0, 3]], losses[[0, 3]], required=0.375) == 0
    assert choose_seed(outputs[[3, 0]], losses[[3, 0]], required=0.375) == 1


def record(outputs: list[list[float]]) -> dict:
    return training_record(
        torch.tensor(outputs),
        torch.arange(1.0, 1.0 + len(outputs)),
        required=0.375,
        probe=0.75,
        seeds=list(range(8, 8 + len(outputs))),
        seconds=1.23,
    )


def test_the_record_and_the_table_hold_every_seed():
    kept = record([[0.7, 0.0], [0.5, 0.6], [float("nan"), 0.5]])
    assert kept["chosen_seed"] == 9
    assert [row["n_represented"] for row in kept["seeds"]] == [1, 2, 1]
    assert kept["seeds"][2]["outputs_at_probe"] == [None, 0.5]
    assert kept["seeds"][1]["outputs_at_probe"] == pytest.approx([0.5, 0.6])
    lines = seed_table(kept).splitlines()
    assert len(lines) == 4
    assert ["chosen" in line for line in lines] == [False, False, True, False]
    assert "2/2" in lines[2] and "0.500 to 0.600" in lines[2]


def test_a_target_that_lost_a_feature_is_refused_with_what_was_tried():
    refuse_lost_features(record([[0.7, 0.0], [0.5, 0.6]]))
    with pytest.raises(TargetError) as caught:
        refuse_lost_features(record([[0.7, 0.0], [0.3, 0.3], [0.0, 0.374]]))
    message = str(caught.value)
    for said in ("none of 3 seeds", "all 2 features", "8: 1, 9: 0, 10: 0", "seed=11", "n_seeds=6"):
        assert said in message
