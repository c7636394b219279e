"""Sweeps under load: killed agents, hundreds of trials, thousands of runs, a clock that goes back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from spd import run_files
from spd.launch.study import Study
from spd.run_files import cut_lines, new_name
from spd.settings import REPO_DIR
from spd.sweeps import optuna_backend as local_study
from spd.sweeps import sweep
from spd.sweeps.growing import GrowingLines
from spd.sweeps.journal import Journal
from spd.sweeps.trials import trials_of
from tests.evals import many_runs
from tests.launch.test_job import until
from tests.launch_fixtures import EVALS, QUICK, SWEEP, Launcher
from tests.sweeps.many_trials import FAILED_EVERY, ended_study
from tests.sweeps.test_sweeps import ended, make_study

pytestmark = pytest.mark.undrawn

STAND_IN = """
import json, os, pathlib, sys, time
words = sys.orig_argv
if "--run_dir" in words:
    run = pathlib.Path(words[words.index("--run_dir") + 1])
    run.mkdir(parents=True, exist_ok=True)
    (seed,) = [word.partition("=")[2] for word in words if word.startswith("seed=")]
    with (run / "begun").open("a") as file:
        file.write(f"{seed}\\n")
    if not (run / "ended").exists():
        time.sleep(0.02)
        line = json.dumps({"step": 0, "eval/loss/total": float(seed)})
        (run / "metrics.jsonl").write_text(line + "\\n")
        (run / "ended").open("x").close()
    os._exit(0)
"""
"""a `sitecustomize` that takes the place of a run, before anything of it is imported"""


class Agents:
    """Agents of a sweep whose runs take a moment."""

    def __init__(self, folder: Path, n_points: int, n_agents: int) -> None:
        self.folder = folder
        raw = {"method": "grid", "metric": {"name": "eval/loss/total"}}
        raw["parameters"] = {"seed": {"values": list(range(n_points))}}
        self.study = make_study(folder, raw)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(STAND_IN)
        self.processes = [self.start(number) for number in range(n_agents)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        (self.study.directory / "jobs" / f"agent{number}").mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join((str(self.folder / "site"), str(REPO_DIR)))
        words = ("spd.sweeps.agent", str(self.study.directory), f"agent{number}")
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", *words],
                env={**os.environ, "PYTHONPATH": path, "SPD_OUT_DIR": str(self.folder / "out")},
                stdout=log,
                stderr=log,
            )

    def n_ended(self) -> int:
        return len(list(self.folder.glob("out/*/*/ended")))

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def check(self, n_points: int) -> None:
        """Every point was run once, in a directory of its own, and none was lost."""
        trials = trials_of(self.study)
        assert sorted(trial.point["seed"] for trial in trials) == list(range(n_points))
        assert {trial.state for trial in trials} == {"finished"}
        assert all(trial.value == trial.point["seed"] for trial in trials)
        assert len({trial.run_dir for trial in trials}) == self.n_ended() == n_points
        for (
            trial
        ) in trials:  # what was taken over went on in the same directory with the same point
            assert set((Path(trial.run_dir) / "begun").read_text().split()) == {
                str(trial.point["seed"])
            }
        assert local_study.n_waiting(self.study) == 0


@pytest.mark.slow
def test_a_killed_agent_loses_no_point(tmp_path: Path):
    agents = Agents(tmp_path, 12, 2)
    until(lambda: agents.n_ended() >= 2)
    agents.kill(0)
    assert agents.processes[1].wait(120) == 0
    agents.check(12)


@pytest.mark.slow
def test_500_trials_while_an_agent_is_killed_every_20_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    n, agents = 500, Agents(tmp_path, 500, 4)
    reached: list[tuple[int, float]] = []
    memory: dict[int, list[int]] = {}
    begun = last_kill = time.monotonic()
    killed: list[int] = []
    while any(process.poll() is None for process in agents.processes):
        now = time.monotonic()
        reached.append((agents.n_ended(), now))
        for process in agents.processes:
            if process.poll() is None:
                memory.setdefault(process.pid, []).append(
                    psutil.Process(process.pid).memory_info().rss
                )
        if now - last_kill > 20 and local_study.n_waiting(agents.study) > 4:
            victim = len(killed) % 4
            killed.append(agents.n_ended())
            agents.kill(victim)
            agents.processes[victim] = agents.start(victim)
            last_kill = now
        time.sleep(0.5)
    assert [process.returncode for process in agents.processes] == [0] * 4
    agents.check(n)
    assert killed, "somebody was killed"
    assert len({json.dumps(trial.point) for trial in trials_of(agents.study)}) == n
    growths = []
    for values in memory.values():  # once imported, an agent needs what its trials are in memory
        settled = values[len(values) // 3 :]
        growths.append((max(settled) - min(settled)) / 1e6)
    quarters = [_seconds(reached, i * n // 4, (i + 1) * n // 4) for i in range(4)]
    with capsys.disabled():
        print(
            f"\n500 trials by 4 agents in {time.monotonic() - begun:.0f} s; killed when so many had"
            f" ended: {killed}; 500 points once each, 0 lost; seconds for each quarter:"
            f" {', '.join(f'{seconds:.0f}' for seconds in quarters)}; growth of an agent by at most"
            f" {max(growths):.1f} MB"
        )
    assert max(growths) < 30
    assert quarters[-1] < 2 * quarters[0] + 10


def _seconds(reached: list[tuple[int, float]], begin: int, end: int) -> float:
    """From when so many had ended to when so many had."""
    times = [next(t for count, t in reached if count >= wanted) for wanted in (begin, end)]
    return times[1] - times[0]


@pytest.mark.slow
def test_20_real_trials_while_agents_are_killed(tmp_path: Path):
    launcher = Launcher(tmp_path)
    params = launcher.home / "params.yaml"
    params.write_text(
        "method: grid\nmetric: {name: eval/loss/total}\n"
        f"parameters: {{seed: {{values: {list(range(10))}}}, lr: {{values: [1e-3, 2e-3]}}}}\n"
    )
    args = ("tms_5-2", "2", "--local", "--cpu", "--retries", "5", "--params", str(params))
    process = launcher.start(SWEEP, *args, *QUICK, "steps=60")
    killed: set[int] = set()
    while process.poll() is None:
        n_ended = len(list(launcher.out.glob("tms_5-2/*/result.json")))
        if n_ended >= 4 * (len(killed) + 1) and len(killed) < 3:
            found = _agents_below(process.pid)
            if found and found[0].pid not in killed:
                killed.add(found[0].pid)
                found[0].kill()
        time.sleep(0.1)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert "20 finished" in out and len(killed) == 3
    (study,) = launcher.studies("sweeps")
    records = [json.loads(path.read_text()) for path in study.glob("trials/*.json")]
    assert len({json.dumps(record["point"]) for record in records}) == len(records) == 20
    assert len(list(launcher.out.glob("tms_5-2/*/result.json"))) == 20


def _agents_below(pid: int) -> list[psutil.Process]:
    below = psutil.Process(pid).children(recursive=True)
    return [child for child in below if "spd.sweeps.agent" in _words(child)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


GRID_OF_30 = {
    **{"method": "grid", "metric": {"name": "eval/loss/total"}},
    "parameters": {"seed": {"values": list(range(30))}},
}


def test_a_process_reads_every_line_of_the_journal_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that the last trial costs what the first did."""
    n_read, read_logs = 0, Journal.read_logs

    def counted(self: Journal, start: int) -> Iterator[dict[str, Any]]:
        nonlocal n_read
        for line in read_logs(self, start):
            n_read += 1
            yield line

    monkeypatch.setattr(Journal, "read_logs", counted)
    study = make_study(tmp_path, GRID_OF_30)
    run_all(study)
    n_lines = len((study.directory / "journal.log").read_text().splitlines())
    assert n_lines > 100 and n_read == n_lines


def run_all(study: Study) -> int:
    n = 0
    while (claim := local_study.claim(study, "agent0")) is not None:
        local_study.tell(study, claim, ended(claim))
        claim.lock.release()
        n += 1
    return n


def test_a_trial_that_ends_while_another_agent_looks_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = make_study(tmp_path, GRID_OF_30)
    first = local_study.claim(study, "agent0")
    assert first is not None
    try_lock = local_study.try_lock

    def just_then(study: Study, name: str) -> Any:
        if first.lock.is_locked:
            local_study.tell(study, first, ended(first))
            first.lock.release()
        return try_lock(study, name)

    monkeypatch.setattr(local_study, "try_lock", just_then)
    second = local_study.claim(study, "agent1")
    assert second is not None and second.number == 1
    second.lock.release()


def test_a_journal_cut_anywhere_goes_on(tmp_path: Path):
    """As far as its last whole line: what was lost is run again, and nothing twice that was not lost."""
    study = make_study(tmp_path, {**GRID_OF_30, "parameters": {"seed": {"values": [0, 1, 2]}}})
    journal = study.directory / "journal.log"
    n_waiting_there = len(journal.read_bytes())
    run_all(study)
    whole = journal.read_bytes()
    for length in range(n_waiting_there, len(whole), 37):
        journal.write_bytes(whole[:length])
        n_kept = whole[: whole.rfind(b"\n", 0, length)].count(b'"state":1')
        assert run_all(study) == 3 - n_kept
        points = [t.user_attrs["point"]["seed"] for t in local_study._load(study).get_trials()]
        assert points == [0, 1, 2]


def test_a_log_that_grows_is_read_line_by_line_and_anew_when_it_was_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = GrowingLines(path)
    assert log.new_lines() == ([], False)
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert log.new_lines() == ([{"step": 0}, {"step": 1}], True)
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert log.new_lines() == ([{"step": 2}], False) and log.new_lines() == ([], False)
    cut_lines(path, 1)  # as a run does that goes on
    assert log.new_lines() == ([{"step": 0}], True)


# --- thousands of runs -------------------------------------------------------------------------------

OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def n_opened(root: Path, command: Any, *words: str) -> int:
    """How many files below `root` a command opens."""
    OPENED.clear()
    with pytest.raises(SystemExit):
        command(list(words))
    return sum(name.startswith(str(root)) for name in OPENED)


def test_a_sweep_s_status_opens_one_file_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    counts = []
    for n in (40, 90):
        root = tmp_path / str(n)
        monkeypatch.setenv("SPD_OUT_DIR", str(root))
        ended_study(root, n)
        counts.append(n_opened(root, sweep.main, "--status", "many"))
        failed = -(-n // FAILED_EVERY)
        assert f"{failed} failed, {n - failed} finished" in capsys.readouterr().out
    assert counts[1] - counts[0] == 50


SHOWS = {
    SWEEP: (ended_study, "--status", "200 failed, 9800 finished"),
    EVALS: (many_runs.ended_study, "--collect", "10000 of 10000"),
}


@pytest.mark.slow
@pytest.mark.parametrize("module", SHOWS)
def test_10000_runs_are_shown_in_seconds(tmp_path: Path, module: str):
    """In processor seconds, with what Python imports: how long it takes depends on who else works."""
    make, option, said = SHOWS[module]
    make(tmp_path, 10_000)
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", module, option, "many"],
        env={**os.environ, "PYTHONPATH": str(REPO_DIR), "SPD_OUT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    after = os.times()
    assert said in done.stdout, done.stderr
    assert after.children_user - before.children_user < 8


# --- a clock that goes backwards ---------------------------------------------------------------------


class Backwards(datetime):
    """Every look at the clock finds it an hour earlier."""

    n_looks = 0

    @classmethod
    def now(cls, tz: Any = None) -> "Backwards":
        cls.n_looks += 1
        return cls.fromtimestamp(1.8e9, tz) - timedelta(hours=cls.n_looks)


def test_names_differ_from_all_that_are_there_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Stopped(Backwards):
        @classmethod
        def now(cls, tz: Any = None) -> "Backwards":
            return cls.fromtimestamp(1.8e9, tz)

    drawn = iter(["aaaaaa", "aaaaaa", "bbbbbb", "aaaaaa", "bbbbbb", "cccccc"])
    monkeypatch.setattr(run_files, "datetime", Stopped)
    monkeypatch.setattr(run_files.secrets, "token_hex", lambda n: next(drawn))
    first = new_name(tmp_path)
    (tmp_path / f"{first}-seed0").mkdir()
    second = new_name(tmp_path)
    (tmp_path / f".{second}.partial").mkdir()  # another process begins with it
    third = new_name(tmp_path)
    assert [name[-6:] for name in (first, second, third)] == ["aaaaaa", "bbbbbb", "cccccc"]


def test_a_sweep_goes_on_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import optuna.storages.journal._storage as storage

    monkeypatch.setattr(storage, "datetime", Backwards)
    study = make_study(tmp_path, GRID_OF_30)
    left = local_study.claim(study, "agent0")
    assert left is not None
    left.lock.release()  # its agent was killed
    assert run_all(study) == 30 and Backwards.n_looks > 30
    trials = local_study._load(study).get_trials()
    assert [trial.user_attrs["point"]["seed"] for trial in trials] == list(range(30))
