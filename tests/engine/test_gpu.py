"""What a GPU needs of a step, looked at without one: nothing waits for the host, and how TF32 rounds.

Tensors of the `meta` device have shapes and no values: whatever asks for a value fails on them, as it
would make a GPU wait.
"""

from dataclasses import replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spd import optimize as loop
from spd.engine.compilation import CompiledStep, inductor_options, tf32_matmuls
from spd.engine.ensemble import Alone, Ensemble
from spd.engine.prepare import Prepared, prepare
from spd.experiments.resid_mlp.model import ResidMLP, ResidMLPModelConfig
from spd.experiments.sparse_features import SparseFeatureConfig, SparseFeatures
from spd.experiments.tms.model import TMSModel
from spd.optimize import Silent, step_inputs
from spd.problem import Problem
from tests.tf32 import EmulatedTF32, rounded_to_tf32
from tests.toy import make_config

META = torch.device("meta")
LOSSES: dict[str, Any] = {
    "faithfulness": {"coeff": 1.0},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-3, "pnorm": 2.0},
}
TARGETS = ["tms", "resid_mlp"]


def sparse_batches(batch_size: int, stream: str) -> SparseFeatures:
    config = SparseFeatureConfig(synced_inputs=((0, 2), (3, 4)))
    return SparseFeatures(config, 5, batch_size=batch_size, seed=0, stream=stream)


def prepared_run(name: str, seed: int = 0, **changes: Any) -> Prepared:
    torch.manual_seed(0)  # of the target, which all runs share
    if name == "tms":
        target: nn.Module = TMSModel(5, 2, n_hidden_layers=1)
        sites, tied = (
            {"linear1": 20, "hidden_layers.0": 20, "linear2": 20},
            (("linear1", "linear2"),),
        )
        target.linear2.weight.data = target.linear1.weight.data.T.clone()
    else:
        target = ResidMLP(ResidMLPModelConfig(n_features=5, d_embed=12, d_mlp=4, n_layers=2))
        nn.init.normal_(target.W_E)
        nn.init.normal_(target.W_U)
        sites, tied = {"layers.*.mlp_in": 8, "layers.*.mlp_out": 6}, ()
    train, held_out = sparse_batches(1024, "train"), sparse_batches(256, "eval")
    problem = Problem(target, train, held_out, independent_rows=True, tied_sites=tied)
    return prepare(
        problem, make_config(LOSSES, sites=sites, seed=seed, n_eval_batches=1, **changes)
    )


class MetaGenerator(torch.Generator):
    """One of a device whose draws have no values."""

    def __new__(cls, device: Any = None) -> Self:
        return super().__new__(cls)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return META


class NothingFromTheHost(TorchDispatchMode):
    """Fails on every tensor of the host but single numbers that a kernel takes as arguments."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        numbers = func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        there = [x.device == META or (numbers and x.dim() == 0) for x in tensors]
        fine = all(there) or (not any(there) and all(x.dim() == 0 for x in tensors))
        assert fine, f"{func} reads or makes a tensor of the host"
        return out


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("n_members", [1, 3])
def test_a_step_waits_for_nothing_and_copies_nothing_from_the_host(
    name: str, n_members: int, monkeypatch: pytest.MonkeyPatch
):
    runs = [prepared_run(name, seed) for seed in range(n_members)]
    assert all(run.zero_rows.share is not None for run in runs)
    monkeypatch.setattr(torch, "Generator", MetaGenerator)
    for run in runs:
        run.objective.to(META)
        run.problem.train_batches.generator = MetaGenerator()  # pyright: ignore
    objectives = [run.objective for run in runs]
    trained = Alone(objectives[0]) if n_members == 1 else Ensemble(objectives)

    def no_copy(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("torch.tensor copies from the host, and waits")

    monkeypatch.setattr(torch, "tensor", no_copy)
    for step in range(2):
        with NothingFromTheHost():
            inputs = trained.inputs([step_inputs(run, step, {}) for run in runs])
            assert inputs.progress.device == META
            noise = dict(inputs.noise)
            total, terms, _ = trained.function(
                inputs.batch, inputs.progress, noise, inputs.row_weights, inputs.state
            )
            total.backward()
            norms = trained.gradient_norms()
            trained.clip_gradients_(trained.parameters, 1.0)
        assert all(p.grad is not None and p.grad.device == META for p in trained.parameters)
        assert all(term.device == META for term in (*terms.values(), *norms.values()))
    with pytest.raises(RuntimeError):  # the test would see it
        torch.zeros(3, device=META).sum().item()
    with pytest.raises(AssertionError, match="of the host"), NothingFromTheHost():
        torch.zeros(3)
    with pytest.raises(AssertionError, match="of the host"), NothingFromTheHost():
        torch.full((), 0.5).to(META)


class Waits:
    """Counts what makes the host wait for a device: a number, a truth value or a copy that is asked for."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        for name in self.NAMES:
            monkeypatch.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))

    def _noting(self, name: str, original: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.found.append(name)
            return original(*args, **kwargs)

        return noting


class Watched:
    """Batches that keep what was found before each of them."""

    def __init__(self, inner: Any, waits: Waits) -> None:
        self.inner, self.waits, self.before = inner, waits, []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        self.before.append(list(self.waits.found))
        self.waits.found.clear()
        return next(self.inner)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("n_members", [1, 2])
def test_the_loop_waits_for_the_device_where_it_logs_and_nowhere_else(
    name: str, n_members: int, monkeypatch: pytest.MonkeyPatch
):
    changes = {"steps": 8, "log_every": 3, "eval_every": 100, "compile": False}
    groups = {"components": {"grad_clip": 0.5}, "importances": {"lr": 1e-2}}
    runs = [prepared_run(name, seed, **changes, **groups) for seed in range(n_members)]
    for run in runs:  # what merges rows may look at a number of the CPU itself, and there alone
        run.zero_rows.share = None
    waits = Waits(monkeypatch)
    watched = Watched(runs[0].problem.train_batches, waits)
    runs[0] = runs[0]._replace(problem=replace(runs[0].problem, train_batches=watched))
    loop.run_side_by_side([loop.Member(run, Silent()) for run in runs])
    after = watched.before[1:]  # of every step but the last, from its batch to the next
    assert after == [["tolist"], [], [], ["tolist"], [], [], ["tolist"]]
    before = len(waits.found)
    assert bool(torch.ones(())) and len(waits.found) == before + 1, "it would be seen"


def test_cuda_graphs_are_asked_for_by_the_configuration_and_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    assert inductor_options(cuda_graphs=True)["triton.cudagraphs"] is True
    assert inductor_options()["triton.cudagraphs"] is False
    made: list[bool] = []

    class Watched(CompiledStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(options["cuda_graphs"])
            super().__init__(*args, **options)

    monkeypatch.setattr("spd.engine.step.CompiledStep", Watched)
    for on_gpu, wanted in [(False, True), (True, False), (True, True)]:
        monkeypatch.setattr(Tensor, "is_cuda", on_gpu)
        loop.run_steps(prepared_run("tms", cuda_graphs=wanted), Silent())
    assert made == [False, False, True]


def test_every_call_tells_torch_that_a_step_begins(monkeypatch: pytest.MonkeyPatch):
    """What the last one returned may be overwritten from then on."""
    order: list[str] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: order.append("begin"))
    step = CompiledStep(lambda: order.append("step"), False, 10, cuda_graphs=True)
    for _ in range(3):
        step()
    assert order == ["begin", "step"] * 3


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_an_error_of_a_recorded_step_says_how_to_do_without(cuda_graphs: bool):
    step = CompiledStep(lambda: None, False, 10, cuda_graphs=cuda_graphs)
    step.compiled = True
    with pytest.raises(RuntimeError, match="out of memory") as caught, step.explained():
        raise RuntimeError("out of memory")
    notes = getattr(caught.value, "__notes__", [])
    assert any("cuda_graphs: false" in note for note in notes) == cuda_graphs


def test_tf32_is_switched_on_for_the_block_alone():
    assert torch.get_float32_matmul_precision() == "highest"
    with tf32_matmuls(True):
        assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(KeyError), tf32_matmuls(True):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    with tf32_matmuls(False):
        assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_asked_for_by_the_configuration_and_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    asked: list[bool] = []

    def noted(wanted: bool) -> Any:
        asked.append(wanted)
        return tf32_matmuls(False)

    monkeypatch.setattr("spd.engine.step.tf32_matmuls", noted)
    for on_gpu, wanted in [(False, True), (True, False), (True, True)]:
        monkeypatch.setattr(Tensor, "is_cuda", on_gpu)
        loop.run_steps(prepared_run("tms", tf32=wanted), Silent())
    assert asked == [False, False, True]


def test_rounding_to_tf32_keeps_ten_bits():
    assert rounded_to_tf32(torch.tensor([1.0, 1 + 2**-10, -3.5])).tolist() == [1, 1 + 2**-10, -3.5]
    assert rounded_to_tf32(torch.tensor([1 + 2**-11, 1 + 2**-12])).tolist() == [1 + 2**-10, 1.0]
    x = torch.randn(1000)
    error = ((rounded_to_tf32(x) - x) / x).abs()
    assert 2**-12 < error.max() <= 2**-11


@pytest.mark.parametrize("name", TARGETS)
def test_a_step_in_tf32_is_that_of_float32_within_its_rounding(name: str):
    """Away from an optimum: there gradients are as small as the rounding (see `spd.engine.compilation`)."""
    run = prepared_run(name)
    inputs = step_inputs(run, 0, {})
    noise = dict(inputs.noise)

    def terms_and_gradient() -> tuple[dict[str, Tensor], Tensor]:
        total, terms, _ = run.objective(inputs.batch, inputs.progress, noise, inputs.row_weights)
        parameters = list(run.objective.model.subcomponent_parameters().values())
        return terms, torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    terms, gradient = terms_and_gradient()
    with EmulatedTF32():
        rounded_terms, rounded_gradient = terms_and_gradient()
    assert not torch.equal(gradient, rounded_gradient)
    assert (rounded_gradient - gradient).norm() < 2e-3 * gradient.norm()
    for key, term in terms.items():
        if key.startswith("loss/"):
            torch.testing.assert_close(rounded_terms[key], term, rtol=1e-3, atol=0)
