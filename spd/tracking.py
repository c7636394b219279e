"""What a run writes while it goes on: local files always, W&B where it is configured.

The only file that imports wandb. A tracker that fails is dropped with one line and never ends a run.
"""

import json
import logging
import netrc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from spd.config import UserError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
FIGURES = "figures"


class Tracker(Protocol):
    """What the loop tells the outside."""

    def start(self, step: int, steps: int) -> None:
        """The loop is about to run from `step` to `steps`."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one step."""
        ...

    def write_figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Save figures of one step, by name."""
        ...


class NullTracker:
    """Writes nothing: for library use."""

    def start(self, step: int, steps: int) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def write_figures(self, step: int, figures: Mapping[str, Any]) -> None:
        pass


class WandbRun:
    """A W&B run of which every call may fail without consequence but one line in the log."""

    def __init__(self, run: Any) -> None:
        self.run = run

    @property
    def url(self) -> str | None:
        return getattr(self.run, "url", None) if self.run is not None else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda run: run.log({"step": step, **values}))

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, **{k: wandb.Image(str(path)) for k, path in images.items()}})

        self._try(send)

    def upload(self, directory: Path) -> None:
        """Upload the finished run directory, so that `wandb:entity/project/run` can be loaded."""

        def send(run: Any) -> None:
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                if "wandb" not in path.relative_to(directory).parts:
                    run.save(str(path), base_path=str(directory), policy="now")

        self._try(send)

    def finish(self, exit_code: int) -> None:
        self._try(lambda run: run.finish(exit_code=exit_code))

    def _try(self, action: Any) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:
            logger.warning("W&B failed and is left out from here on: %s", error)
            self.run = None


class RunTracker:
    """metrics.jsonl, timings.jsonl, progress on the terminal, and W&B if a run of it is given."""

    def __init__(
        self,
        directory: Path,
        *,
        save_figures: Callable[[Path, int, Mapping[str, Any]], dict[str, Path]],
        wandb_run: WandbRun | None = None,
    ) -> None:
        self.directory = directory
        self.save_figures = save_figures
        self.wandb_run = wandb_run
        self.steps = 0

    def start(self, step: int, steps: int) -> None:
        """Cut off what an interrupted run logged at or after `step`."""
        self.start_step, self.steps = step, steps
        for name in (METRICS_FILE, TIMINGS_FILE):
            cut_lines(self.directory / name, step)
        self.metrics = (self.directory / METRICS_FILE).open("a", encoding="utf-8")
        self.timings = (self.directory / TIMINGS_FILE).open("a", encoding="utf-8")
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None, leave=False)
        self.started = self.last_line = time.perf_counter()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.write(json.dumps({"step": step, **values}) + "\n")
        self.metrics.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(step, values)
        if "loss/total" in values:
            self._progress(step, values)

    def write_figures(self, step: int, figures: Mapping[str, Any]) -> None:
        paths = self.save_figures(self.directory / FIGURES, step, figures)
        if self.wandb_run is not None:
            self.wandb_run.log_images(step, paths)

    def close(self) -> None:
        if self.steps:
            self.bar.close()
            self.metrics.close()
            self.timings.close()

    def _progress(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        done = step + 1 - self.start_step
        seconds = now - self.started
        left = seconds / done * (self.steps - step - 1)
        timing = {"step": step, "seconds": round(seconds, 3), "steps_per_second": done / seconds}
        self.timings.write(json.dumps(timing) + "\n")
        self.timings.flush()
        l0 = sum(value for key, value in values.items() if key.startswith("l0/"))
        if not self.bar.disable:
            self.bar.set_postfix(loss=f"{values['loss/total']:.2e}", L0=f"{l0:.2f}", refresh=False)
            self.bar.update(step + 1 - self.bar.n)
        elif now - self.last_line > 10 or step + 1 == self.steps or done == 1:
            self.last_line = now
            logger.info(
                "step %d/%d  loss %.3e  L0 %.2f  %.0f s left",
                *(step + 1, self.steps, values["loss/total"], l0, left),
            )


def cut_lines(path: Path, step: int) -> None:
    """Drop lines at or after `step`, and a last line that was cut short, from a JSON-lines file."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] < step:
                kept.append(line)
        except ValueError:
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The logged lines of a run, in order."""
    path = directory / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run directory is expected")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def start_wandb(
    project: str | None, *, name: str, directory: Path, config: Mapping[str, Any], run_id: str
) -> WandbRun | None:
    """A W&B run where one is wanted and possible, else None and one line that says why."""
    if project is None:
        return None
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        logger.info("W&B is switched off by WANDB_MODE=disabled: logging locally only")
        return None
    if mode not in ("offline", "dryrun") and not _has_credentials():
        logger.info("no W&B key or login found: logging locally only (project %s)", project)
        return None
    try:
        import wandb

        run = wandb.init(
            project=project,
            entity=os.environ.get("WANDB_ENTITY") or None,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(directory),
            config=dict(config),
            settings=wandb.Settings(silent=not sys.stderr.isatty(), init_timeout=60),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:
        logger.warning("W&B could not be started, logging locally only: %s", error)
        return None
    return WandbRun(run)


def download_run(reference: str) -> Path:
    """A local directory with the files of `wandb:entity/project/run-id`, or a `UserError`."""
    path = reference.removeprefix("wandb:")
    if path.count("/") != 2:
        raise UserError(f"{reference}: expected wandb:entity/project/run-id")
    from spd.settings import output_root

    directory = output_root() / "downloads" / path
    if (directory / "config.yaml").is_file():
        return directory
    try:
        import wandb

        for file in wandb.Api(timeout=60).run(path).files():
            file.download(root=str(directory), replace=True)
    except Exception as error:
        raise UserError(f"{reference}: cannot be fetched from W&B: {error}") from None
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{reference}: this W&B run holds no config.yaml of a run or a target")
    return directory


def _has_credentials() -> bool:
    """Whether a key is in the environment or a login in netrc; never asks."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = (
        (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").split("://")[-1].split("/")[0]
    )
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(host) is not None
