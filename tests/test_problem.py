"""What the core says to data that does not suit it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spd.config import RunError, UserError
from spd.engine.prepare import prepare
from spd.kernels import kl_per_row
from spd.metrics import column_match
from spd.problem import NamedTensors, Problem
from spd.runs.library import decompose
from spd.spd_config import SPDConfig
from tests.toy import make_config

CONFIG = SPDConfig(
    sites={"0": 3},
    losses={"faithfulness": {"coeff": 1.0}},  # pyright: ignore[reportArgumentType]
    steps=5,
    lr=1e-3,
    n_eval_batches=2,
)


def batches(n: int) -> Iterator[Tensor]:
    return iter([torch.ones(4, 2)] * n)


def problem(*, n_train: int = 5, n_eval: int = 2) -> Problem:
    return Problem(nn.Sequential(nn.Linear(2, 2)), batches(n_train), batches(n_eval))


def test_just_enough_data_will_do() -> None:
    decompose(problem(), CONFIG, quiet=True)


def test_training_data_that_ends_early() -> None:
    with pytest.raises(RunError, match="ended before step 3 of 5"):
        decompose(problem(n_train=3), CONFIG, quiet=True)


@pytest.mark.parametrize("n_eval", [0, 1])
def test_too_little_held_out_data(n_eval: int) -> None:
    with pytest.raises(UserError, match=f"n_eval_batches: 2 are wanted.* ended after {n_eval}"):
        prepare(problem(n_eval=n_eval), CONFIG)


def test_a_column_of_zeros_counts_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    match = column_match(weight, torch.eye(2), torch.eye(2).flip(0))
    assert match.mmcs.tolist() == [0.0, 1.0] and match.ml2r.tolist() == [0.0, 1.0]


XS = torch.arange(24.0).reshape(12, 2)


@pytest.mark.parametrize(
    "held",
    [
        DataLoader(XS, batch_size=4),  # pyright: ignore[reportArgumentType]
        DataLoader(TensorDataset(XS, XS), batch_size=4),
        list(XS.split(4)),
        [(x, x) for x in XS.split(4)],
    ],
    ids=["DataLoader", "pairs of a DataLoader", "list", "pairs"],
)
def test_what_holds_batches_is_taken_and_begins_again(
    held: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="spd"):  # what a library user sees
        own = Problem(nn.Linear(2, 2), held, held)
        seen = torch.cat([next(own.train_batches) for _ in range(9)])
    assert torch.equal(seen, XS.repeat(3, 1))
    assert caplog.messages == ["train_batches: ended after 3 batches, and begins again"]
    assert torch.equal(torch.cat(list(own.eval_batches)), XS), "held-out data is not repeated"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (XS, r"train_batches: a Tensor of shape \(12, 2\); a DataLoader, a list"),
        (None, "train_batches: None; a DataLoader, a list"),
        ({"x": XS}, "train_batches: a dict; a DataLoader, a list"),
        (["text"], "train_batches: a batch is a str; a Tensor, names with Tensors, or"),
        ([{"x": XS, "y": 3}], "train_batches: in batch 1, 'y' is a int; a batch of names has a T"),
        ([{}], "train_batches: in batch 1, no name; a batch of names has a Tensor for each"),
        ([{"x": XS, "y": XS[1:]}], r"batch 1 has different numbers of examples \(x 12, y 11\)"),
        ([torch.tensor(1.0)], "batch 1 is one number; a Tensor with an axis is needed"),
        ([list(XS)], "batch 1 is a list of 12 Tensors of one shape; a Tensor that holds them all"),
    ],
)
def test_what_holds_no_batches_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        next(Problem(nn.Linear(2, 2), given, batches(1)).train_batches)


def test_weights_of_rows_that_are_merged_are_refused() -> None:
    """A zero row that stands for many can have no weight of its own."""
    given = {"independent_rows": True, "position_weights": lambda batch: torch.ones(len(batch))}
    with pytest.raises(UserError, match="independent_rows: True merges the rows without input"):
        Problem(nn.Linear(2, 2), batches(1), batches(1), **given)


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(2, 2), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda y: (y,), "a tuple of 1"),
        (lambda y: {"logits": y}, "a dict with the keys logits"),
        (lambda y: None, "None"),
        (lambda y: y.argmax(dim=-1), "a Tensor of torch.int64"),
    ],
)
def test_a_target_gives_one_tensor(wrap: Callable[[Tensor], Any], said: str) -> None:
    config = CONFIG.model_copy(update={"sites": {"linear": 3}})
    with pytest.raises(UserError, match=f"target: Returns returns {said}; one Tensor of numbers"):
        prepare(Problem(Returns(wrap), batches(1), batches(2)), config)


def test_where_the_target_gives_probability_0_the_divergence_is_that_of_the_rest() -> None:
    target, logits = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    target[:, 1] = -torch.inf
    kept = [0, 2, 3]
    p = target[:, kept].softmax(dim=-1)
    expected = (p * (p.log() - logits.log_softmax(dim=-1)[:, kept])).sum(dim=-1)
    torch.testing.assert_close(kl_per_row(logits, target), expected)
    both = logits.detach().masked_fill(target == -torch.inf, -torch.inf).requires_grad_()
    kl_per_row(both, target).sum().backward()
    assert both.grad is not None and both.grad.isfinite().all() and both.grad[:, 1].eq(0).all()


@pytest.mark.parametrize(
    ("recon", "hint"), [("KL", "did you mean 'kl'"), ("ce", ""), ("msee", "'mse'")]
)
def test_a_divergence_that_there_is_not_is_refused(recon: Any, hint: str) -> None:
    own = problem()
    object.__setattr__(own, "recon", recon)  # the type check of the tests comes before our own
    with pytest.raises(UserError, match=f"recon: {recon!r} is no divergence.*{hint}.*mse.* and kl"):
        own.__post_init__()


FAITHFUL = {"faithfulness": {"coeff": 1.0}}


class Noisy(nn.Module):
    """Random in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.dropout(x, 0.5))


def test_a_target_that_is_random_is_refused():
    batches = [torch.randn(16, 8)]
    problem = Problem(Noisy(), train_batches=batches, eval_batches=batches)
    with pytest.raises(UserError, match="target: Noisy gives two different outputs for one batch"):
        prepare(problem, make_config(FAITHFUL, sites={"linear": 4}, n_eval_batches=1))


def test_training_mode_does_not_wake_the_targets_dropout():
    target, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.randn(16, 8)
    problem = Problem(target, train_batches=[x], eval_batches=[x])
    model = prepare(
        problem, make_config(FAITHFUL, sites={"0": 4}, n_eval_batches=1)
    ).objective.model
    expected = model.target_forward(x).output
    assert torch.equal(model.train().target_forward(x).output, expected)


class Two(nn.Module):
    """Two streams of different lengths, as an encoder and a decoder have them."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, memory: Tensor, own: Tensor) -> Tensor:
        return self.write(own).relu() + self.read(memory).mean(dim=1, keepdim=True)


class Packed(nn.Module):
    """The same of one Tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        memory, own = x[:, :20].view(-1, 5, 4), x[:, 20:].view(-1, 2, 3)
        return self.write(own).relu() + self.read(memory).mean(dim=1, keepdim=True)


LOSSES = {
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-3, "pnorm": 1.0},
}


@pytest.mark.parametrize("passes", ["together", "one_by_one"])
@pytest.mark.parametrize("n_examples", [1, 3])
def test_a_batch_of_several_tensors_by_name(passes: str, n_examples: int) -> None:
    """Gives the numbers of the same data in one Tensor."""
    data = [torch.randn(n_examples, 26) for _ in range(3)]
    named = [{"memory": x[:, :20].view(-1, 5, 4), "own": x[:, 20:].view(-1, 2, 3)} for x in data]
    changes: dict[str, Any] = {"sites": {"read": 5, "write": 3}, "steps": 3, "n_eval_batches": 1}
    config = make_config(LOSSES, passes=passes, log_every=1, **changes)
    histories = []
    for kind, given in ((Packed, data), (Two, named)):
        torch.manual_seed(0)
        result = decompose(Problem(kind(), given, given[:1]), config, quiet=True)
        histories.append(result.history)
    assert histories[0] == histories[1] and len(histories[0]) > 3
    model = result.model
    assert model.importances(named[0]).lower["read"].shape == (n_examples, 5, 5)
    assert torch.equal(model(named[0]), model(NamedTensors(named[0])))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"memory": torch.ones(2, 5, 4)}, r"memory \(2, 5, 4\): TypeError: .*'own'; a batch is"),
        (torch.ones(2, 5, 4), r"a Tensor of shape \(2, 5, 4\): TypeError: .*'own'"),
    ],
)
def test_a_batch_that_the_target_cannot_take_is_refused_in_one_line(batch: Any, said: str) -> None:
    config = make_config(LOSSES, sites={"read": 5}, n_eval_batches=1)
    with pytest.raises(UserError, match=f"target: Two fails on the first batch .*{said}"):
        prepare(Problem(Two(), [batch], [batch]), config)
