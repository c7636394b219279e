"""The command line of every registered experiment, and what it leaves."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from spd.registry import EXPERIMENTS, command_line
from spd.runs import cli
from spd.settings import PACKAGE_DIR, PATIENCE, load_env
from tests.run_fixtures import (
    QUICK,
    TMS_SCRIPT,
    Command,
    command_fixture,
    finished_run,
    listing,
    log_lines,
    make_target,
    target_fixture,
)
from tests.runs.little_run import status_of

__all__ = ["command_fixture", "target_fixture"]

FEW = ("steps=2", "batch_size=16", "eval_batch_size=16", "n_eval_batches=1", "log_every=1")


TOYS = [name for name, experiment in EXPERIMENTS.items() if "/lm/" not in experiment.config]
"""language models have targets and results of another sort: see test_lm_decomposition"""
QUICK_ONES = ("tms_40-10-id",)
"""the others are run where the slow tests are"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK_ONES else pytest.mark.slow) for name in TOYS],
)
def test_an_experiment_from_its_script_to_its_files(command: Command, name: str):
    assert_leaves_its_files(command, name, "figures={}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_an_experiment_with_all_its_figures(command: Command, name: str):
    assert_leaves_its_files(command, name, drawn=True)


def assert_leaves_its_files(command: Command, name: str, *args: str, drawn: bool = False) -> None:
    experiment = EXPERIMENTS[name]
    target = make_target(command.folder / "target", name)
    script = PACKAGE_DIR.parent / (experiment.module.replace(".", "/") + ".py")
    config_file = PACKAGE_DIR / experiment.config
    done = command.run(script, config_file, f"target={target}", *FEW, *args, drawn=drawn)
    assert done.status == 0, done.err
    (run,) = command.runs()
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert run.parent.name == name == config["experiment"]
    assert sorted(listing(run)) == sorted(
        [
            *(".lock", "config.yaml", "log.txt", "meta.json", "metrics.jsonl"),
            *("report.html", "result.json", "timings.jsonl"),
            *(f"target/{path}" for path in listing(target)),
            *(
                f"checkpoints/00000002/{file}"
                for file in ("digests.json", "model.safetensors", "training_state")
            ),
            *(
                f"figures/{figure}/00000002.{kind}"
                for figure in (*config["figures"], "loss_curves")
                for kind in ("png", "csv")
            ),
            "figures/ladder/00000002.csv",  # the report draws it
        ]
    )
    assert config["steps"] == 2 and config["target"] == str(target)
    verdict = "not solved by causes"
    assert done.out.startswith(f"{name}, seed 0, 2 steps") and verdict in done.out
    assert done.out.endswith(f"report: {run / 'report.html'}\n")
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [0, 0, 1, 2]
    for metric in ("eval/errors/total", "eval/matches", "eval/loss/total"):
        assert metric in lines[0] and metric in lines[-1]
    assert "eval/solved" in lines[-1] and "eval/solved" not in lines[0], "at the end alone"
    timings = (run / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in timings] == [0, 1]


def test_what_is_recorded_about_a_run(command: Command):
    done = finished_run(command)
    run = command.only_run()
    meta = json.loads((run / "meta.json").read_text(encoding="utf-8"))
    assert meta["argv"][0] == str(TMS_SCRIPT) and "steps=6" in meta["argv"]
    assert meta["command"].startswith("python ") and "steps=6" in meta["command"]
    assert meta["status"] == "finished" and meta["seconds"] > 0 and meta["tracker"] is None
    assert meta["entry"] == {
        "module": "spd.experiments.tms.tms_decomposition",
        "config": "TMSConfig",
        "build": "build",
    }
    assert {"python", "torch", "numpy", "wandb"} <= meta["versions"].keys()
    assert {"commit", "dirty", "device", "host", "started"} <= meta.keys()
    log = (run / "log.txt").read_text(encoding="utf-8")
    for line in ("target: trained directory", f"run directory: {run}", "no W&B key", "step 6/6"):
        assert line in log and line in done.err


@pytest.mark.slow
def test_by_name_in_a_real_process_of_its_own(command: Command):
    environment = {**os.environ, "SPD_OUT_DIR": str(command.out), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [*command_line("tms_5-2"), f"target={command.target}", *QUICK],
        env=environment,
        cwd=command.home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run = command.only_run()
    assert "figures/loss_curves/00000006.png" in listing(run)
    assert f"run directory: {run}" in done.stderr and done.stdout.startswith("tms_5-2, seed 0")
    assert not listing(command.home)


def test_a_run_that_diverges_names_the_term_and_fails(command: Command):
    done = command.tms("lr=1e30")
    assert done.status == 1 and "Traceback" not in done.err
    assert "loss/stochastic_recon = " in done.err and "step" in done.err
    run = command.only_run()
    assert json.loads((run / "meta.json").read_text())["status"] == "failed"
    assert not (run / "result.json").exists() and not (run / "report.html").exists()


def test_a_target_that_training_cannot_give_fails_with_what_was_tried(command: Command):
    training = command.home / "hopeless.yaml"
    settings = "{kind: tms, model: {n_features: 5, n_hidden: 2}, steps: 1, n_seeds: 2,"
    training.write_text(settings + " batch_size: 8, lr: 1e-3}\n", encoding="utf-8")
    done = command.tms(f"target={training}")
    assert done.status == 1 and "Traceback" not in done.err
    assert "none of 2 seeds represents all 5 features" in done.err
    assert not command.runs()


def test_help_says_how_to_use_it(command: Command):
    done = command.run(TMS_SCRIPT, "--help")
    assert done.status == 0 and done.err == ""
    assert "key=value" in done.out and "--resume RUN_DIR" in done.out


def test_overrides_reach_every_depth(command: Command):
    finished_run(command, "data.value_range=[-1, 1]", "losses.schatten={coeff: 1e-3, pnorm: 0.9}")
    config = yaml.safe_load((command.only_run() / "config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["value_range"] == [-1.0, 1.0]
    assert config["losses"]["schatten"] == {"coeff": 1e-3, "type": "schatten", "pnorm": 0.9}
    assert "loss/schatten" in log_lines(command.only_run())[1]


def test_figures_are_drawn_on_the_way_where_that_is_wanted(command: Command):
    finished_run(command, "figures={mean_activity: {}}", "figures_every=4")
    figures = command.only_run() / "figures" / "mean_activity"
    assert sorted(p.name for p in figures.glob("*.png")) == [f"0000000{n}.png" for n in (0, 4, 6)]


# --- .env ----------------------------------------------------------------------------------------


def test_env_of_the_working_directory_is_loaded_and_the_shell_wins(command: Command):
    (command.home / ".env").write_text(
        f"SPD_OUT_DIR={command.folder / 'elsewhere'}\nWANDB_MODE=disabled\n", encoding="utf-8"
    )
    done = command.tms(env={"WANDB_MODE": None})
    assert done.status == 0 and "WANDB_MODE=disabled" in done.err
    assert len(command.runs()) == 1 and not (command.folder / "elsewhere").exists()


def test_env_gives_the_output_root_to_every_command(command: Command):
    elsewhere = command.folder / "elsewhere"
    (command.home / ".env").write_text(f"SPD_OUT_DIR={elsewhere}\n", encoding="utf-8")
    unset = {"SPD_OUT_DIR": None}
    done = command.tms(env=unset)
    assert done.status == 0, done.err
    (run,) = elsewhere.glob("tms_5-2/*")
    training = PACKAGE_DIR / "experiments" / "tms" / "train_tms.py"
    easy = command.home / "easy.yaml"
    model = "{kind: tms, model: {n_features: 2, n_hidden: 2}, steps: 300, n_seeds: 2,"
    easy.write_text(model + " batch_size: 64, lr: 2e-2}\n", encoding="utf-8")
    done = command.run(training, easy, env=unset)
    assert done.status == 0, done.err
    assert len(list((elsewhere / "targets").glob("easy-*"))) == 1
    assert not command.out.exists() and run.is_dir()


def test_env_at_the_repository_root_comes_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, here = tmp_path / "root", tmp_path / "here"
    for folder, text in ((root, "SPD_A=root\nSPD_B=root\nSPD_C=root\n"), (here, "SPD_A=here\n")):
        folder.mkdir()
        (folder / ".env").write_text(text, encoding="utf-8")
    monkeypatch.chdir(here)
    for name in ("SPD_A", "SPD_B"):
        monkeypatch.setenv(name, "")  # so that they are taken back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPD_C", "shell")
    load_env(root)
    assert [os.environ[f"SPD_{letter}"] for letter in "ABC"] == ["here", "root", "shell"]


SCRIPT = """
import os
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
from spd.runs.cli import cli
from spd.runs.execution import ExperimentConfig

def build(config, device):
    raise AssertionError

cli(ExperimentConfig, build)
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, ["None None", "passive 1000"]),
        pytest.param({"OMP_WAIT_POLICY": "active"}, ["active None"], marks=pytest.mark.slow),
        pytest.param({"GOMP_SPINCOUNT": "5"}, ["None 5"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_script_begins_anew_once_for_threads_that_sleep_while_they_wait(
    tmp_path: Path, given: dict[str, str], seen: list[str]
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    kept = {key: value for key, value in os.environ.items() if key not in PATIENCE}
    done = subprocess.run(
        [sys.executable, str(script), "missing.yaml", "steps=3"],
        env={**kept, **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == seen
    assert done.returncode == 2 and "missing.yaml: no such file" in done.stderr


def test_reports_of_many_runs_keep_few_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """All are opened before anything is done with the first, and no more than a few lie in memory."""
    done: list[str] = []
    there: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Opened:
        def __init__(self, name: str) -> None:
            nonlocal most
            self.directory, self.prepared, self.step = Path(name), None, 0
            self.config = SimpleNamespace(figures={})
            done.append(f"opened {name}")
            there.add(self)
            most = max(most, len(there))

    def reported(run: Path, *_: Any) -> Path:
        done.append(f"reported {run}")
        return run / "report.html"

    monkeypatch.setattr(cli, "MOST_KEPT", 2)
    monkeypatch.setattr(cli, "_opened", lambda name, *_, **__: Opened(name))
    monkeypatch.setattr(cli, "_those_with_a_state", list)
    monkeypatch.setattr(cli, "look_at_checkpoint", lambda *_: None)
    monkeypatch.setattr(cli, "report_on", reported)
    names = [f"run{number}" for number in range(20)]
    assert status_of(cli.report, *names) == 0
    assert done[:20] == [f"opened {name}" for name in names]
    assert [word for word in done if word.startswith("reported")] == [
        f"reported {name}" for name in names
    ]
    assert most <= 4 and capsys.readouterr().out.count("report: ") == 20
