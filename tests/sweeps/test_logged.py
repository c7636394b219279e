"""Which figures can be the metric of a sweep: those that runs log, and no others."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spd.config import UserError
from spd.launch.job import Ended
from spd.runs.cli import checked_config
from spd.sweeps import trials
from spd.sweeps.definition import check, only_at_end, read_definition
from spd.sweeps.logged import logged
from spd.sweeps.trials import ONLY_AT_END, Trial, run_trial
from tests.launch_fixtures import QUICK, SWEEP, Launcher
from tests.runs.little_run import little_config, little_run
from tests.sweeps.test_sweep_definition import GRID, RANDOM, written
from tests.sweeps.test_sweeps import make_study

pytestmark = pytest.mark.undrawn

METRICS = {
    **{"column_match": {"site": "linear2"}, "pattern_errors": {}, "upstream_pattern": {}},
    **{"causes": {}, "sparsity": {}, "usage": {"thresholds": [0, 0.3]}},
    "ladder": {"steps_at_end": [1, 3], "thresholds": [0.2], "random": True},
}
"""all that any decomposition can have"""
ALL = (f"metrics={json.dumps(METRICS)}", "components.lr=1e-3")


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_all_that_a_run_logs_can_be_the_metric_of_a_sweep_and_nothing_else(tmp_path: Path):
    """Left out of the count: what needs more tokens, and what only a language model has."""
    known = logged(little_config(tmp_path, *ALL))
    lines = lines_of(little_run(tmp_path, "a-run", *ALL))
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    training = {key for line in lines if line not in evaluations for key in line} - {"step"}
    first, last = (set(evaluations[index]) - {"step"} for index in (0, -1))
    assert training | last == {key for key in known.at_the_end if not of_language(key)}
    assert training | first == {key for key in known.always if not of_language(key)}
    assert {key for key in last if known.only_at_end(key)} == last - first
    assert {"lr/components", "eval/solved", "eval/ladder_share/adversarial_3_row"} <= set(
        known.at_the_end
    )


def of_language(key: str) -> bool:
    return key.startswith(("eval/ladder_recovered/", "eval/ladder_svd/", "eval/ladder_neurons/"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((f"eval/{bare}", "is not logged; did") for bare in ("l0", "errors", "mmcs")),
        ("eval/mmcs/linear2", "is not logged; did you mean 'eval/mmcs/linear1'"),
        ("eval/solved/total", "is not logged; did you mean 'eval/solved'"),
        (
            "eval/ladder_share/adversarial_20_row",
            "by the last evaluation; did you mean '.*_80_row'",
        ),
    ],
)
def test_a_figure_that_no_run_logs_is_refused(tmp_path: Path, name: str, said: str):
    definition = read_definition(written(tmp_path, GRID, metric={"name": name}))
    ladder = "metrics.ladder={}"
    with pytest.raises(UserError, match=f"metric.name: '{name}' .*{said}"):
        check(definition, "tms_5-2", [ladder], "here")


def test_figures_of_an_experiment_have_a_place():
    own = logged(checked_config("pydoc_emb", ["metrics={cross_entropy: {}}"]))
    assert own.ends_with("eval/ce/masked") and own.ends_with("eval/scored")
    assert own.ends_with("eval/recovered/rounded") and not own.ends_with("eval/ce")
    assert "eval/ce/…" in own.said_of("eval/ce")


AT_END = ("eval/solved", "eval/unfaithful/linear1", "eval/adversarial/20_steps")


@pytest.mark.parametrize("name", [*AT_END, "eval/ladder/adversarial_80_row"])
def test_trials_are_not_ended_early_by_a_figure_of_the_end(tmp_path: Path, name: str):
    fixed = ["metrics.ladder={}", "metrics.causes={}"]
    path = written(tmp_path, RANDOM, metric={"name": name})
    with pytest.raises(UserError, match=f"early_terminate: '{name}' is logged by the last eval"):
        check(read_definition(path), "tms_5-2", fixed, "here")
    late = read_definition(written(tmp_path, GRID, metric={"name": name}))
    check(late, "tms_5-2", fixed, "here")
    assert only_at_end(late, "tms_5-2", fixed)
    early = read_definition(written(tmp_path, RANDOM, metric={"name": "eval/l0/linear1"}))
    check(early, "tms_5-2", fixed, "here")
    assert not only_at_end(early, "tms_5-2", fixed)


def tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, metric: str, lines: Sequence[dict], late: bool
) -> Trial:
    """The trial of a run that logs these lines and is asked after each whether it goes on."""
    study = make_study(folder, {**GRID, "metric": {"name": metric}})
    study.record[ONLY_AT_END] = late
    for place in ("jobs/agent0", "trials"):
        (study.directory / place).mkdir(parents=True)
    monkeypatch.setenv("SPD_OUT_DIR", str(folder / "out"))

    def supervise(
        command: list[str], output: Path, env: Mapping[str, str], hopeless: Callable[[], bool]
    ) -> Ended:
        run = Path(command[-1])
        run.mkdir(parents=True)
        for line in lines:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if hopeless():
                return Ended("interrupted", "stopped", None)
        return Ended("finished", None, None)

    monkeypatch.setattr(trials, "supervise", supervise)
    point: dict[str, Any] = {"seed": 0, "lr": 1e-3}
    return run_trial(study, "trial0", point, agent="agent0")[0]


EVALUATIONS = [
    {"step": 0, "eval/loss/total": 2.0},
    {"step": 6, "eval/loss/total": 1.0, "eval/solved": 1.0},
]


def test_a_figure_of_the_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial = tried(tmp_path, monkeypatch, "eval/solved", EVALUATIONS, late=True)
    assert (trial.state, trial.value) == ("finished", 1.0), trial.reason


def test_a_figure_that_never_came_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial = tried(tmp_path, monkeypatch, "eval/solvd", EVALUATIONS, late=True)
    assert (trial.state, trial.value) == ("failed", None)
    assert trial.reason == (
        "the metric 'eval/solvd' is not logged; did you mean 'eval/solved'? (logged: eval/loss/total,"
        " eval/solved)"
    )
    nothing = tried(tmp_path / "other", monkeypatch, "loss/total", EVALUATIONS, late=False)
    assert nothing.reason == "the metric 'loss/total' is not logged (logged: nothing)"
    infinite = [{"step": 0, "eval/loss/total": float("nan")}]
    broken = tried(tmp_path / "third", monkeypatch, "eval/loss/total", infinite, late=False)
    assert broken.reason == "the metric 'eval/loss/total' is nan"


def test_what_every_evaluation_has_is_missed_at_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wrong = tried(tmp_path, monkeypatch, "eval/loss/totl", EVALUATIONS, late=False)
    assert wrong.state == "failed" and "(logged: eval/loss/total)" in str(wrong.reason)


@pytest.mark.slow
def test_a_sweep_over_the_verdict_ends_well(tmp_path: Path):
    launcher = Launcher(tmp_path)
    asked = {"metric": {"name": "eval/solved"}, "parameters": {"lr": {"value": 1e-3}}}
    params = written(launcher.home, GRID, **asked)
    own = (*QUICK, "metrics={causes: {}}", "steps=60", "eval_every=10")
    done = launcher.run(SWEEP, "tms_5-2", "1", "--local", "--cpu", "--params", str(params), *own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 finished" in done.stdout and "failed" not in done.stdout
