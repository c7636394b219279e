"""A sweep of very many trials that have ended, as its agents leave it."""

import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from spd.launch.study import Study
from spd.sweeps.journal import open_journal
from spd.sweeps.optuna_backend import JOURNAL, POINT
from spd.sweeps.trials import Trial

POINTS = {"seed": {"values": [0, 1, 2, 3]}, "lr": {"min": 1e-4, "max": 1e-2}}
FAILED_EVERY = 50


def ended_study(root: Path, n: int) -> Study:
    """`root/sweeps/many`, all of whose `n` trials have ended, some of them badly."""
    directory = root / "sweeps" / "many"
    directory.mkdir(parents=True)
    definition: dict[str, Any] = {
        **{"method": "random", "metric": {"name": "eval/loss/total"}},
        **{"parameters": POINTS, "run_cap": n},
    }
    record = {
        **{"definition": definition, "experiment": "tms_5-2", "overrides": [], "argv": ["x"]},
        **{"backend": "local", "commit": "abc", "dirty": True, "created": "now", "jobs": []},
        "slurm": {},
    }
    study = Study(directory, record)
    study.save()
    (directory / "trials").mkdir()
    trials = [_trial(root, number) for number in range(n)]
    for trial in trials:
        (directory / "trials" / f"{trial.name}.json").write_text(json.dumps(trial._asdict()))
        run = Path(trial.run_dir)
        run.mkdir(parents=True)
        (run / "report.html").write_text("")
    journal, storage = open_journal(directory / JOURNAL)
    made = optuna.create_study(study_name=study.id, storage=storage)
    with journal.in_one_go():
        made.add_trials([_frozen(trial) for trial in trials])
    return study


def _trial(root: Path, number: int) -> Trial:
    point = {"seed": number % 4, "lr": 1e-4 * (1 + number)}
    failed = number % FAILED_EVERY == 0
    run = str(root / "tms_5-2" / f"many-trial{number}")
    value, reason = (None, f"error {number}") if failed else (1.0 / (1 + number), None)
    return Trial(f"trial{number}", point, run, "failed" if failed else "finished", value, reason)


def _frozen(trial: Trial) -> FrozenTrial:
    state = TrialState.FAIL if trial.value is None else TrialState.COMPLETE
    return create_trial(state=state, value=trial.value, user_attrs={POINT: trial.point})
