"""An agent of a sweep, as a process: `python -m spd.sweeps.agent STUDY NAME`."""

import sys
from pathlib import Path

from spd.config import UserError, report_error
from spd.launch.study import STUDY_FILE, Study
from spd.run_files import read_json
from spd.sweeps import optuna_backend as local_study
from spd.sweeps import wandb_backend as wandb_sweep

BACKENDS = {"local": local_study, "wandb": wandb_sweep}


def main(directory: Path, name: str) -> int:
    """Run trials until none is left; the exit status, TERMINATED where it was asked to stop."""
    try:
        study = Study(directory, read_json(directory / STUDY_FILE))
        return BACKENDS[study.record["backend"]].work(study, name)
    except UserError as error:
        return report_error(error)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
