"""Studies on this machine: their folder, their order, Ctrl-C; and what SLURM's words mean."""

import builtins
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from spd.config import UserError, parse
from spd.evals import run_evals
from spd.launch import resources, slurm
from spd.launch import study as launch
from spd.launch.job import Job, Status, read_status
from spd.launch.resources import (
    LaunchOptions,
    has_slurm,
    n_usable_cores,
    places,
    wants_ensemble,
    with_surroundings,
)
from spd.launch.study import take_snapshot
from spd.runs.provenance import code_state
from spd.settings import PACKAGE_DIR, REPO_DIR
from spd.sweeps import sweep
from tests.launch.test_job import HEEDS, PATIENCE, until
from tests.launch_fixtures import hears_ctrl_c

LOCAL = LaunchOptions(local=True)


@pytest.fixture(name="study")
def study_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> launch.Study:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    return launch.create_study(
        "evals",
        "a-study",
        {"jobs": [], "seeds": [], "experiments": [], "overrides": [], "slurm": {}},
    )


def add_job(study: launch.Study, name: str, code: str, minutes: float = 1) -> Job:
    env = launch.job_environment(study.code, LOCAL)
    command = [sys.executable, "-P", "-c", code]
    job = Job(name, study.directory / "jobs" / name, command, env, minutes)
    job.save()
    study.record["jobs"].append(name)
    study.save()
    return job


# --- a study and its copy of the code ---------------------------------------------------------------


def test_a_study_holds_what_was_asked_and_is_found_again(study: launch.Study):
    record = json.loads((study.directory / "study.json").read_text())
    assert record["jobs"] == [] and {"argv", "commit", "dirty", "created"} <= record.keys()
    assert launch.find_study("evals", "a-study") == launch.find_study("evals", str(study.directory))
    with pytest.raises(UserError, match="'a-studi': no such ID; did you mean 'a-study'?"):
        launch.find_study("evals", "a-studi")


def test_the_copy_is_the_code_as_it_is_and_knows_where_it_comes_from(tmp_path: Path):
    state = take_snapshot(tmp_path / "code")
    assert state == code_state() == code_state(tmp_path / "code")
    copied = {path.relative_to(tmp_path / "code" / "spd") for path in tmp_path.rglob("*.yaml")}
    assert copied == {path.relative_to(PACKAGE_DIR) for path in PACKAGE_DIR.rglob("*.yaml")}
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.needs("git")
def test_changes_that_are_not_committed_are_noted(tmp_path: Path):
    def git(*args: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    assert code_state(tmp_path).commit is None
    (tmp_path / "spd").mkdir()
    (tmp_path / "spd" / "a.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = code_state(tmp_path)
    assert clean.commit is not None and not clean.dirty
    (tmp_path / "notes.txt").write_text("")
    assert not code_state(tmp_path).dirty  # it is no part of the code
    (tmp_path / "spd" / "b.py").write_text("")
    assert code_state(tmp_path).dirty
    git("add", ".")
    git("commit", "-m", "second")
    (tmp_path / "spd" / "a.py").write_text("changed = 1")
    assert code_state(tmp_path).dirty


@pytest.mark.needs("git")
def test_the_commit_is_that_of_the_package_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not that of a repository around it, nor of one that the environment names."""

    def git(*args: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitignore").write_text("site-packages\n")
    git("add", ".")
    git("commit", "-m", "of something else")
    installed = tmp_path / "site-packages"
    (installed / "spd").mkdir(parents=True)
    (installed / "spd/__init__.py").write_text("")
    assert code_state(installed) == (None, False)
    own = code_state()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert code_state() == own and own.commit is not None


def test_a_job_runs_the_copy_wherever_it_is_started(study: launch.Study, monkeypatch):
    monkeypatch.chdir(REPO_DIR)
    job = add_job(study, "where", "import spd; print(spd.__file__)")
    launch.launch(study, [job], LOCAL, wait=True, expected=1)
    printed = (job.directory / "output.txt").read_text().strip()
    assert printed == str(study.code / "spd" / "__init__.py")


# --- on this machine --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shortest_come_first_and_as_many_as_allowed(study: launch.Study, capsys):
    log = study.directory / "order"
    code = "import time; f = open({!r}, 'a'); f.write('{} '); f.flush(); time.sleep(0.1); f.write('- ')"
    minutes = {"long": 30, "short": 1, "middle": 2}
    jobs = [add_job(study, name, code.format(str(log), name), m) for name, m in minutes.items()]
    options = LaunchOptions(local=True, max_parallel=1)
    assert launch.launch(study, jobs, options, wait=False, expected=33)
    assert log.read_text() == "short - middle - long - "
    out, err = capsys.readouterr()
    assert "the jobs run on this machine" in out
    assert "expected time: 33 min for 3 jobs, 1 at a time" in out
    assert [line for line in err.splitlines() if "finished" in line] == [
        f"{name}: finished" for name in ("short", "middle", "long")
    ]


def test_what_becomes_of_each_job_is_kept(study: launch.Study):
    jobs = [
        add_job(study, "good", "pass"),
        add_job(study, "bad", "import sys; sys.exit('error: no good')"),
        add_job(study, "away", "import sys; print('error: no net'); sys.exit(3)"),
    ]
    launch.launch(study, jobs, LOCAL, wait=True, expected=1)
    found = launch.statuses(study, launch.study_jobs(study))
    assert {name: (s.state, s.reason) for name, s in found.items()} == {
        "good": ("finished", None),
        "bad": ("failed", "no good"),
        "away": ("skipped", "no net"),
    }


def test_ctrl_c_lets_every_job_write_its_checkpoint(study: launch.Study):
    """Ctrl-C reaches every process of the terminal; a job hears of it once, from the launcher."""
    for name in ("one", "two", "three"):
        add_job(study, name, HEEDS)
    code = f"""
from spd.launch import study as launch
from spd.launch.resources import LaunchOptions
study = launch.find_study("evals", {str(study.directory)!r})
options = LaunchOptions(local=True, max_parallel=2, memory_gb=1e-3)
launch.launch(study, launch.study_jobs(study), options, wait=True, expected=3)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPO_DIR), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=hears_ctrl_c,
    )
    outputs = list(study.directory.glob("jobs/*"))
    ready = lambda: [j for j in outputs if "ready" in _text(j / "output.txt")]  # noqa: E731
    n = len(places(LaunchOptions(local=True, max_parallel=2, memory_gb=1e-3)))
    until(lambda: len(ready()) == n)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and b"every run writes a checkpoint first" in err
    begun = ready()
    assert len(begun) == n and all("['INT']" in _text(j / "output.txt") for j in begun)
    states = sorted(read_status(job).state for job in outputs)
    assert states == sorted(["interrupted"] * n + ["waiting"] * (3 - n))


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_a_job_whose_process_is_gone_is_not_running(study: launch.Study):
    job = add_job(study, "gone", "pass")
    (job.directory / "status.json").write_text(json.dumps(Status("running", attempts=1)._asdict()))
    status = launch.statuses(study, [job])["gone"]
    assert (status.state, status.reason) == ("interrupted", "its process is gone")


def test_only_jobs_of_slurm_are_cancelled(study: launch.Study):
    with pytest.raises(UserError, match="press Ctrl-C there"):
        launch.cancel(study)


# --- what a job is given ----------------------------------------------------------------------------


def options(**given: str) -> LaunchOptions:
    return parse(LaunchOptions, with_surroundings(given, "x"), "x")


def test_options_go_above_the_environment_above_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "slurm.yaml"
    path.write_text("partition: file\naccount: file\nqos: file\ngpus: 4\n")
    monkeypatch.setenv("SPD_SLURM_ACCOUNT", "environment")
    monkeypatch.setenv("SPD_SLURM_QOS", "environment")
    monkeypatch.setenv("SPD_SLURM_CONSTRAINT", "")
    found = options(slurm=str(path), qos="option")
    assert (found.partition, found.account, found.qos) == ("file", "environment", "option")
    assert found.constraint is None and found.n_gpus == 4
    assert options(slurm=str(path), cpu="true").n_gpus == 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SPD_SLURM_PARTITON", "x", "did you mean 'SPD_SLURM_PARTITION'"),
        ("SPD_SLURM_GPUS", "two", "SPD_SLURM_GPUS: gpus: .*'two'"),
    ],
)
def test_a_setting_of_the_environment_that_means_nothing_is_refused(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=said):
        options()


def test_a_file_that_means_nothing_is_refused(tmp_path: Path):
    path = tmp_path / "slurm.yaml"
    path.write_text("partitions: x\n")
    with pytest.raises(UserError, match="slurm.yaml: partitions: unknown key; did you mean 'part"):
        options(slurm=str(path))


def test_several_processes_are_joined_by_torchrun():
    module = ("spd.experiments.lm.lm_decomposition", "config.yaml")
    alone = launch.joined_python(options(), *module)
    assert alone == launch.python(*module)
    here = launch.joined_python(options(processes="2", cpu="true", cpus="6"), *module)
    assert here[:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert here[4:] == ["--standalone", "--nproc_per_node=2", "-m", *module]
    many = launch.joined_python(options(nodes="3", processes="8"), *module)
    assert {"--nnodes=3", "--nproc_per_node=8", "--rdzv_backend=c10d"} < set(many)
    given = launch.job_environment(Path("code"), options(processes="2", cpu="true", cpus="6"))
    assert given["OMP_NUM_THREADS"] == "6" and given["PYTHONSAFEPATH"] == "1"
    assert slurm.meeting_place("node7", "40001") == {
        "PET_RDZV_ENDPOINT": "node7:20001",
        "PET_RDZV_ID": "40001",
    }


def test_runs_of_several_processes_do_not_share_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spd.launch.resources.uses_gpus", lambda _: True)
    assert wants_ensemble(options()) and not wants_ensemble(options(nodes="2"))
    with pytest.raises(UserError, match="--ensemble always puts runs into one process, --nodes 2"):
        options(nodes="2", ensemble="always")
    assert options(processes="4").joined


def test_every_process_gets_its_own_gpu_cores_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What would be submitted. submitit writes it only where there is an `srun`: this one never runs."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)
    asked = options(processes="4", cpus="3", memory_gb="2")
    assert (asked.n_gpus, asked.n_cpus, asked.n_gb) == (4, 12, 8.0)
    assert options(processes="4", cpu="true").n_gpus == 0
    job = Job("a", tmp_path / "a", ["true"], {}, 1)
    (script,) = slurm.scripts(tmp_path, [job], asked)
    for line in ("--cpus-per-task=12", "--gpus-per-node=4", "--mem=8192MB", "--nodes=1"):
        assert f"#SBATCH {line}\n" in script


@pytest.mark.parametrize(
    ("main", "args", "said"),
    [
        (
            run_evals.main,
            ["--nodes", "2", "--local"],
            "--nodes 2: several machines are found by SLURM",
        ),
        (
            run_evals.main,
            ["batch_size=6", "--experiments", "tms_5-2", "--processes", "4", "--cpu"],
            "tms_5-2: batch_size 6 cannot be divided among 4 processes",
        ),
        (sweep.main, ["tms_5-2", "2", "--nodes", "2"], "nodes 2, processes 1: the runs of a sweep"),
        (
            sweep.main,
            ["tms_5-2", "2", "--processes", "2", "--cpu"],
            "nodes 1, processes 2: the runs",
        ),
    ],
)
def test_where_several_machines_or_processes_cannot_be(
    main: Any,
    args: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30:00", 90),
        ("12:00:00", 720),
        ("0:00:30", 1),
        ("1-00:00", 1440),
        ("2-00:00", 2880),
        ("1-12", 2160),
        ("1-01:30:01", 1531),
    ],
)
def test_time_limits_in_slurms_own_words(text: str, minutes: int, tmp_path: Path):
    assert options(time=text).time == minutes
    path = tmp_path / "slurm.yaml"
    path.write_text(f"time: {text}\n")
    assert parse(LaunchOptions, with_surroundings({"slurm": str(path)}, "x"), "x").time == minutes
    with pytest.raises(UserError, match="time: "):
        options(time="soon")


def test_a_time_limit_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(UserError, match="time: 1:30 can be read in two ways; write 1:30:00, or"):
        options(time="1:30")


def test_a_machine_holds_as_many_jobs_as_its_parts_allow(monkeypatch: pytest.MonkeyPatch):
    cores = n_usable_cores()

    def n_places(**given: int) -> int:
        return len(places(LaunchOptions.model_validate({"memory_gb": 1e-3, **given})))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert n_places() == cores
    assert n_places(cpus=cores) == 1
    assert len(places(LaunchOptions(memory_gb=1e6))) == 1  # at least one is tried
    assert n_places(max_parallel=1) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = places(LaunchOptions(gpus=2, memory_gb=1e-3))
    assert found == [{"CUDA_VISIBLE_DEVICES": "3,5"}]
    both = places(LaunchOptions(memory_gb=1e-3))
    assert both == [{"CUDA_VISIBLE_DEVICES": name} for name in ("3", "5")][: max(1, cores)]
    assert places(LaunchOptions(cpu=True, max_parallel=1)) == [{}]


def test_free_memory_is_known_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch):
    """As on a Mac. There psutil asks the system itself: what it says is given here."""

    def hidden(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, *args, **kwargs)

    real = io.open
    free = psutil.virtual_memory()._replace(available=5 * 2**29)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(resources, "n_usable_cores", lambda: 8)
    monkeypatch.setattr(io, "open", hidden)
    monkeypatch.setattr(builtins, "open", hidden)
    assert not _can_be_read(Path("/proc/meminfo"))
    for gigabytes, n in ((1.0, 2), (0.5, 5), (0.25, 8), (100.0, 1)):
        assert places(LaunchOptions(local=True, cpu=True, memory_gb=gigabytes)) == [{}] * n


def _can_be_read(path: Path) -> bool:
    try:
        return bool(path.read_text())
    except OSError:
        return False


# --- SLURM's arrays ---------------------------------------------------------------------------------


@pytest.fixture(name="cluster")
def cluster_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is asked of stand-ins for SLURM's commands, of which the arrays have at most 3 jobs."""
    log, folder = tmp_path / "asked", tmp_path / "bin"
    folder.mkdir()
    said = {
        "scontrol": "MaxArraySize            = 3",
        "sbatch": f"Submitted batch job $(($(cat {log} 2>/dev/null | wc -l) + 100))",
    }
    for name in ("scontrol", "sbatch", "srun", "scancel"):
        script = folder / name
        keep = f'grep -o "array=.*" "$1" >> {log} || echo single >> {log}\n'
        say = f'echo "{said.get(name, "")}"\n'
        script.write_text("#!/bin/sh\n" + say + (keep if name == "sbatch" else ""))
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def test_arrays_are_no_larger_than_the_cluster_allows(study: launch.Study, cluster: Path):
    jobs = [add_job(study, f"job{i}", "pass") for i in range(7)]
    numbers = slurm.submit(study.directory, jobs, LaunchOptions(cpu=True, max_parallel=6))
    assert cluster.read_text().split() == ["array=0-1%2", "array=0-1%2", "array=0-2%2"]
    expected = ["100_0", "100_1", "101_0", "101_1", "102_0", "102_1", "102_2"]
    assert numbers == {job.name: number for job, number in zip(jobs, expected, strict=True)}
    cluster.unlink()
    slurm.submit(study.directory, jobs[:3], LaunchOptions(cpu=True))
    assert cluster.read_text().split() == ["array=0-2%3"]
    shown = "".join(slurm.scripts(study.directory, jobs, LaunchOptions(cpu=True)))
    assert shown.count("--array=0-1%2") == 2 and shown.count("--array=0-2%3") == 1


def test_fewer_jobs_at_a_time_than_arrays_is_refused_before_any_work(
    study: launch.Study, cluster: Path
):
    jobs = [add_job(study, f"job{i}", "pass") for i in range(7)]
    with pytest.raises(UserError, match="7 jobs are 3 arrays of at most 3, .*MaxArraySize"):
        slurm.submit(study.directory, jobs, LaunchOptions(cpu=True, max_parallel=2))
    assert not cluster.exists()


def replace_command(cluster: Path, name: str, script: str) -> None:
    (cluster.parent / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")


def test_where_there_are_no_arrays_jobs_are_single(study: launch.Study, cluster: Path):
    replace_command(cluster, "scontrol", 'echo "MaxArraySize            = 0"')
    jobs = [add_job(study, f"job{i}", "pass") for i in range(3)]
    numbers = slurm.submit(study.directory, jobs, LaunchOptions(cpu=True))
    assert cluster.read_text().split() == ["single"] * 3
    assert numbers == {"job0": "100", "job1": "101", "job2": "102"}
    shown = "".join(slurm.scripts(study.directory, jobs, LaunchOptions(cpu=True)))
    assert "--array" not in shown


@pytest.mark.parametrize(
    ("answer", "known"),
    [("echo MaxArraySize = 4", "MaxArraySize is 4"), ("exit 1", "MaxArraySize is not known here")],
)
def test_an_array_that_is_refused_names_the_limit_and_what_to_do(
    study: launch.Study, cluster: Path, answer: str, known: str
):
    replace_command(cluster, "scontrol", answer)
    refusal = "echo 'sbatch: error: Invalid job array specification' >&2; exit 1"
    replace_command(cluster, "sbatch", refusal)
    jobs = [add_job(study, f"job{i}", "pass") for i in range(4)]
    with pytest.raises(UserError, match=f"array of 4 jobs, .*{known}.*fewer agents or") as raised:
        slurm.submit(study.directory, jobs, LaunchOptions(cpu=True))
    said = str(raised.value)
    assert "Invalid job array specification; it is an array" in said and "\n" not in said
    with pytest.raises(UserError, match="array spec") as raised:
        slurm.submit(study.directory, jobs[:1], LaunchOptions(cpu=True))
    assert "MaxArraySize" not in str(raised.value)


# --- SLURM's words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "says", "expected"),
    [
        ("waiting", "PENDING", ("waiting", None)),
        ("waiting", "RUNNING", ("running", None)),
        ("running", "RUNNING", ("running", None)),
        ("interrupted", "PENDING", ("waiting", "requeued")),
        ("interrupted", "CANCELLED", ("cancelled", None)),
        ("interrupted", "FAILED", ("interrupted", None)),
        ("waiting", "CANCELLED", ("cancelled", None)),
        ("waiting", None, ("cancelled", None)),
        ("running", "OUT_OF_MEMORY", ("failed", "killed (SLURM: OUT_OF_MEMORY)")),
        ("running", None, ("failed", "killed (SLURM: no longer known)")),
        ("finished", None, ("finished", None)),
        ("failed", "FAILED", ("failed", None)),
    ],
)
def test_what_a_job_wrote_and_what_slurm_says(own: str, says: str | None, expected: tuple):
    status = Status(own, attempts=0 if own == "waiting" else 1)  # pyright: ignore[reportArgumentType]
    states = {} if says is None else {"7_0": says}
    found = slurm.merged(status, "7_0", states)
    assert (found.state, found.reason) == expected


def test_here_is_said_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert not has_slurm()
    assert not launch.on_slurm(LaunchOptions(partition="gpu"))
    line = "no SLURM here: the jobs run on this machine; without meaning here: partition\n"
    assert capsys.readouterr().out == line
