"""Adversaries whose sources live from step to step, in whatever way a step is executed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spd.config import UserError
from spd.engine.members import step_inputs
from spd.engine.prepare import Prepared, evaluate, prepare
from spd.engine.zero_rows import Rows, ZeroRows
from spd.optimize import Interrupted, Member, Silent, run_side_by_side, run_steps
from spd.problem import Problem
from tests.adversarial_run import MERGED, PERSISTENT, config, prepared, result_of
from tests.engine.test_distributed import said, torchrun
from tests.little_lm import RandomBatches, little_model
from tests.test_sources import taken_step
from tests.toy import MLP, decompose, make_objective

KEY = "masked_recon.r.first"


def alone(folder: Path, **changes: Any) -> dict[str, Tensor]:
    run = prepared(config(**changes))
    run_steps(run, Silent(), checkpoints=folder)
    return result_of(run, folder)


def assert_near(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("passes", ["together", "one_by_one"])
@pytest.mark.parametrize("source", [MERGED, {**PERSISTENT, "scope": "c"}])
def test_stopped_and_resumed_it_goes_on_bit_for_bit(
    tmp_path: Path, passes: str, source: dict[str, Any]
):
    whole = alone(tmp_path / "whole", passes=passes, source=source)
    stops = iter([0, 0, 0, 15])
    with pytest.raises(Interrupted):
        run_steps(
            prepared(config(passes=passes, source=source)),
            Silent(),
            checkpoints=tmp_path / "parts",
            stop_requested=lambda: next(stops),
        )
    again = prepared(config(passes=passes, source=source))
    run_steps(again, Silent(), checkpoints=tmp_path / "parts", resume=True)
    result = result_of(again, tmp_path / "parts")
    assert result.keys() == whole.keys() and whole["masked_recon.n_updates"] == 18.0
    for name, value in whole.items():
        assert torch.equal(result[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("source", [MERGED, {**PERSISTENT, "scope": "c"}])
def test_side_by_side_each_seed_has_its_own(tmp_path: Path, source: dict[str, Any]):
    runs = [prepared(config(seed=seed, source=source)) for seed in (0, 1)]
    folders = [tmp_path / "0", tmp_path / "1"]
    run_side_by_side([Member(r, Silent(), f) for r, f in zip(runs, folders, strict=True)])
    own = [result_of(run, folder) for run, folder in zip(runs, folders, strict=True)]
    assert not torch.equal(own[0][KEY], own[1][KEY])
    for seed, result in enumerate(own):
        assert_near(result, alone(tmp_path / f"alone{seed}", seed=seed, source=source))


@pytest.mark.parametrize("source", [MERGED, {**PERSISTENT, "scope": "c"}])
def test_passes_one_by_one_give_what_one_graph_gives(tmp_path: Path, source: dict[str, Any]):
    found = [
        alone(tmp_path / passes, passes=passes, source=source)
        for passes in ("together", "one_by_one")
    ]
    assert_near(*found)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["bc", "c"])
@pytest.mark.parametrize("passes", ["together", "one_by_one"])
def test_two_processes_give_what_one_does(tmp_path: Path, scope: str, passes: str):
    """Sources of examples lie with the process that has them, and in one checkpoint; it goes on from it."""
    arguments = ("-m", "tests.adversarial_run", tmp_path, scope, passes)
    for steps in ("3", "6"):
        process = torchrun(*arguments, steps, folder=tmp_path)
        output = said(process)
        assert process.returncode == 0, output
    expected = alone(tmp_path / "one", passes=passes, source={**MERGED, "scope": scope})
    own = load_file(tmp_path / "result.safetensors")
    assert own[KEY].shape[0] == (8 if scope == "bc" else 1)
    assert_near(own, expected)


# --- batches whose zero rows are merged --------------------------------------------------------


def with_zero_rows(*, merged: bool, source: dict[str, Any]) -> Prepared:
    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            batch = torch.rand(256, 4, generator=generator)
            yield batch * (torch.rand(256, 1, generator=generator) < 0.1)

    torch.manual_seed(0)
    target = MLP()
    with torch.no_grad():
        for module in (target.first, target.last):
            module.bias.zero_()
    problem = Problem(target, batches(), batches(), independent_rows=merged)
    return prepare(problem, config(source=source, n_eval_batches=1, steps=3, save_every=3))


@pytest.mark.parametrize("source", [{**PERSISTENT, "scope": "bc"}, {**PERSISTENT, "scope": "c"}])
def test_zero_rows_that_are_merged_leave_sources_and_gradients_what_they_were(
    tmp_path: Path, source: dict[str, Any]
):
    """Exact: a row of zeros has no gradient, whoever stands for it, and each row knows its slot."""
    results = []
    for merged in (True, False):
        run = with_zero_rows(merged=merged, source=source)
        inputs = step_inputs(run, 0, run.objective.initial_state())
        assert (len(inputs.batch) < 256) == merged
        assert (inputs.slots is not None) == (merged and source["scope"] == "bc")
        run_steps(run, Silent(), checkpoints=tmp_path / str(merged))
        results.append(result_of(run, tmp_path / str(merged)))
    assert_near(*results)
    assert (results[0]["masked_recon.first_moment.first"] != 0).any()


def test_side_by_side_with_batches_of_which_one_is_not_merged():
    """The rows that fill a batch up take nothing from the sources of the last slot."""
    runs = [with_zero_rows(merged=True, source={**PERSISTENT, "scope": "bc"}) for _ in range(2)]
    runs[1] = runs[1]._replace(zero_rows=Unmerged(runs[1].zero_rows))
    run_side_by_side([Member(run, Silent()) for run in runs])
    first, second = (run.objective.model.subcomponent_parameters() for run in runs)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5, msg=name)


class Unmerged(ZeroRows):
    """Leaves every batch as it is."""

    def __init__(self, inner: ZeroRows) -> None:
        self.share, self.n_counted = inner.share, inner.n_counted

    def merge(self, batch: Any) -> Rows:
        return Rows(batch)


# --- evaluation and messages ---------------------------------------------------------------------


def test_held_out_the_term_is_that_of_a_step():
    """Ascents before it included; the sources that training has are left as they are."""
    run = prepared(config(source={**PERSISTENT, "n_warmup": 5, "lr": 0.1}))
    batch = run.eval_batches[0]
    state = dict(run.objective.begun({}, batch, seed=0))
    before = {key: value.clone() for key, value in state.items()}
    values = evaluate(run, state)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    noise = run.objective.draw_noise(batch, stream="eval", seed=0, step=0)
    _, logged, _ = run.objective(batch, torch.tensor(1.0), noise, None, state)
    if len(run.eval_batches) == 1:
        assert values["eval/loss/masked_recon"] == pytest.approx(
            logged["loss/masked_recon"].item(), rel=1e-5
        )
    weaker = prepared(config(source={**PERSISTENT, "n_warmup": 0}))
    assert evaluate(weaker, state)["eval/loss/masked_recon"] < values["eval/loss/masked_recon"]


def test_a_batch_of_another_size_is_one_message():
    run = prepared(config())
    run.objective.begun({}, torch.zeros(8, 4), seed=0)
    state = run.objective.begun({}, torch.zeros(6, 4), seed=0)
    with pytest.raises(
        UserError, match="losses.masked_recon.source.scope: bc keeps sources for batches"
    ):
        step_inputs(run, 0, state)


def test_a_scope_that_a_batch_does_not_have_is_refused_before_anything_begins():
    for source in ({**PERSISTENT, "scope": "sc"}, {"type": "pgd", "scope": "bsc"}):
        message = (
            f"losses.masked_recon.source.scope: '{source['scope']}' has a source for each position"
        )
        with pytest.raises(UserError, match=message):
            prepared(config(source=source))


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("n_members", [1, 2])
def test_compiled_it_is_what_it_is_eagerly(tmp_path: Path, n_members: int):
    found = []
    for compiled in (False, True):
        runs = [
            prepared(config(seed=s, compile=compiled, passes="together")) for s in range(n_members)
        ]
        folders = [tmp_path / f"{compiled}{seed}" for seed in range(n_members)]
        run_side_by_side([Member(r, Silent(), f) for r, f in zip(runs, folders, strict=True)])
        found.append([result_of(r, f) for r, f in zip(runs, folders, strict=True)])
    for own, expected in zip(*found, strict=True):
        assert_near(own, expected)


# --- language models ---------------------------------------------------------------------------------

LM_SITES = {"model.layers.*.mlp.*_proj": 6, "model.layers.*.self_attn.q_proj": 5}


def language_model_steps(source: dict[str, Any], *, together: bool) -> dict[str, Tensor]:
    """Gradients and state after two steps on a little Llama."""
    objective = make_objective(
        decompose(little_model("llama"), LM_SITES),
        {"masked_recon": {"coeff": 0.5, "source": source}, "faithfulness": {"coeff": 1.0}},
        "kl",
    )
    batches, state = RandomBatches(0), {}
    for step in range(2):
        batch = next(batches)
        state = dict(objective.begun(state, batch, seed=0))
        noise = objective.draw_noise(batch, stream="train", seed=0, step=step)
        inputs = (batch, torch.tensor(0.5), noise)
        _, state = taken_step(objective, inputs, state, together=together)
    grads = {n: p.grad for n, p in objective.model.subcomponent_parameters().items()}
    return {**state, **{n: grad for n, grad in grads.items() if grad is not None}}


@pytest.mark.parametrize("scope", ["c", "bsc"])
def test_a_language_model_whose_passes_share_layers(scope: str):
    source = {**MERGED, "scope": scope, "lr_ramp": 0.0}
    expected = language_model_steps(source, together=True)
    own = language_model_steps(source, together=False)
    assert own.keys() == expected.keys() and len(own) > 60
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_an_adversary_of_a_step_in_a_language_model():
    source = {"type": "pgd", "n_steps": 2}
    expected = language_model_steps(source, together=True)
    own = language_model_steps(source, together=False)
    assert own.keys() == expected.keys() and len(own) > 30
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5, msg=name)
