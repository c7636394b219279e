"""Which report a run gets: the common page, or the one that its problem makes."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from spd.config import UserError
from spd.optimize import Prepared
from spd.report import write_report


@runtime_checkable
class OwnReport(Protocol):
    """A problem that writes `report.html` itself, by looking into the decomposed model."""

    def write_report(
        self, run_dir: Path, prepared: Prepared, n_batches: int | None = None
    ) -> Path: ...


def report_on(run_dir: Path, prepared: Prepared, n_batches: int | None = None) -> Path:
    """Write `report.html` into a run directory; `n_batches` of held-out data, where it is made of any."""
    if isinstance(prepared.problem, OwnReport):
        return prepared.problem.write_report(run_dir, prepared, n_batches)
    if n_batches is not None:
        raise UserError(
            f"--batches: the report of {run_dir} is made of the run's files; it looks at no data"
        )
    return write_report(run_dir)
