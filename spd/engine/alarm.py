"""A warning where the gradient of the importance functions explodes: the total may hide that it does.

So a run collapsed whose faithfulness, nearly all of its total, stayed what it was (VPD, on what fails).
"""

from collections.abc import Iterable, Mapping
from statistics import median

NORM = "grad_norm/importances"
SETTLED = 0.05
"""the fraction of a run after which the norm is taken as normal"""
N_STEPS = 1000
"""over so many steps, by those that are logged"""
TIMES = 10.0


class GradientAlarm:
    """Hears what is logged of a run, in order, and speaks up once."""

    def __init__(self, steps: int) -> None:
        self.begin = SETTLED * steps
        self.end = self.begin + N_STEPS
        self.normal: list[float] = []
        self.message: str | None = None
        """what it has said"""

    def heard(self, step: int, values: Mapping[str, float]) -> str | None:
        """A sentence at the first step whose norm is above ten times the median; else None."""
        norm = values.get(NORM)
        if norm is None or self.message is not None or step < self.begin:
            return None
        if step < self.end:
            self.normal.append(norm)
            return None
        usual = median(self.normal) if self.normal else 0.0
        if usual <= 0.0 or norm <= TIMES * usual:
            return None
        self.message = (
            f"step {step}: the gradient norm of the importance functions is {norm:.3g}, more than ten times"
            f" its median of {usual:.3g} over the {N_STEPS} steps from step {self.begin:.0f} on: they may"
            " collapse while the total hides it"
        )
        return self.message


def alarms_of(history: Iterable[Mapping[str, float]], steps: int) -> tuple[str, ...]:
    """What was said, or would have been, over the lines of a metrics.jsonl."""
    alarm = GradientAlarm(steps)
    for line in history:
        alarm.heard(int(line["step"]), line)
    return () if alarm.message is None else (alarm.message,)
