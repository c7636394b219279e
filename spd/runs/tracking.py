"""The observer that keeps the record of a run: local files, progress on the terminal, and W&B."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from spd.config import RunError
from spd.engine.alarm import GradientAlarm
from spd.run_files import FIGURES, METRICS_FILE, TIMINGS_FILE, cut_lines, read_metrics
from spd.runs.wandb_run import WandbRun

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10
"""how far apart the lines of progress stand where there is no terminal"""


class RunTracker:
    """metrics.jsonl, timings.jsonl, progress on the terminal, and W&B if a run of it is given.

    Of runs side by side one shows the progress of all, with a `label`; those with None show nothing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        eval_every: int,
        draw: Callable[[int], Mapping[str, Path]] | None = None,
        figures_every: int | None = None,
        wandb_run: WandbRun | None = None,
        label: str | None = "",
    ) -> None:
        self.directory = directory
        self.eval_every, self.figures_every = eval_every, figures_every
        self.draw = draw
        self.wandb_run = wandb_run
        self.label = label
        self.steps = 0

    def started(self, step: int, steps: int) -> None:
        """Cut off what an interrupted run logged at or after `step`."""
        self.steps = steps
        for name in (METRICS_FILE, TIMINGS_FILE):
            cut_lines(self.directory / name, step)
        if self.wandb_run is not None and self.wandb_run.begins_anew and step > 0:
            self._log_again(self.wandb_run, step)
        path = self.directory / METRICS_FILE
        self.digest = hashlib.sha256(path.read_bytes() if path.exists() else b"")
        self.metrics = path.open("ab")
        self.alarm = GradientAlarm(steps)
        for line in read_metrics(self.directory):  # of which it has spoken already
            self.alarm.heard(int(line["step"]), line)
        self.timings = (self.directory / TIMINGS_FILE).open("a", encoding="utf-8")
        self.bar = tqdm(
            total=steps,
            initial=step,
            desc=self.label,
            unit="step",
            disable=True if self.label is None else None,
            leave=False,
        )
        self.first: tuple[int, float] | None = None
        self.begun = time.perf_counter()
        self.last_line = self.begun - PLAIN_LINE_SECONDS

    def _log_again(self, wandb_run: WandbRun, step: int) -> None:
        """All that was logged, and the figures that were drawn, before `step`."""
        for line in read_metrics(self.directory):
            wandb_run.log(int(line.pop("step")), line)
        figures: dict[int, dict[str, Path]] = {}
        for path in sorted((self.directory / FIGURES).glob("*/*.png")):
            if path.stem.isdecimal() and int(path.stem) < step:
                figures.setdefault(int(path.stem), {})[path.parent.name] = path
        for drawn, paths in sorted(figures.items()):
            wandb_run.log_images(drawn, paths)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, values)
        self._progress(step, values)
        alarm = self.alarm.heard(step, values)
        if alarm is not None:
            logger.warning(alarm)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, values)
        if self.draw is not None and self._drawing(step):
            paths = self.draw(step)
            if self.wandb_run is not None:
                self.wandb_run.log_images(step, paths)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._check_place()
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        self.metrics.write(line)
        self.metrics.flush()
        self.digest.update(line)
        if self.wandb_run is not None:
            self.wandb_run.log(step, values)

    def position(self) -> dict[str, int | str]:
        """How far metrics.jsonl has come, which is on the disk then, and the digest of it so far."""
        self._check_place()
        os.fsync(self.metrics.fileno())
        return {"bytes": self.metrics.tell(), "sha256": self.digest.hexdigest()}

    def _check_place(self) -> None:
        """`RunError` if what is written here no longer lies in the run directory."""
        path = self.directory / METRICS_FILE
        try:
            there = os.path.samestat(os.fstat(self.metrics.fileno()), path.stat())
        except FileNotFoundError:
            there = False
        if not there:
            raise RunError(
                f"{path}: was deleted, moved or replaced while the run was writing it; the run stops here,"
                " and writes nothing more"
            )

    def _drawing(self, step: int) -> bool:
        """Whether figures are due: at the end and at the first evaluation after every `figures_every`."""
        if step == self.steps:
            return True
        every = self.figures_every
        return every is not None and step // every != (step - self.eval_every) // every

    def ended(self) -> None:
        if self.steps:
            self.bar.close()
            for file in (self.metrics, self.timings):
                with suppress(OSError):  # of what could not be written, which has been said
                    file.close()

    def _progress(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        if self.first is None:  # the first step compiles and says nothing about the pace
            self.first = (step, now)
        first_step, first_time = self.first
        pace = (step - first_step) / (now - first_time) if step > first_step else None
        seconds = now - self.begun
        timing = {"step": step, "seconds": seconds, "steps_per_second": pace or 1 / seconds}
        self.timings.write(json.dumps(timing) + "\n")
        self.timings.flush()
        l0 = sum(value for key, value in values.items() if key.startswith("l0/"))
        if not self.bar.disable:
            self.bar.set_postfix(loss=f"{values['loss/total']:.2e}", L0=f"{l0:.2f}", refresh=False)
            self.bar.update(step + 1 - self.bar.n)
        elif self.label is not None and (
            now - self.last_line > PLAIN_LINE_SECONDS or step + 1 == self.steps
        ):
            self.last_line = now
            left = f"  {(self.steps - step - 1) / pace:.0f} s left" if pace else ""
            logger.info(
                "%sstep %d/%d  loss %.3e  L0 %.2f%s",
                *(
                    f"{self.label}: " if self.label else "",
                    step + 1,
                    self.steps,
                    values["loss/total"],
                    l0,
                    left,
                ),
            )
