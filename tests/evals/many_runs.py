"""A study of `spd-evals` over very many seeds that have ended, as its jobs leave it."""

import json
from pathlib import Path

from spd.launch.job import Job, Status, write_status
from spd.launch.study import JOBS, Study

RESULT = {
    **{"experiment": "tms_5-2", "steps": 10, "seconds": 3.0, "solved": True},
    "rows": [
        {"metric": "held-out loss", "key": "loss/total", "value": 0.5},
        {"metric": "errors", "key": "errors/total", "value": 0},
    ],
    "expected": {"loss/total": [0.0, 1.0]},
    "quantities": {"loss": {"label": "held-out loss", "headline": True}},
}


def ended_study(root: Path, n: int) -> Study:
    """`root/evals/many`: `n` seeds of one experiment, all finished."""
    directory = root / "evals" / "many"
    directory.mkdir(parents=True)
    names = [f"tms_5-2-seed{seed}" for seed in range(n)]
    for seed, name in enumerate(names):
        run = root / "tms_5-2" / f"many-seed{seed}"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps({**RESULT, "seed": seed}))
        (run / "report.html").write_text("")
        job = Job(name, directory / JOBS / name, ["true"], {}, minutes=1, run_dir=run)
        job.save()
        write_status(job.directory, Status("finished", attempts=1, seconds=3.0))
    record = {
        **{"experiments": ["tms_5-2"], "seeds": list(range(n)), "overrides": [], "argv": ["x"]},
        **{"commit": "abc", "dirty": True, "created": "now", "jobs": names, "slurm": {}},
    }
    study = Study(directory, record)
    study.save()
    return study
