"""When a step is compiled, and what happens where that is impossible."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spd.config import UserError
from spd.engine.compilation import CompiledStep, require_compiler
from spd.engine.ensemble import train_together
from spd.engine.step import execution_record, make_step
from tests.carried_state import config, prepared
from tests.run_fixtures import (
    QUICK,
    TMS_CONFIG,
    TMS_SCRIPT,
    Command,
    Stop,
    command_fixture,
    finished_run,
    target_fixture,
)

__all__ = ["command_fixture", "target_fixture"]

X = torch.arange(4.0)


def square(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum()


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that is there and compiles nothing."""
    path = tmp_path / "g++"
    path.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return path


def slow_square(x: torch.Tensor) -> torch.Tensor:
    """More than twenty milliseconds by count, of which 750 steps, there and back, are worth compiling."""
    large = torch.ones(1200, 1200)
    return square(x) + 0 * (large @ large)[0, 0]


@pytest.mark.parametrize(
    ("n_steps", "tried"), [(2, False), pytest.param(2000, True, marks=pytest.mark.slow)]
)
def test_auto_compiles_long_runs_alone(
    compiler: Path, caplog: pytest.LogCaptureFixture, n_steps: int, tried: bool
):
    caplog.set_level(logging.INFO)
    step = CompiledStep(slow_square, "auto", n_steps)
    assert step.compiled is None  # not before the first call
    assert step(X) == 14 and step.compiled is False  # this compiler never works
    assert any("torch.compile failed" in line for line in caplog.messages) == tried


def test_true_compiles_the_shortest_run(compiler: Path):
    from torch._inductor.exc import InductorError

    with pytest.raises(InductorError):
        CompiledStep(square, True, 1)(X)


def test_false_compiles_none(compiler: Path):
    step = CompiledStep(slow_square, False, 10**9)
    assert step(X) == 14 and step.compiled is False


def test_auto_goes_on_without_a_compiler_and_says_so_in_one_line(
    no_compiler: None, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    step = CompiledStep(slow_square, "auto", 10_000)
    assert step(X) == 14 and step.compiled is False
    (line,) = caplog.messages
    assert "no C++ compiler found" in line and "slower" in line


@pytest.mark.parametrize("call", [require_compiler, lambda: CompiledStep(square, True, 10)])
def test_true_without_a_compiler_is_a_mistake(no_compiler: None, call):
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler.*no g\+\+ or clang\+\+"):
        call()


def test_cxx_alone_counts_where_it_is_set(compiler: Path, monkeypatch: pytest.MonkeyPatch):
    require_compiler()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match="'/nowhere/g\\+\\+'"):
        require_compiler()
    step = CompiledStep(slow_square, "auto", 10_000)
    assert step(X) == 14 and step.compiled is False
    monkeypatch.setenv("CXX", "")
    require_compiler()


@pytest.mark.slow
def test_auto_falls_back_where_the_compiler_fails(compiler: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    step = CompiledStep(slow_square, "auto", 10_000)
    assert step(X) == 14 and step.compiled is False
    (line,) = [line for line in caplog.messages if "torch.compile" in line]
    assert line.startswith("torch.compile failed, running without it, which is slower: ")
    assert "\n" not in line and step(X) == 14


LONG_RUN = """
import runpy, sys
from spd.engine import compilation
compilation.WORTHWHILE_SECONDS = 0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""runs a script that takes even a short run for a long one"""


class Scaled(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * square(x)


@pytest.mark.slow
@pytest.mark.compiled
def test_a_process_compiles_as_many_runs_as_it_likes(monkeypatch: pytest.MonkeyPatch):
    import torch._dynamo.config

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    steps = [CompiledStep(Scaled(factor), True, 10) for factor in (1.0, 2.0, 3.0)]
    for _ in range(2):
        assert [step(X).item() for step in steps] == [14.0, 28.0, 42.0]


@pytest.mark.slow
def test_a_run_that_falls_back_is_an_eager_run(command: Command, compiler: Path):
    """With the numbers of a run that was never to be compiled."""
    env = {**os.environ, **command.environment, "CXX": str(compiler)}
    arguments = (TMS_SCRIPT, TMS_CONFIG, f"target={command.target}", *QUICK)
    # a process of its own: torch reads CXX when it is imported
    done = subprocess.run(
        [sys.executable, "-c", LONG_RUN, *arguments],
        env=env,
        cwd=command.home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile failed, running without it, which is slower: ") == 1
    assert "Traceback" not in done.stderr
    (run,) = command.runs()
    state = torch.load(run / "checkpoints/00000006/training_state", weights_only=True)
    assert state["compiled"] is False
    finished_run(command, "compile=false")
    (other,) = [path for path in command.runs() if path != run]
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.needs("a C++ compiler")
def test_compiled_runs_are_equal_byte_for_byte_also_resumed(command: Command):
    """The second compiles nothing: it finds what the first has compiled."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(command.folder / "cache")}
    done = command.tms("compile=true", env=cache)
    assert done.status == 0, done.err
    assert "compiled the training step in " in done.err and "found in the cache" not in done.err
    first = command.only_run()
    stop = Stop(signal.SIGKILL, "*.00000006.partial")
    done = command.tms("compile=true", env=cache, stop=stop)
    assert done.status == -9 and "s, found in the cache" in done.err
    (second,) = [path for path in command.runs() if path != first]
    newest = sorted((second / "checkpoints").iterdir())[-1]
    assert newest.name == "00000004"
    assert torch.load(newest / "training_state", weights_only=True)["compiled"] is True
    assert command.resume(second).status == 0
    for name in ("metrics.jsonl", "checkpoints/00000006/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
@pytest.mark.needs("a C++ compiler")
def test_the_decision_is_kept_by_a_resumed_run(command: Command):
    """Compiled stays compiled: without a compiler the run does not go on; eager stays eager."""
    finished_run(command, "compile=true", "steps=4")
    run = command.only_run()
    done = command.resume(run, env={"CXX": "/nowhere/g++"})
    assert done.status == 2 and "/nowhere/g++" in done.err
    steps = ("steps=99_000_000", "save_every=10", "log_every=10", "eval_every=1000")
    eager = Command(command.folder / "eager", command.target)
    stop = Stop(signal.SIGTERM, "*.00000030.partial")
    done = eager.tms(*steps, env={"CXX": "/nowhere/g++"}, stop=stop)
    assert done.status == 143 and "no C++ compiler found" in done.err
    done = eager.resume(eager.only_run(), stop=Stop(signal.SIGTERM, "*.00000060.partial"))
    assert done.status == 143 and "compiled the" not in done.err
    newest = sorted((eager.only_run() / "checkpoints").iterdir())[-1]
    assert torch.load(newest / "training_state", weights_only=True)["compiled"] is False


# --- batches of many shapes --------------------------------------------------------------------------


class StandIn:
    """For the compiler: notes how long the batches are that what it made is called with."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.fails_at: set[int] = set()

    def compile(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(x: torch.Tensor) -> Any:
            from torch._dynamo.exc import TorchDynamoException

            self.lengths.append(len(x))
            if len(x) in self.fails_at:
                raise TorchDynamoException(f"no graph of {len(x)}")
            return function(x)

        return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> StandIn:
    found = StandIn()
    monkeypatch.setattr(torch, "compile", found.compile)
    monkeypatch.setattr("spd.engine.compilation._has_compiler", lambda: True)
    monkeypatch.setattr("spd.engine.compilation.WORTHWHILE_SECONDS", 0)
    caplog.set_level(logging.INFO)
    return found


def test_a_graph_for_each_of_the_first_shapes_and_the_others_run_eagerly(
    stand_in: StandIn, caplog: pytest.LogCaptureFixture
):
    """And a run that is resumed compiles the shapes that it had compiled."""
    compiled = stand_in.lengths
    step = CompiledStep(square, True, 100)
    for n in [*range(1, 11), 1, 10]:
        assert step(torch.ones(n)) == n
    assert compiled == [1, 2, 3, 4, 1]
    assert sum("more than 4 shapes" in line for line in caplog.messages) == 1
    resumed = CompiledStep(square, True, 100)
    resumed.shapes = [*step.shapes]
    compiled.clear()
    for n in (10, 4, 9, 3):
        assert resumed(torch.ones(n)) == n
    assert compiled == [4, 3]


def test_auto_does_without_a_graph_of_a_later_shape_and_says_so_in_one_line(
    stand_in: StandIn, caplog: pytest.LogCaptureFixture
):
    """Also after a run is resumed, which does not try again; the shape counts among the first."""
    stand_in.fails_at = {2}
    step = CompiledStep(square, "auto", 100)
    for n in (1, 2, 2, 1, 3, 4, 5):
        assert step(torch.ones(n)) == n
    assert step.compiled and stand_in.lengths == [1, 2, 1, 3, 4]
    assert step.shapes == [[[1]], [[3]], [[4]]] and step.eager_shapes == [[[2]]]
    assert not step.covers(torch.ones(2)) and step.covers(torch.ones(3))
    (line,) = [line for line in caplog.messages if "failed" in line]
    assert line.startswith("torch.compile failed, running batches of another shape without it")
    assert line.endswith(": no graph of 2")
    resumed = CompiledStep(square, True, 100)
    resumed.shapes, resumed.eager_shapes = [[[1]]], [[[2]]]
    resumed.may_fall_back = True
    stand_in.lengths.clear()
    stand_in.fails_at = {2, 3}
    for n in (2, 1, 3, 3):
        assert resumed(torch.ones(n)) == n
    assert resumed.compiled and stand_in.lengths == [1, 3]


def test_a_graph_that_there_was_or_has_to_be_is_not_done_without(stand_in: StandIn):
    from torch._dynamo.exc import TorchDynamoException

    stand_in.fails_at = {2}
    step, resumed = CompiledStep(square, True, 100), CompiledStep(square, "auto", 100)
    resumed.shapes = [[[2]]]
    assert step(torch.ones(1)) == 1
    for own in (step, resumed):
        with pytest.raises(TorchDynamoException, match="no graph of 2"):
            own(torch.ones(2))


@pytest.mark.parametrize("setting", ["auto", True])
def test_a_checkpoint_keeps_which_shapes_run_eagerly(stand_in: StandIn, setting: Any):
    run = prepared(config(compile=setting))
    kept = {"compiled": True, "compiled_shapes": [[[1]]], "eager_shapes": [[[2]]], "n_members": 1}
    trained, batch = train_together([run.objective]), run.eval_batches[0]
    step = make_step(trained, run.config, batch, {"step": 1, **kept})
    assert step.execution.may_fall_back == (setting == "auto")
    step.execution.compiled = True
    assert execution_record(step) == kept


@pytest.mark.slow
@pytest.mark.compiled
def test_other_shapes_are_compiled_however_many_graphs_a_process_has(
    monkeypatch: pytest.MonkeyPatch,
):
    """Also by a run that is resumed with a batch for which it has none."""
    import torch._dynamo.config

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    steps = [CompiledStep(Scaled(factor), True, 10) for factor in (1.0, 2.0)]
    for n in (3, 2, 3, 2):
        assert [step(torch.ones(n)).item() for step in steps] == [n, 2.0 * n]
    resumed = CompiledStep(Scaled(3.0), True, 10)
    resumed.shapes = [[[n]] for n in (2, 3, 4, 5)]
    assert [resumed(torch.ones(n)).item() for n in (1, 2, 2)] == [3.0, 6.0, 6.0]
    assert not resumed.covers(torch.ones(1)) and resumed.covers(torch.ones(2))
