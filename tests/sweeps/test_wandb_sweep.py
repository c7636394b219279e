"""A sweep on W&B as far as it goes without a server: its own agent starts a run, offline."""

import json
import os
import queue
import sys
from pathlib import Path

import pytest

from spd.launch import study as launch
from spd.sweeps import wandb_backend as wandb_sweep
from spd.sweeps.definition import Definition
from spd.sweeps.trials import trials_of
from tests.launch_fixtures import QUICK, Launcher
from tests.runs.test_wandb import recorded

DEFINITION = {
    "method": "grid",
    "metric": {"name": "eval/loss/total"},
    "parameters": {
        "losses.stochastic_recon.coeff": {"values": [0.5]},
        "data.value_range": {"values": [[0, 1]]},
    },
}


pytestmark = pytest.mark.slow


@pytest.fixture(name="study")
def study_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> launch.Study:
    """As `spd-sweep` makes it, without asking W&B for anything."""
    launcher = Launcher(tmp_path)
    launcher.environment |= {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abcd1234"}
    for name in set(os.environ) - launcher.environment.keys():
        monkeypatch.delenv(name)
    for name, value in launcher.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(launcher.home)
    asked = {
        "definition": Definition.model_validate(DEFINITION).model_dump(exclude_unset=True),
        **{"experiment": "tms_5-2", "overrides": ["steps=2", *QUICK], "backend": "wandb"},
        **{"name": "spd-sweep", "project": "spd-tms", "jobs": ["agent0"], "sweep": "me/p/abcd1234"},
    }
    study = launch.create_study("sweeps", "a-study", asked)
    (study.directory / "jobs" / "agent0").mkdir(parents=True)
    monkeypatch.setenv(wandb_sweep.AGENT_VARIABLE, "agent0")
    return study


def test_the_command_of_wandbs_agent_runs_the_point(study: launch.Study):
    """W&B's own code expands the command and starts it, as for a run that its server hands out."""
    from wandb.wandb_agent import Agent

    agent = Agent(None, queue.Queue(), sweep_id="abcd1234")
    agent._sweep_command = wandb_sweep.sent(study)["command"]
    point = {"losses.stochastic_recon.coeff": 0.5, "data.value_range": [0, 1]}
    args = {key: {"value": value} for key, value in point.items()}
    agent._command_run({"run_id": "run12345", "program": wandb_sweep.PROGRAM, "args": args})
    process = agent._run_processes["run12345"]
    assert process.wait(timeout=200) == 0
    words = process._popen.args
    assert words[:4] == [sys.executable, "-P", "-m", "spd.sweeps.wandb_backend"]
    assert words[-2:] == ["losses.stochastic_recon.coeff=0.5", "data.value_range=[0, 1]"]
    (trial,) = trials_of(study)
    assert (trial.name, trial.point, trial.state) == ("run12345", point, "finished"), trial
    assert trial.agent == "agent0" and trial.env["WANDB_SWEEP_ID"] == "abcd1234"
    run = Path(trial.run_dir)
    assert run.parent.name == "tms_5-2" and (run / "report.html").is_file()
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    (known, *_) = [record.run for record in recorded(path) if record.HasField("run")]
    assert (known.run_id, known.sweep_id) == ("run12345", "abcd1234")
    history = [record.history for record in recorded(path) if record.HasField("history")]
    keys = {item.key or "/".join(item.nested_key) for row in history for item in row.item}
    assert DEFINITION["metric"]["name"] in keys, "the metric of the sweep is logged"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert trial.value == json.loads(lines[-1])["eval/loss/total"]


def test_a_sweep_that_wandb_does_not_make_is_an_error_with_its_words(
    study: launch.Study, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with pytest.raises(launch.UserError, match="W&B does not make the sweep: "):
        wandb_sweep.create(study)
