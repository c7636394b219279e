"""Several processes on one run: they give what one process gives, write one directory and end together."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from spd.config import to_yaml
from spd.engine import checkpoint
from spd.engine.distributed import (
    agreed_maximum,
    average_,
    is_leader,
    on_leader,
)
from spd.noise import Share
from spd.run_files import read_meta, read_metrics
from tests.launch.test_job import until
from tests.little_lm import little_config
from tests.rank_gradients import gradients, made

REPOSITORY = Path(__file__).parents[2]
STEPS = 6
LOSSES = {
    "faithfulness": {"coeff": 1.0},
    "importance_minimality": {"coeff": 1e-2, "pnorm": 0.9},
    "stochastic_recon": {"coeff": 1.0},
    "stochastic_recon_layerwise": {"coeff": 1.0},
}


def torchrun(*arguments: str | Path, folder: Path) -> subprocess.Popen[str]:
    """Two processes, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment |= {"SPD_OUT_DIR": str(folder / "out"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def said(process: subprocess.Popen[str]) -> str:
    """All that it prints until it has ended."""
    out, err = process.communicate(timeout=600)
    return out + err


def written_config(folder: Path, **changes: Any) -> Path:
    settings = {"steps": STEPS, "log_every": 1, "eval_every": 3, "save_every": 3, "lr": 1e-3}
    path = folder / "config.yaml"
    config = little_config(**{"losses": LOSSES, **settings, **changes})
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


def single(config: Path, run_dir: Path) -> None:
    """The same run in one process."""
    command = [sys.executable, "-m", "tests.little_lm", str(config), "--run_dir", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)


def test_alone_nothing_is_exchanged():
    tensor = torch.tensor([1.0, 2.0])
    average_([tensor])
    assert torch.equal(tensor, torch.tensor([1.0, 2.0])) and not dist.is_initialized()
    assert is_leader() and agreed_maximum(3) == 3 and on_leader(lambda: "x") == "x"


def test_shares_make_up_the_batch():
    parts = [torch.arange(12)[Share(rank, 3).rows(12)] for rank in range(3)]
    assert torch.equal(torch.cat(parts), torch.arange(12))
    with pytest.raises(AssertionError, match="10 rows for 3 processes"):
        Share(0, 3).rows(10)


def test_each_share_has_its_rows_of_the_joint_noise():
    objective, batch = made()
    joint = objective.noise(batch, stream="train", seed=0, step=3)
    shares = [
        objective.noise(batch, stream="train", seed=0, step=3, share=Share(rank, 2))
        for rank in range(2)
    ]
    assert len(joint) > 10
    for key, draw in joint.items():
        assert torch.equal(torch.cat([own[key] for own in shares]), draw)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path):
    """Every loss there is, in one graph and one pass after another."""
    process = torchrun("-m", "tests.rank_gradients", tmp_path, folder=tmp_path)
    output = said(process)
    assert process.returncode == 0, output
    for together in (False, True):
        expected: dict[str, Tensor] = gradients(together=together)
        own = load_file(tmp_path / f"{together}.safetensors")
        assert own.keys() == expected.keys() and len(own) > 20
        for name, value in expected.items():
            torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_run_is_that_of_one_process_also_when_resumed(tmp_path: Path):
    config = written_config(tmp_path)
    run_dir, alone = tmp_path / "two", tmp_path / "one"
    arguments = ("-m", "tests.little_lm", config, "--run_dir", run_dir)
    process = torchrun(*arguments, folder=tmp_path)
    output = said(process)
    assert process.returncode == 0, output
    assert output.count(f"report: {run_dir}") == 1 and output.count("run directory: ") == 1
    assert not (tmp_path / "out").exists() and (run_dir / "report.html").is_file()
    single(config, alone)
    own, expected = read_metrics(run_dir), read_metrics(alone)
    assert [list(line) for line in own] == [list(line) for line in expected]
    for line, expected_line in zip(own, expected, strict=True):
        assert line == pytest.approx(expected_line, rel=1e-3, abs=1e-5)
    meta = read_meta(run_dir)
    assert meta["status"] == "finished" and meta["n_processes"] == 2

    last = run_dir / "checkpoints" / f"{STEPS:08d}"
    before = checkpoint.load_parameters(last)
    checkpoint._remove(last)
    process = torchrun(*arguments, folder=tmp_path)
    output = said(process)
    assert process.returncode == 0, output
    assert read_metrics(run_dir) == own
    for name, value in checkpoint.load_parameters(last).items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided(tmp_path: Path):
    process = torchrun(
        "-m", "tests.little_lm", written_config(tmp_path, batch_size=3), folder=tmp_path
    )
    output = said(process)
    assert process.returncode != 0
    message = (
        "error: batch_size: 3 examples cannot be divided among 2 processes; a multiple of 2 is"
    )
    assert output.count(message) == 1
    assert "exitcode  : 2" in output and "Traceback" not in output.partition("torch/distributed")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_one_process_ends_the_run(tmp_path: Path, signum: signal.Signals):
    config, run_dir = written_config(tmp_path, steps=100_000), tmp_path / "run"
    process = torchrun("-m", "tests.little_lm", config, "--run_dir", run_dir, folder=tmp_path)
    until(lambda: bool(list(run_dir.glob("checkpoints/0*"))))
    follower = psutil.Process(process.pid).children()[1]
    follower.send_signal(signum)
    output = said(process)
    assert process.returncode != 0
    status = read_meta(run_dir)["status"]
    if signum == signal.SIGTERM:
        assert status == "interrupted", output
        assert f"exitcode  : {128 + signum}" in output
        assert f"stopped before step {checkpoint.steps(run_dir / 'checkpoints')[-1]} of" in output
    else:
        assert status == "failed", output
        assert "error: another process of this run has ended" in output


STOPPED_ALONE = """
from spd.engine.distributed import agreed_maximum, is_leader, joined, leader_first
with joined():
    with leader_first():
        pass
    if is_leader():
        raise SystemExit(130)
    agreed_maximum(1)
"""


@pytest.mark.slow
def test_what_stops_the_leader_alone_leaves_nobody_waiting(tmp_path: Path):
    """As Ctrl-C does that reaches it before the run has begun."""
    script = tmp_path / "script.py"
    script.write_text(STOPPED_ALONE, encoding="utf-8")
    process = torchrun(script, folder=tmp_path)
    output = said(process)
    assert process.returncode != 0 and "exitcode  : 130" in output, output
