"""Evals and sweeps on a real SLURM of one or two nodes: submitted, killed, requeued, cancelled, refused."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spd.settings import PACKAGE_DIR
from tests.launch_fixtures import EVALS, QUICK, SWEEP, Launcher, table
from tests.slurm.cluster import running_cluster, why_not

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
LONG = (*QUICK, "steps=1000", "save_every=20")
"""a run that there is time to disturb"""


@pytest.fixture(scope="module", name="slurm")
def slurm_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as environment:
        yield environment


@pytest.fixture(name="launcher")
def launcher_fixture(tmp_path: Path, slurm: dict[str, str]) -> Launcher:
    launcher = Launcher(tmp_path)
    launcher.environment |= slurm
    return launcher


def slurm_says(launcher: Launcher, *command: str) -> str:
    done = subprocess.run(command, env=launcher.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def queue(launcher: Launcher, states: str = "all") -> dict[str, str]:
    """Number → state of every job that SLURM still knows."""
    text = slurm_says(launcher, "squeue", "-h", "--array", f"--states={states}", "--format=%i %T")
    return dict(line.split() for line in text.splitlines())


def until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: waited in vain"
        time.sleep(0.1)


def start_now(launcher: Launcher, number: str) -> None:
    """SLURM holds a requeued job back for a while.

    With reason: in the second in which it ended its node takes it for the one that was just killed.
    """
    time.sleep(3)

    def tried() -> bool:
        command = ["scontrol", "update", f"jobid={number}", "starttime=now"]
        subprocess.run(command, env=launcher.environment, capture_output=True)
        return queue(launcher)[number] in ("RUNNING", "COMPLETED")

    try:
        until(tried, f"job {number} starts again")
    except AssertionError:
        pytest.fail(slurm_says(launcher, "scontrol", "show", "job", number))


def only_study(launcher: Launcher, kind: str = "evals") -> Path:
    (study,) = launcher.studies(kind)
    return study


def job_number(study: Path, name: str) -> str:
    return json.loads((study / "study.json").read_text())["slurm"][name]


def status(study: Path, name: str) -> dict:
    path = study / "jobs" / name / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {"state": "waiting"}


def processes(word: str) -> list[int]:
    """Those with this word on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [int(path.parent.name)] if word in words else []
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def run_of(launcher: Launcher, study: Path, seed: int, name: str = "tms_5-2") -> Path:
    return launcher.out / name / f"{study.name}-seed{seed}"


def is_past(run: Path, step: int) -> bool:
    """Whether a run has a checkpoint of that step or a later one; only the newest are kept."""
    return any(int(path.name) >= step for path in (run / "checkpoints").glob("[0-9]*"))


def test_evals_are_submitted_waited_for_and_collected_as_without_slurm(launcher: Launcher):
    seeds = ("--seeds", "2", "--ensemble", "never")  # one job each, as without GPUs
    args = ("--experiments", "tms_5-2,tms_40-10", *seeds, "--wait", "steps=6", *QUICK)
    done = launcher.run(EVALS, *args)
    assert done.returncode == 1, done.stderr  # six steps do not give what is expected
    study = only_study(launcher)
    names = slurm_says(launcher, "squeue", "-h", "--states=all", "--array", "--format=%j %i")
    numbers = json.loads((study / "study.json").read_text())["slurm"]
    assert {line.split()[1]: line.split()[0] for line in names.splitlines()} == {
        number: f"spd-eval-{name.rpartition('-')[0]}-1min" for name, number in numbers.items()
    }
    assert "tms_5-2: expected solved from 0.5 to 1, found 0.000" in done.stdout
    assert (study / "summary.html").is_file() and len(
        list((study / "slurm").glob("[0-9]*.sh"))
    ) == 2
    again = launcher.run(EVALS, "--collect", study.name)
    assert again.returncode == 1 and table(again.stdout) == table(done.stdout)
    here = launcher.run(EVALS, *args, "--local")
    assert here.returncode == 1 and table(here.stdout) == table(done.stdout)
    (other,) = [path for path in launcher.studies("evals") if path != study]
    for seed in (0, 1):
        one, two = (run_of(launcher, path, seed) / "metrics.jsonl" for path in (study, other))
        assert one.read_bytes() == two.read_bytes()


def test_the_seeds_of_an_experiment_share_a_gpu(launcher: Launcher):
    args = ("--experiments", "tms_5-2", "--seeds", "2", "--wait", "steps=2", *QUICK)
    assert launcher.run(EVALS, *args).returncode == 1
    study = only_study(launcher)
    (name,) = json.loads((study / "study.json").read_text())["slurm"]
    assert status(study, name)["state"] == "finished"
    assert all((run_of(launcher, study, seed) / "report.html").is_file() for seed in (0, 1))


def test_a_job_killed_or_told_to_stop_in_the_middle_ends_with_the_same_numbers(
    launcher: Launcher,
):
    """Seed 0 is killed by SIGKILL and requeued; seed 1 gets what SLURM sends at a time limit."""
    args = ("--experiments", "tms_5-2", "--seeds", "2", *LONG)
    assert launcher.run(EVALS, *args, "--cpu").returncode == 0
    study = only_study(launcher)
    runs = [run_of(launcher, study, seed) for seed in (0, 1)]
    numbers = [job_number(study, f"tms_5-2-seed{seed}") for seed in (0, 1)]
    for run in runs:
        until(lambda run=run: is_past(run, 40), f"a checkpoint of {run}")
    slurm_says(launcher, "scancel", "--signal=USR2", numbers[1])
    (pid,) = processes(str(runs[0]))
    for victim in (parent(pid), pid):
        os.kill(victim, signal.SIGKILL)
    until(lambda: queue(launcher)[numbers[0]] == "FAILED", "the killed job is over")
    assert not (runs[0] / "result.json").exists()
    slurm_says(launcher, "scontrol", "requeue", numbers[0])
    until(lambda: status(study, "tms_5-2-seed1")["state"] == "interrupted", "seed 1 stops")
    for number in numbers:
        start_now(launcher, number)
    until(lambda: all(queue(launcher)[n] == "COMPLETED" for n in numbers), "both end")
    for seed in (0, 1):
        found = status(study, f"tms_5-2-seed{seed}")
        assert (found["state"], found["attempts"]) == ("finished", 2)
    assert launcher.run(EVALS, *args, "--cpu", "--local").returncode == 1
    (other,) = [path for path in launcher.studies("evals") if path != study]
    for seed, run in enumerate(runs):
        undisturbed = run_of(launcher, other, seed)
        for name in ("metrics.jsonl", "checkpoints/00001000/model.safetensors"):
            assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_of_several_processes_is_stopped_and_ends_with_the_numbers_of_one(
    launcher: Launcher, nodes: int
):
    """Two processes, on one machine or on two, and what SLURM sends at a time limit."""
    args = ("--experiments", "tms_5-2", "--cpu", *QUICK, "steps=400", "save_every=20")
    where = ("--partition", "pair", "--nodes", str(nodes), "--processes", str(3 - nodes))
    assert launcher.run(EVALS, *args, *where).returncode == 0
    study = only_study(launcher)
    run, number = run_of(launcher, study, 0), job_number(study, "tms_5-2-seed0")
    until(lambda: is_past(run, 40), f"a checkpoint of {run}")
    slurm_says(launcher, "scancel", "--signal=USR2", number)
    until(lambda: status(study, "tms_5-2-seed0")["state"] == "interrupted", "a checkpoint")
    start_now(launcher, number)
    until(lambda: status(study, "tms_5-2-seed0")["state"] == "finished", "the end of the run")
    assert status(study, "tms_5-2-seed0")["attempts"] == 2
    meta = json.loads((run / "meta.json").read_text())
    assert meta["n_processes"] == 2 and (run / "report.html").is_file()
    assert launcher.run(EVALS, *args, "--local").returncode in (0, 1)
    (other,) = [path for path in launcher.studies("evals") if path != study]
    own, alone = (metrics(run_of(launcher, path, 0)) for path in (study, other))
    assert [list(line) for line in own] == [list(line) for line in alone]
    for line, expected in zip(own, alone, strict=True):
        assert line == pytest.approx(expected, rel=1e-2, abs=1e-4)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_not_more_of_an_array_run_at_a_time_than_allowed(launcher: Launcher):
    args = ("--experiments", "tms_5-2", "--seeds", "3", "--max_parallel", "1", "--cpu")
    done = launcher.run(EVALS, *args, "steps=2", *QUICK)
    assert done.returncode == 0, done.stderr
    study = only_study(launcher)
    number = job_number(study, "tms_5-2-seed0").partition("_")[0]
    assert "ArrayTaskThrottle=1" in slurm_says(launcher, "scontrol", "show", "job", number)
    at_once, ended = 0, False
    while not ended:
        states = [state for key, state in queue(launcher).items() if key.startswith(f"{number}_")]
        at_once = max(at_once, states.count("RUNNING"))
        ended = all(state == "COMPLETED" for state in states)
        assert not {"FAILED", "CANCELLED"} & set(states)
        time.sleep(0.2)
    assert at_once == 1


def test_a_job_that_fails_is_named_with_its_reason(launcher: Launcher):
    args = ("--experiments", "tms_5-2", "--cpu", "--wait", "steps=6", *QUICK, "lr=1e30")
    done = launcher.run(EVALS, *args)
    assert done.returncode == 1
    assert "1 failed" in done.stdout and "seed 0 failed: step" in done.stdout
    number = job_number(only_study(launcher), "tms_5-2-seed0")
    assert queue(launcher)[number] == "FAILED"


def test_a_cancelled_job_writes_its_checkpoint_and_can_be_resumed(launcher: Launcher):
    """Also: its code is that of the submission, and it gets the GPUs that it asks for."""
    copy = launcher.folder / "checkout"
    shutil.copytree(PACKAGE_DIR, copy / "spd", ignore=shutil.ignore_patterns("__pycache__"))
    launcher.environment["PYTHONPATH"] = str(copy)
    slurm_says(launcher, "scontrol", "update", "partitionname=main", "state=down")
    try:
        done = launcher.run(EVALS, "--experiments", "tms_5-2", "--gpus", "2", *LONG)
        assert done.returncode == 0, done.stderr
        (copy / "spd" / "__init__.py").write_text("raise RuntimeError('changed since')")
    finally:
        slurm_says(launcher, "scontrol", "update", "partitionname=main", "state=up")
    launcher.environment["PYTHONPATH"] = str(PACKAGE_DIR.parent)
    study = only_study(launcher)
    run, number = run_of(launcher, study, 0), job_number(study, "tms_5-2-seed0")
    until(lambda: is_past(run, 20), "a checkpoint")
    (pid,) = processes(str(run))
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    assert "CUDA_VISIBLE_DEVICES=0,1" in environment
    assert "gpu:2" in slurm_says(launcher, "scontrol", "show", "job", number).replace("gres/", "")
    done = launcher.run(EVALS, "--cancel", study.name)
    assert done.returncode == 0 and done.stdout == "cancelled: tms_5-2-seed0\n"
    until(lambda: queue(launcher)[number] == "CANCELLED", "it is cancelled")
    assert status(study, "tms_5-2-seed0")["state"] == "interrupted"
    assert json.loads((run / "meta.json").read_text())["status"] == "interrupted"
    collected = launcher.run(EVALS, "--collect", study.name)
    assert collected.returncode == 1 and "1 cancelled" in collected.stdout
    resumed = launcher.run(EVALS, "--resume", study.name, "--wait", "--cpu")
    assert resumed.returncode == 1, resumed.stderr
    assert status(study, "tms_5-2-seed0")["state"] == "finished" and "missed" in resumed.stdout
    code = json.loads((run / "meta.json").read_text())["argv"][0]
    assert code.startswith(str(study / "code"))


def test_a_sweep_of_six_points_by_three_agents_runs_each_once(launcher: Launcher):
    params = launcher.home / "six.yaml"
    params.write_text(
        "method: grid\nmetric: {name: eval/loss/total}\n"
        "parameters: {seed: {values: [0, 1, 2]}, lr: {values: [1e-3, 1e-2]}}\n"
    )
    args = ("tms_5-2", "3", "--params", str(params), "--cpu", "steps=6", *QUICK)
    done = launcher.run(SWEEP, *args, "--wait", "--job_suffix", "5m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 finished" in done.stdout and done.stdout.count("submitted spd-sweep-5m: agent") == 3
    study = only_study(launcher, "sweeps")
    logs = [path.read_text() for path in (study / "trials").glob("*.output.txt")]
    assert len(logs) == 6 and all(log.count("run directory: ") == 1 for log in logs)
    points = [json.loads(path.read_text())["point"] for path in (study / "trials").glob("*.json")]
    assert {(point["seed"], point["lr"]) for point in points} == {
        (seed, lr) for seed in (0, 1, 2) for lr in (1e-3, 1e-2)
    }
    here = launcher.run(SWEEP, *args, "--local")
    assert here.returncode == 0, here.stderr
    trials = [
        [line for line in text.splitlines() if line.startswith("trial")]
        for text in (done.stdout, here.stdout)
    ]
    assert trials[0] == trials[1] and len(trials[0]) == 7


def test_what_slurm_refuses_leaves_nothing_behind(launcher: Launcher):
    for module, args in ((EVALS, ("--experiments", "tms_5-2")), (SWEEP, ("tms_5-2", "2"))):
        done = launcher.run(module, *args, "--partition", "nowhere", "steps=2", *QUICK)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "SLURM refuses spd-" in done.stderr and "nvalid partition" in done.stderr
    done = launcher.run(EVALS, "--experiments", "tms_5-2", "--gpus", "3", "steps=2", *QUICK)
    assert done.returncode == 2 and "--cpu asks for no GPU" in done.stderr
    assert not launcher.studies("evals") and not launcher.studies("sweeps")
    assert not queue(launcher, "PENDING,RUNNING")
