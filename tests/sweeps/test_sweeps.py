"""A sweep's local study: each point once, whatever happens to the agents; the table and the page."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from spd.config import UserError
from spd.launch import study as launch
from spd.launch.job import Status
from spd.sweeps import optuna_backend as local_study
from spd.sweeps import sweep
from spd.sweeps.definition import Definition, Metric
from spd.sweeps.figures import Scale, against_each, parallel_coordinates
from spd.sweeps.page import write_page
from spd.sweeps.trials import Trial, by_value, trials_of

pytestmark = pytest.mark.undrawn

GRID = {
    "method": "grid",
    "metric": {"name": "eval/loss/total"},
    "parameters": {
        "seed": {"values": [0, 1, 2]},
        "data.value_range": {"values": [[0, 1], [-1, 1]]},
    },
}
SEARCH = {
    "method": "random",
    "metric": {"name": "eval/loss/total", "goal": "maximize"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "steps": {"min": 2, "max": 5},
        "data.value_range": {"values": [[0, 1], [-1, 1]]},
        "seed": {"value": 7},
    },
    "run_cap": 12,
}


def make_study(folder: Path, raw: dict[str, Any], name: str = "a-study") -> launch.Study:
    """A study folder without its copy of the code."""
    directory = folder / name
    directory.mkdir(parents=True)
    record = {
        **{"definition": raw, "experiment": "tms_5-2", "overrides": ["steps=6"], "argv": ["x"]},
        **{"backend": "local", "commit": "abc", "dirty": True, "created": "now", "jobs": []},
        "slurm": {},
    }
    study = launch.Study(directory, record)
    study.save()
    local_study.create(study)
    return study


def ended(taken: local_study.Claim, state: str = "finished", value: float | None = 1.0) -> Trial:
    return Trial(f"trial{taken.number}", taken.point, "", state, value)


def test_every_point_is_claimed_once(tmp_path: Path):
    study = make_study(tmp_path, GRID)
    assert local_study.n_waiting(study) == 6
    taken = [local_study.claim(study, f"agent{i % 3}") for i in range(6)]
    assert local_study.claim(study, "agent0") is None  # all are being worked on
    points = [claim.point for claim in taken if claim is not None]
    assert points == list(Definition.model_validate(GRID).points())
    for claim in taken:
        assert claim is not None
        local_study.tell(study, claim, ended(claim))
        claim.lock.release()
    assert local_study.claim(study, "agent0") is None and local_study.n_waiting(study) == 0


def test_a_trial_whose_agent_is_gone_is_taken_over(tmp_path: Path):
    study = make_study(tmp_path, GRID)
    first = local_study.claim(study, "agent0")
    second = local_study.claim(study, "agent1")
    assert first is not None and second is not None
    first.lock.release()  # as the system does for a process that was killed
    assert local_study.n_waiting(study) == 5
    again = local_study.claim(study, "agent1")
    assert again is not None and (again.number, again.point) == (first.number, first.point)
    third = local_study.claim(study, "agent2")
    assert third is not None and third.number == 2


def test_a_journal_that_lost_half_a_line_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study = make_study(tmp_path, {**GRID, "parameters": {"seed": {"values": [0, 1]}}})
    first = local_study.claim(study, "agent0")
    assert first is not None
    local_study.tell(study, first, ended(first))
    first.lock.release()
    journal = study.directory / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert local_study.n_waiting(study) == 2  # how the first ended is lost
    claims = [local_study.claim(study, "agent0") for _ in range(2)]
    assert [claim and claim.number for claim in claims] == [0, 1]
    assert "its last line was cut short and is left out" in capsys.readouterr().err
    for claim in claims:
        assert claim is not None
        local_study.tell(study, claim, ended(claim))
        claim.lock.release()
    assert local_study.n_waiting(study) == 0 and local_study.claim(study, "agent0") is None
    assert [json.loads(line) for line in journal.read_text().splitlines()]


def finish(study: launch.Study, claim: local_study.Claim | None, state: str, value: float | None):
    assert claim is not None
    one = ended(claim, state, value)
    local_study.tell(study, claim, one)
    path = study.directory / "trials" / f"{one.name}.json"
    path.write_text(json.dumps(one._asdict()))
    claim.lock.release()


@pytest.mark.parametrize("raw", [GRID, {**SEARCH, "run_cap": 3}], ids=["grid", "random"])
def test_a_sweep_without_any_value_goes_on_under_a_corrected_metric(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    study = make_study(tmp_path, raw)
    n_points = local_study.n_waiting(study)
    finish(study, local_study.claim(study, "agent0"), "failed", None)
    finish(study, local_study.claim(study, "agent0"), "failed", None)
    assert local_study.n_waiting(study) == n_points - 2
    monkeypatch.setattr(sweep, "check", lambda *args: None)
    renamed = {**raw, "metric": {**raw["metric"], "name": "eval/loss/stochastic_recon"}}
    new = Definition.model_validate(renamed)
    assert sweep.check_extension(study, new, "params.yaml")
    local_study.begin_anew(study)
    study.record["definition"] = renamed
    assert local_study.extend(study) == (2 if raw is GRID else 0)
    assert local_study.n_waiting(study) == n_points and trials_of(study) == []
    points = []
    while (claim := local_study.claim(study, "agent0")) is not None:
        points.append(claim.point)
        finish(study, claim, "finished", 1.0)
    assert len(points) == n_points and len(trials_of(study)) == n_points
    assert {trial.name for trial in trials_of(study)}.isdisjoint({"trial0", "trial1"})
    assert len(list((study.directory / "trials" / "earlier").iterdir())) == 2
    if raw is GRID:
        assert sorted(map(str, points)) == sorted(map(str, new.points()))
    with pytest.raises(UserError, match=r"metric.name: the sweep has .*stochastic_recon.*trial2"):
        sweep.check_extension(study, Definition.model_validate(raw), "params.yaml")


def test_the_goal_of_a_sweep_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = make_study(tmp_path, GRID)
    monkeypatch.setattr(sweep, "check", lambda *args: None)
    turned = {**GRID, "metric": {**GRID["metric"], "goal": "maximize"}}
    with pytest.raises(UserError, match="metric.goal: the sweep has minimize, so it cannot become"):
        sweep.check_extension(study, Definition.model_validate(turned), "params.yaml")


def test_a_failed_point_is_not_run_again(tmp_path: Path):
    study = make_study(tmp_path, {**GRID, "parameters": {"seed": {"values": [0]}}})
    claim = local_study.claim(study, "agent0")
    assert claim is not None
    local_study.tell(study, claim, ended(claim, "failed", None))
    claim.lock.release()
    assert local_study.claim(study, "agent0") is None


def test_a_grid_is_extended_by_the_points_that_it_lacks(tmp_path: Path):
    study = make_study(tmp_path, GRID)
    claim = local_study.claim(study, "agent0")
    assert claim is not None
    values = {"seed": {"values": [0, 1, 2, 3]}, "data.value_range": {"values": [[0, 1], [-1, 1]]}}
    study.record["definition"] = {**GRID, "parameters": values}
    assert local_study.extend(study) == 2 and local_study.n_waiting(study) == 7
    assert local_study.extend(study) == 0


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_search_ends_at_its_cap_and_keeps_to_its_space(tmp_path: Path, method: str):
    study = make_study(tmp_path, {**SEARCH, "method": method})
    points = []
    while (claim := local_study.claim(study, "agent0")) is not None:
        points.append(claim.point)
        local_study.tell(study, claim, ended(claim, value=claim.point["lr"]))
        claim.lock.release()
    assert len(points) == 12 and {point["seed"] for point in points} == {7}
    assert all(1e-4 <= point["lr"] <= 1e-2 for point in points)
    assert {point["steps"] for point in points} <= {2, 3, 4, 5}
    assert {str(point["data.value_range"]) for point in points} == {"[0, 1]", "[-1, 1]"}
    assert len({point["lr"] for point in points}) == 12
    study.record["definition"]["run_cap"] = 14
    assert local_study.n_waiting(study) == 2


def test_a_random_search_does_not_depend_on_who_asks(tmp_path: Path):
    found = []
    for name, n_agents in (("one", 1), ("two", 3)):
        study = make_study(tmp_path, SEARCH, name)
        claims = [local_study.claim(study, f"agent{i % n_agents}") for i in range(4)]
        found.append([claim.point for claim in claims if claim is not None])
    assert found[0] == found[1]


def test_hopeless_trials_are_found(tmp_path: Path):
    """Successive halving: of several, only the best go on after the first iteration."""
    raw = {**GRID, "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    study = make_study(tmp_path, raw)
    verdicts, held = [], []  # a lock that nobody holds is given back
    for value in (1.0, 5.0, 0.5, 7.0):
        claim = local_study.claim(study, "agent0")
        assert claim is not None
        held.append(claim)
        watcher = local_study.pruning(study, claim)
        watcher.heard(0, value)
        verdicts.append(watcher.hopeless())
    assert verdicts == [False, True, False, True]
    without = make_study(tmp_path, GRID, "without")
    for value in (1.0, 5.0, 9.0):
        claim = local_study.claim(without, "agent0")
        assert claim is not None
        watcher = local_study.pruning(without, claim)
        watcher.heard(0, value)
        assert not watcher.hopeless()


# --- the table and the page -------------------------------------------------------------------------


def trial(name: str, seed: int, value: float | None, state: str = "finished") -> Trial:
    point = {"seed": seed, "data.value_range": [0, 1]}
    return Trial(name, point, "/nowhere", state, value, None if value else "it <broke>")


TRIALS = [trial("trial0", 0, 0.5), trial("trial1", 1, 0.25), trial("trial10", 2, None, "failed")]


def with_trials(folder: Path) -> launch.Study:
    study = make_study(folder, GRID)
    (study.directory / "trials").mkdir(exist_ok=True)
    for one in TRIALS:
        path = study.directory / "trials" / f"{one.name}.json"
        path.write_text(json.dumps(one._asdict()))
    return study


def test_the_best_come_first_and_failures_last(tmp_path: Path):
    study = with_trials(tmp_path)
    assert trials_of(study) == TRIALS
    definition = Definition.model_validate(GRID)
    assert [t.name for t in by_value(TRIALS, definition)] == ["trial1", "trial0", "trial10"]
    highest = definition.model_copy(update={"metric": Metric(name="x", goal="maximize")})
    assert [t.name for t in by_value(TRIALS, highest)] == ["trial0", "trial1", "trial10"]
    text, page, good = write_page(study, {"agent0": Status("failed", "gone")}, 3)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["trial", "trial1", "trial0", "trial10"]
    assert "failed: it <broke>" in lines[3] and "agent0: failed: gone" in lines
    assert "1 failed, 2 finished, 3 to go on with or to begin" in lines and not good
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2 and "it &lt;broke&gt;" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "it opens from disk, alone"


def test_what_many_rows_say_stands_once_below_the_table(tmp_path: Path):
    study = make_study(tmp_path, GRID)
    folder = study.directory / "trials"
    folder.mkdir(exist_ok=True)
    common, long = "the metric is not logged", "x" * 100
    reasons = [common, "killed by SIGKILL", common, long]
    for number, reason in enumerate(reasons):
        point = {"seed": number, "data.value_range": [0, 1]}
        one = Trial(f"trial{number}", point, "/nowhere", "failed", None, reason)
        (folder / f"{one.name}.json").write_text(json.dumps(one._asdict()))
        (folder / f"{one.name}.output.txt").write_text(reason)
    text, page, _ = write_page(study, {}, 0)
    lines = text.splitlines()
    assert [line.partition("failed")[2] for line in lines[1:5]] == [
        *(" (1)", ": killed by SIGKILL", " (1)", " (2)"),
    ]
    assert lines[5:9] == [
        f"(1) {common}",
        f"    log: {folder}/trial0.output.txt",
        f"(2) {long}",
        f"    log: {folder}/trial3.output.txt",
    ]
    html = page.read_text(encoding="utf-8")
    assert html.count(common) == html.count(long) == html.count("killed by SIGKILL") == 1
    assert f"{folder}/trial3.output.txt" in html


def test_a_sweep_without_results_has_a_page_too(tmp_path: Path):
    study = make_study(tmp_path, GRID)
    text, page, good = write_page(study, {}, 6)
    assert "6 to go on with or to begin" in text and not good
    assert "base64" not in page.read_text(encoding="utf-8")


def test_where_values_lie_on_an_axis():
    seeds = Scale([0, 1, 2])
    assert seeds.numeric and not seeds.log and seeds.share(1) == 0.5
    rates = Scale([1e-4, 1e-3, 1e-2])
    assert rates.log and rates.share(1e-3) == pytest.approx(0.5)
    words = Scale(["both", "gradient", "both"])
    assert not words.numeric and [words.share(w) for w in ("both", "gradient")] == [0.0, 1.0]
    assert Scale([3, 3]).share(3) == 0.5 and not Scale([True, False]).numeric


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_the_figures_show_every_trial_and_the_best_darkest(goal: str):
    metric = Metric.model_validate({"name": "m", "goal": goal})
    keys = ["seed", "data.value_range"]
    drawn = parallel_coordinates(TRIALS[:2], keys, metric).axes[0].collections
    (lines,) = (one for one in drawn if isinstance(one, LineCollection))
    assert [len(segment) for segment in lines.get_segments()] == [3, 3]
    brightness = np.asarray(lines.get_color())[:, :3].sum(axis=1)
    assert (brightness[0] > brightness[1]) == (goal == "minimize")
    figure = against_each(TRIALS[:2], keys, metric)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_xlabel() for ax in shown] == keys
    for ax in shown:
        (points,) = ax.collections
        assert [y for _, y in points.get_offsets()] == [0.5, 0.25]  # pyright: ignore
