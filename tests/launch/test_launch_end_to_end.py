"""`spd-evals` and `spd-sweep` on this machine, from the command line to the table."""

import json
import signal
from pathlib import Path

import pytest

from tests.launch.test_job import PATIENCE, until
from tests.launch_fixtures import EVALS, QUICK, SWEEP, Launcher, table

pytestmark = pytest.mark.slow
LONG = (*QUICK, "steps=600", "save_every=20")


@pytest.fixture(name="launcher")
def launcher_fixture(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_evals_stopped_by_ctrl_c_go_on_and_end_with_the_same_numbers(launcher: Launcher):
    args = ("--experiments", "tms_5-2", "--local", "--cpu", *LONG)
    process = launcher.start(EVALS, *args)
    checkpoint = "tms_5-2/*-seed0/checkpoints/0*"
    until(lambda: any(launcher.out.glob(checkpoint)))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    (study,) = launcher.studies("evals")
    assert process.returncode == 130 and "every run writes a checkpoint first" in err
    assert out.endswith(f"go on with: spd-evals --resume {study.name}\n")
    collected = launcher.run(EVALS, "--collect", study.name)
    assert collected.returncode == 1 and "1 interrupted" in collected.stdout
    resumed = launcher.run(EVALS, "--resume", study.name, "--local", "--cpu")
    undisturbed = launcher.run(EVALS, *args)
    assert table(resumed.stdout) == table(undisturbed.stdout)
    one, two = (path.read_bytes() for path in launcher.out.glob("tms_5-2/*/metrics.jsonl"))
    assert one == two
    again = launcher.run(EVALS, "--resume", study.name, "--local")
    assert f"{study.name}: nothing is left to do" in again.stdout


def test_seeds_side_by_side_go_on_and_give_the_table_of_single_runs(launcher: Launcher):
    args = ("--experiments", "tms_5-2", "--seeds", "2", "--local", "--cpu", *LONG)
    process = launcher.start(EVALS, *args, "--ensemble", "always")
    until(lambda: any(launcher.out.glob("tms_5-2/*-seed1/checkpoints/0*")))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    (study,) = launcher.studies("evals")
    assert process.returncode == 130, out
    collected = launcher.run(EVALS, "--collect", study.name)
    assert collected.returncode == 1 and "2 interrupted" in collected.stdout
    resumed = launcher.run(EVALS, "--resume", study.name, "--local", "--cpu")
    assert "finished" in resumed.stderr and "1 job" in resumed.stdout
    single = launcher.run(EVALS, *args, "--ensemble", "never")
    assert "2 jobs" in single.stdout
    assert table(resumed.stdout) == table(single.stdout)
    assert len(list(launcher.out.glob(f"tms_5-2/{study.name}-seed*/report.html"))) == 2


def test_a_target_out_of_reach_is_skipped(launcher: Launcher):
    """The key is not one, and nobody answers: it is the network's fault, not the experiment's."""
    env = {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_MODE": "online",
    }
    args = ("--experiments", "tms_5-2", "--local", "target=wandb:me/project/run", *QUICK)
    done = launcher.run(EVALS, *args, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: wandb:me/project/run: cannot be fetched from W&B" in done.stdout


def test_a_sweep_stopped_goes_on_and_is_extended(launcher: Launcher):
    params = launcher.home / "params.yaml"
    grid = "method: grid\nmetric: {{name: eval/loss/total}}\nparameters: {{seed: {{values: {}}}}}\n"
    params.write_text(grid.format([0, 1]))
    args = ("tms_5-2", "1", "--local", "--params", str(params), *LONG)
    process = launcher.start(SWEEP, *args)
    until(lambda: any(launcher.out.glob("tms_5-2/*-trial0/checkpoints/0*")))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    (study,) = launcher.studies("sweeps")
    assert process.returncode == 130
    assert out.endswith(f"go on with: spd-sweep --resume {study.name}\n")
    params.write_text(grid.format([0, 1, 2]))
    resumed = launcher.run(SWEEP, "--resume", study.name, "2", "--local", "--params", str(params))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "1 point added" in resumed.stdout and "3 finished" in resumed.stdout
    logs = {path.name: path.read_text() for path in study.glob("trials/*.output.txt")}
    assert len(logs) == 3 and logs["trial0.output.txt"].count("run directory: ") == 2
    status = launcher.run(SWEEP, "--status", study.name)
    assert status.returncode == 0 and "3 finished" in status.stdout
    assert (study / "sweep.html").is_file()


def test_a_sweep_over_seeds_runs_them_side_by_side(launcher: Launcher):
    params = launcher.home / "params.yaml"
    params.write_text(
        "method: grid\nmetric: {name: eval/loss/total}\nparameters: {seed: {values: [0, 1, 2]}}\n"
    )
    args = ("tms_5-2", "2", "--local", "--params", str(params), *LONG)
    process = launcher.start(SWEEP, *args, "--ensemble", "always")
    until(lambda: any(launcher.out.glob("tms_5-2/*-seed1/checkpoints/0*")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    (study,) = launcher.studies("sweeps")
    assert process.returncode == 130
    resumed = launcher.run(SWEEP, "--resume", study.name, "2", "--local")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "3 finished" in resumed.stdout
    records = [json.loads(path.read_text()) for path in sorted(study.glob("trials/*.json"))]
    for seed, record in enumerate(records):
        assert record["point"] == {"seed": seed} and record["run_dir"].endswith(f"-seed{seed}")
        assert json.loads(Path(record["run_dir"], "result.json").read_text())["seed"] == seed
    single = launcher.run(SWEEP, *args, "--ensemble", "never")
    values = [
        [line.split()[2][:6] for line in done.stdout.splitlines() if line.startswith("trial")][1:]
        for done in (resumed, single)
    ]
    assert values[0] == values[1] and len(values[0]) == 3


KILLED_ONCE = """
import os, pathlib, sys, threading, time
words = sys.orig_argv
run = pathlib.Path(words[words.index("--run_dir") + 1]) if "--run_dir" in words else None

def kill(mark):
    while not list(run.glob("checkpoints/0*")):
        time.sleep(0.005)
    mark.touch()
    os.kill(os.getpid(), 9)

if run is not None:
    mark = pathlib.Path.home() / f"{run.name}.killed"
    if not mark.exists():
        threading.Thread(target=kill, args=(mark,), daemon=True).start()
"""
"""a `sitecustomize` by which every run is killed once, after its first checkpoint"""


def test_what_was_killed_goes_on_in_its_own_directory_and_counts_once(launcher: Launcher):
    folder = launcher.home / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(KILLED_ONCE)
    env = {"PYTHONPATH": f"{folder}:{launcher.package}"}
    args = ("--experiments", "tms_5-2", "--local", "--cpu", *LONG)
    killed = launcher.run(EVALS, *args, env=env)
    undisturbed = launcher.run(EVALS, *args)
    assert table(killed.stdout) == table(undisturbed.stdout), killed.stdout + killed.stderr
    one, two = (path.read_bytes() for path in launcher.out.glob("tms_5-2/*/metrics.jsonl"))
    assert one == two and len(list(launcher.home.glob("*.killed"))) == 1
    study = launcher.studies("evals")[0]
    (status,) = study.glob("jobs/*/status.json")
    assert json.loads(status.read_text())["attempts"] == 2
    once = launcher.run(EVALS, *args, "--retries", "0", env=env)
    assert once.returncode == 1 and "killed by SIGKILL" in once.stdout

    params = launcher.home / "params.yaml"
    grid = "method: grid\nmetric: {name: eval/loss/total}\nparameters: {seed: {values: [0]}}\n"
    params.write_text(grid)
    done = launcher.run(SWEEP, "tms_5-2", "1", "--local", "--params", str(params), *LONG, env=env)
    assert done.returncode == 0 and "1 finished" in done.stdout, done.stdout + done.stderr
    (study,) = launcher.studies("sweeps")
    (log,) = study.glob("trials/*.output.txt")
    assert log.read_text().count("run directory: ") == 2
    (record,) = study.glob("trials/*.json")
    run = Path(json.loads(record.read_text())["run_dir"])
    assert (launcher.home / f"{run.name}.killed").exists() and (run / "result.json").is_file()


def test_a_metric_that_is_not_logged_is_refused_before_anything_runs(launcher: Launcher):
    params = launcher.home / "params.yaml"
    params.write_text(
        "method: grid\nmetric: {name: eval/errors/totl}\nparameters: {seed: {value: 0}}\n"
    )
    done = launcher.run(SWEEP, "tms_5-2", "1", "--local", "--params", str(params), *QUICK)
    assert done.returncode == 2
    said = "metric.name: 'eval/errors/totl' is not logged; did you mean 'eval/errors/total'?"
    assert said in done.stderr and not launcher.studies("sweeps")
    assert not list(launcher.out.glob("tms_5-2/*"))
