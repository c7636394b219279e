"""`spd-evals --nulls`: every experiment beside runs whose result is known, or is to be none."""

import json
from pathlib import Path

import pytest

from spd.config import UserError, parse
from spd.evals.controls import CONTROLS, controls_of, is_control
from spd.evals.run_evals import EvalsOptions, check_overrides, eval_jobs
from spd.evals.summary import write_summary
from spd.launch.job import Job, Status
from spd.runs.cli import checked_config
from spd.runs.execution import ExperimentConfig
from tests.made_up_run import result


def options(*experiments: str, **others: object) -> EvalsOptions:
    return parse(EvalsOptions, {"experiments": experiments, "nulls": True, **others}, "test")


def test_every_control_of_a_toy_is_a_configuration_of_it():
    config = checked_config("tms_5-2_fast")
    controls = controls_of("tms_5-2_fast", config)
    assert controls.keys() == {control.suffix for control in CONTROLS}
    for overrides in controls.values():
        assert is_control(checked_config("tms_5-2_fast", overrides).model_dump())
    assert not is_control(config.model_dump())
    anchored = checked_config("tms_5-2_fast", controls["-anchor"])
    assert anchored.sites == {"linear1": 20, "linear2": 20, "anchors.linear1": 20}


def test_a_language_model_has_a_null_alone():
    assert controls_of("pydoc_mlp", checked_config("pydoc_mlp")) == {"-null": ("null=true",)}


def test_controls_are_jobs_of_their_own_before_the_experiment(tmp_path: Path):
    jobs = eval_jobs(tmp_path, ["steps=3"], options("tms_5-2_fast", seeds=[3]))
    of = "tms_5-2_fast"
    names = [f"{of}{suffix}-seed3" for suffix in ("-null", "-anchor", "-pairs", "")]
    assert [job.name for job in jobs] == names
    null, *_, own = jobs
    assert null.run_dir is not None and own.run_dir is not None
    assert "null=true" in null.command and "null=true" not in own.command
    assert null.run_dir.name == f"{tmp_path.name}-null-seed3", "beside which its report looks"
    assert own.run_dir.name == f"{tmp_path.name}-seed3"
    assert null.run_dir.parent == own.run_dir.parent
    check_overrides(["steps=3"], options("tms_5-2_fast", "resid_mlp1"))


def test_an_experiment_without_the_key_has_no_null():
    config = ExperimentConfig.model_construct(experiment="mine", sites={"a": 2})
    with pytest.raises(UserError, match="--nulls: mine has no key null"):
        controls_of("mine", config)


def test_a_control_stands_beside_its_experiment_and_nothing_is_expected_of_it(tmp_path: Path):
    jobs, statuses = [], {}
    for name, ml2r in (("tms_5-2", 0.99), ("tms_5-2-null", 0.2)):
        run = tmp_path / name
        run.mkdir()
        found = result(solved=ml2r > 0.5, errors=0, **{"ml2r/linear1": ml2r})
        (run / "result.json").write_text(json.dumps(found))
        job = Job(f"{name}-seed0", tmp_path, [], {}, 1, run)
        jobs.append(job)
        statuses[job.name] = Status("finished", seconds=1)
    record = {"experiments": ["tms_5-2"], "seeds": [0], "overrides": [], "argv": ["x"]}
    record |= {"commit": "abc", "dirty": True, "created": "now"}
    study = tmp_path / "study"
    study.mkdir()
    summary = write_summary(study, jobs, statuses, record)
    assert summary.as_expected, summary.text
    lines = summary.text.splitlines()
    assert any(line.startswith("tms_5-2-null ") and line.endswith("control") for line in lines)
    assert "tms_5-2-null: a target as it is initialised" in lines
    own, null = json.loads((study / "summary.json").read_text(encoding="utf-8"))
    assert (own["control"], null["control"]) == ("", "a target as it is initialised")
    assert "A control: a target as it is initialised" in summary.page.read_text(encoding="utf-8")
