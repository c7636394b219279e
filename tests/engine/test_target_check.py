"""A target, a batch or a problem that cannot be right is refused before anything is trained."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spd
from spd.components import decomposable
from spd.config import UserError
from spd.engine.ensemble import Alone
from spd.engine.prepare import Prepared, prepare
from spd.problem import Identity, Problem, as_batch

LOSSES: dict[str, Any] = {"faithfulness": {"coeff": 1.0}, "stochastic_recon": {"coeff": 1.0}}


def prepared(
    target: nn.Module, sites: dict[str, int], batch: Tensor | None = None, **problem: Any
) -> Prepared:
    batches = [torch.randn(16, 8) if batch is None else batch]
    return prepare(Problem(target, batches, batches, **problem), config_of(sites))


def config_of(sites: dict[str, int]) -> spd.SPDConfig:
    return spd.SPDConfig.model_validate(
        {"sites": sites, "losses": LOSSES, "steps": 2, "lr": 1e-2, "n_eval_batches": 1}
    )


class Parts(nn.Module):
    """Two matrices, and what a test does with them."""

    def __init__(self, run: Callable[["Parts", Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def some_rows(parts: Parts, x: Tensor) -> Tensor:
    h = parts.a(x)
    out, on = h.clone(), h[:, 0] > 0
    out[on] = parts.b(h[on])
    return out


NO_LOGITS = torch.tensor([0.0] * 7 + [-torch.inf])


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            lambda s, x: F.linear(s.a(x), s.a.weight.T) + s.b(x),
            "reads the weight of 'a' besides calling",
        ),
        (some_rows, r"masks: 'b' reads \(\d+,\) rows in a masked pass, for masks of \(\d+,\)"),
        (lambda s, x: s.b(s.a(x).detach()), "no gradient of the output reaches 'a', though"),
        (lambda s, x: s.b(s.a(x)).detach(), "Parts gives an output without gradient"),
        (lambda s, x: s.b(s.a(x.sub_(1))), r"changes the batch that it is given.*x\.clone"),
        (lambda s, x: s.b(s.a(x)).mean(), r"returns a Tensor of shape \(\); a dense"),
        (lambda s, x: s.b(s.a(x)).to_sparse(), "torch.sparse_coo; a dense Tensor"),
        (lambda s, x: s.b(s.a(x))[:, :0], r"shape \(16, 0\); a dense Tensor .* with entries"),
        (lambda s, x: s.b(s.a(x)) * torch.nan, "among 128 numbers, 128 of nan; recon: mse needs"),
        (lambda s, x: s.b(s.a(x)) + NO_LOGITS, "16 of -inf; recon: mse needs finite"),
    ],
)
def test_what_a_target_may_not_do(run: Callable[[Parts, Tensor], Any], said: str):
    torch.manual_seed(0)  # by chance as many rows could be chosen in both passes
    with pytest.raises(UserError, match=said):
        prepared(Parts(run), {"a": 6, "b": 6})


def test_logits_of_minus_infinity_are_allowed_but_not_a_whole_row():
    prepared(Parts(lambda s, x: s.b(s.a(x)) + NO_LOGITS), {"a": 6}, recon="kl")
    with pytest.raises(UserError, match="128 of -inf; recon: kl needs logits"):
        prepared(Parts(lambda s, x: s.b(s.a(x)) - torch.inf), {"a": 6}, recon="kl")


def test_a_weight_whose_type_alone_is_read_is_a_site():
    prepared(Parts(lambda s, x: s.b(s.a(x.to(s.a.weight.dtype)))), {"a": 6, "b": 6})


def shifted() -> nn.Module:
    class Shifted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    return Shifted(8, 8)


def called_otherwise() -> nn.Module:
    class Doubled(nn.Linear):
        def __call__(self, input: Tensor) -> Tensor:  # pyright: ignore
            return 2 * super().__call__(input)

    return Doubled(8, 8)


@pytest.mark.parametrize("made", [shifted, called_otherwise])
def test_what_would_be_lost_in_masked_passes_is_refused(made: Callable[[], nn.Module]):
    with pytest.raises(UserError, match=r"'0', a tests.*, gives something else than x W \+ b"):
        prepared(nn.Sequential(made()), {"0": 4})


def test_hooks_of_all_modules_act_or_are_refused():
    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if isinstance(module, nn.Linear) else None

    seen = []
    logs = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        prepared(nn.Sequential(nn.Linear(8, 8)), {"0": 4})
    finally:
        logs.remove()
    assert seen
    doubles = nn.modules.module.register_module_forward_hook(double)
    try:
        with pytest.raises(UserError, match="a hook of all modules, or a changed class"):
            prepared(nn.Sequential(nn.Linear(8, 8)), {"0": 4})
    finally:
        doubles.remove()


class Own(nn.Module):
    """A matrix as many write it themselves."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class ByRows(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_matrix_of_ones_own_class_is_a_site():
    target, x = nn.Sequential(Own(5, 8), nn.ReLU(), nn.Linear(5, 3)), torch.randn(4, 8)
    expected = target(x)
    model = prepared(target, {"0": 8}).objective.model
    site = model.sites["0"]
    with torch.no_grad():
        site.subcomponents.V.copy_(torch.eye(8))
        site.subcomponents.U.copy_(site.target_weight)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(UserError, match=r"ByRows, which computes .* weight of \[d_out, d_in\]"):
        prepared(nn.Sequential(ByRows(8, 5)), {"0": 4})
    assert not decomposable(nn.LayerNorm(8)) and not decomposable(nn.Bilinear(3, 3, 3))


def test_an_embedding_that_shortens_its_rows_has_them_short_from_the_beginning():
    target = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0))
    model = prepared(target, {"0": 4}, torch.randint(9, (5,))).objective.model
    assert model.sites["0"].target_weight.norm(dim=1).max() <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (nn.Linear(8, 8), r"the target is itself a torch\..*Linear.*nn\.Sequential\(target\)"),
        (
            nn.Sequential(nn.Linear(8, 8), nn.LazyBatchNorm1d()),
            "'1' is a LazyBatchNorm1d that has not",
        ),
        (nn.Sequential(nn.Linear(8, 8, dtype=torch.cfloat)), "complex64 .real numbers are needed"),
    ],
)
def test_targets_that_cannot_be_decomposed(target: nn.Module, said: str):
    with pytest.raises(UserError, match=said):
        prepared(target, {"0": 4})


def test_what_was_made_in_inference_mode():
    with torch.inference_mode():
        target, batch = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    prepared(nn.Sequential(nn.Linear(8, 8)), {"0": 4}, batch)
    with pytest.raises(UserError, match=r"'0\.weight' was made under torch\.inference_mode"):
        prepared(target, {"0": 4})


def test_batches_with_a_graph_are_taken_without_it():
    batch = nn.Linear(8, 8)(torch.randn(4, 8))
    (kept, *_) = prepared(nn.Sequential(nn.Linear(8, 8)), {"0": 4}, batch).eval_batches
    assert isinstance(kept, torch.Tensor) and not kept.requires_grad


def test_a_batch_that_is_not_finite():
    with pytest.raises(UserError, match=r"the first, a Tensor of shape \(4, 8\), has entries that"):
        prepared(nn.Sequential(nn.Linear(8, 8)), {"0": 4}, torch.full((4, 8), torch.nan))


def test_told_to_train_by_itself_the_target_stays_as_it_was():
    target = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model, x = prepared(target, {"0": 4}).objective.model, torch.randn(4, 8)
    expected = model.target_forward(x).output
    target.train()
    assert torch.equal(model.target_forward(x).output, expected)


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("target", nn.Linear, "target: Linear, a class; an instance"),
        ("target", None, "target: None; an instance"),
        ("tied_sites", ("0", "2"), "tied_sites: a tuple; a tuple of pairs"),
        ("probes", [1.0], "probes: a list; a Tensor"),
        ("device", "cuda", r"device: a str; a torch\.device"),
        ("position_weights", torch.ones(3), "position_weights: a Tensor of shape"),
        ("independent_rows", "yes", "independent_rows: a str; True or False"),
        ("solution", {"0": 5}, "solution: that of '0' is a int; an Identity or a Dense"),
        ("solution", {"0": Identity(8)}, "probes: there are none"),
    ],
)
def test_every_field_of_a_problem_is_checked(field: str, given: Any, said: str):
    problem = Problem(nn.Sequential(nn.Linear(8, 8)), [torch.ones(1)], [torch.ones(1)])
    object.__setattr__(problem, field, given)  # the type check of the tests comes before our own
    with pytest.raises(UserError, match=said):
        problem.__post_init__()


def test_what_is_known_belongs_to_a_site_and_the_probes_to_the_target():
    target = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UserError, match=r"solution: 'o' is no site \(sites: 0\)"):
        prepared(target, {"0": 4}, probes=torch.eye(8), solution={"o": Identity(8)})
    with pytest.raises(
        UserError, match="probes: the target fails on a Tensor of shape .3, 3.: Runt"
    ):
        prepared(target, {"0": 4}, probes=torch.eye(3), solution={"0": Identity(3)})


def test_a_configuration_that_is_written_in_python_is_checked_in_the_same_words():
    given: dict[str, Any] = {"sites": {"0": 4}, "losses": LOSSES, "steps": 2, "lr": 1e-2}
    for change, said in (
        ({"stepz": 3}, "SPDConfig: stepz: unknown key; did you mean 'steps'"),
        ({"lower_leak": "boths"}, "lower_leak: unknown name 'boths'; did you mean 'both'"),
        ({"losses": {"faithfullness": {"coeff": 1.0}}}, "did you mean 'faithfulness'"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
    ):
        with pytest.raises(UserError, match=said):
            spd.SPDConfig(**{"n_eval_batches": 1, **given, **change})
    problem = Problem(nn.Sequential(nn.Linear(8, 8)), [torch.ones(1)], [torch.ones(1)])
    with pytest.raises(UserError, match=r"config: a dict; a spd\.SPDConfig is needed"):
        inspect.unwrap(spd.decompose)(problem, given)  # pyright: ignore


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([torch.rand(8, 6)], r"batch of step 0, a Tensor of shape \(8, 6\): RuntimeError: mat1"),
        ([torch.rand(8, 5), torch.rand(8, 7)], r"batch of step 1, a Tensor of shape \(8, 7\)"),
        ([torch.rand(8, 5).double()], r"batch of step 0, .*Double"),
    ],
    ids=["wider", "the second one wider", "of another type"],
)
def test_a_training_batch_that_is_none_of_the_targets_is_named(batches: list[Tensor], said: str):
    problem = Problem(nn.Sequential(nn.Linear(5, 3)), batches, [torch.rand(8, 5)])
    config = config_of({"0": 4})
    with pytest.raises(UserError, match=f"train_batches: Sequential fails on the {said}"):
        spd.decompose(problem, config, quiet=True)


def test_an_error_that_is_not_the_datas_stays_what_it_is(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("not the data")

    problem = Problem(nn.Sequential(nn.Linear(5, 3)), [torch.rand(8, 5)], [torch.rand(8, 5)])
    config = config_of({"0": 4})
    monkeypatch.setattr(Alone, "inputs", broken)
    with pytest.raises(RuntimeError, match="not the data"):
        spd.decompose(problem, config, quiet=True)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.ones(3), r"a Tensor of shape \(3,\).*weights of shape \(8,\), one for each row"),
        (torch.ones(8, 5), r"a Tensor of shape \(8, 5\)"),
        (None, "None for the first held-out batch"),
        (torch.zeros(8), "so that nothing counts"),
        (-torch.ones(8), "a finite number of at least 0"),
        (torch.full((8,), math.nan), "a finite number of at least 0"),
    ],
    ids=["too few", "one for each entry", "none", "zeros", "below 0", "nan"],
)
def test_position_weights_are_one_for_each_row(weights: Any, said: str):
    batches = [torch.rand(8, 5)]
    problem = Problem(
        nn.Sequential(nn.Linear(5, 3)), batches, batches, position_weights=lambda _: weights
    )
    config = config_of({"0": 4})
    with pytest.raises(UserError, match=f"position_weights: .*{said}"):
        prepare(problem, config)


def test_what_is_no_batch_is_said_by_a_model_too():
    given: Any = torch.zeros(2, 8).numpy()
    with pytest.raises(UserError, match="a batch is a ndarray; a Tensor, or names with Tensors"):
        inspect.unwrap(as_batch)(given)  # what every pass of a model begins with


class KeepsWeight(nn.Module):
    """Uses the weight of its one module under another name, too."""

    def __init__(self, *, within: bool) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        if within:
            self.b.weight = self.a.weight
        else:
            self.kept = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("kept")
        return self.b(self.a(x)) + (0 if weight is None else F.linear(x, weight))


def test_a_weight_that_is_kept_under_another_name_is_refused():
    with pytest.raises(UserError, match="keeps the weight of 'a' as 'kept' besides"):
        prepared(KeepsWeight(within=False), {"a": 3}, torch.rand(8, 4))


def test_a_weight_that_another_matrix_has_too_is_named(caplog: pytest.LogCaptureFixture):
    prepared(KeepsWeight(within=True), {"a": 3}, torch.rand(8, 4))
    assert "the weight of site 'a' is that of 'b' too, which is not decomposed" in caplog.text
