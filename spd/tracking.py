"""What a run writes while it goes on: local files always, W&B where it is configured.

The only file that imports wandb. A tracker that fails is dropped with one line and never ends a
run.
"""

import json
import logging
import netrc
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from spd.config import Unreachable, UserError
from spd.run_files import cut_lines
from spd.settings import output_root

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
FIGURES = "figures"
WANDB_FOLDER = "wandb"
"""what W&B itself keeps in a run directory"""
PLAIN_LINE_SECONDS = 10
"""how far apart the lines of progress stand where there is no terminal"""


@runtime_checkable
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
    def place(self) -> str | None:
        """Where the run can be looked at: its page, or the folder of an offline run."""
        if self.run is None:
            return None
        return self.run.sync_dir if self.run.offline else self.run.url

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda run: run.log({"step": step, **values}))

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, **{k: wandb.Image(str(path)) for k, path in images.items()}})

        self._try(send)

    def upload(self, directory: Path) -> None:
        """Upload the finished run directory, so that `wandb:entity/project/run-id` can be loaded.

        Below a folder with the directory's name: W&B has a `config.yaml` of its own, and would
        write it through its link to ours.
        """

        def send(run: Any) -> None:
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                parts = path.relative_to(directory).parts
                if parts[0] != WANDB_FOLDER and not any(part.startswith(".") for part in parts):
                    run.save(str(path), base_path=str(directory.parent), policy="now")

        self._try(send)

    def finish(self, exit_code: int) -> None:
        self._try(lambda run: run.finish(exit_code=exit_code))

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:
            logger.warning("W&B failed and is left out from here on: %s", _first_line(error))
            self.run = None


class RunTracker:
    """metrics.jsonl, timings.jsonl, progress on the terminal, and W&B if a run of it is given.

    Of runs side by side one shows the progress of all, with a `label`; those with None show nothing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        save_figures: Callable[[Path, int, Mapping[str, Any]], dict[str, Path]],
        wandb_run: WandbRun | None = None,
        label: str | None = "",
    ) -> None:
        self.directory = directory
        self.save_figures = save_figures
        self.wandb_run = wandb_run
        self.label = label
        self.steps = 0

    def start(self, step: int, steps: int) -> None:
        """Cut off what an interrupted run logged at or after `step`."""
        self.steps = steps
        for name in (METRICS_FILE, TIMINGS_FILE):
            cut_lines(self.directory / name, step)
        self.metrics = (self.directory / METRICS_FILE).open("a", encoding="utf-8")
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
        self.started = time.perf_counter()
        self.last_line = self.started - PLAIN_LINE_SECONDS

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
        if self.first is None:  # the first step compiles and says nothing about the pace
            self.first = (step, now)
        first_step, first_time = self.first
        pace = (step - first_step) / (now - first_time) if step > first_step else None
        seconds = now - self.started
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


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The logged lines of a run, in order, without a last one that was cut short."""
    path = directory / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run directory is expected")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path}: a line is not valid JSON: {error}") from None


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
    if mode not in ("offline", "dryrun") and not has_credentials():
        logger.info("no W&B key or login found: logging locally only (project %s)", project)
        return None
    try:
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or 60),
            reinit="create_new",  # runs side by side
        )
        wandb.setup(settings=quiet)
        run = wandb.init(
            project=project,
            entity=os.environ.get("WANDB_ENTITY") or None,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(directory),
            config=dict(config),
            settings=quiet,
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:
        logger.warning("W&B could not be started: logging locally only: %s", _first_line(error))
        return None
    started = WandbRun(run)
    hint = " (offline; `wandb sync` sends it)" if run.offline else ""
    logger.info("W&B: %s%s", started.place, hint)
    return started


def download_run(reference: str, api: Any = None) -> Path:
    """A local directory with the files of `wandb:entity/project/run-id`, or a `UserError`.

    It is kept below the output root and appears complete or not at all. `api` is a `wandb.Api`.
    """
    parts = reference.removeprefix("wandb:").split("/")
    if len(parts) != 3 or not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts):
        raise UserError(f"{reference}: expected wandb:entity/project/run-id")
    directory = output_root() / "downloads" / Path(*parts)
    if directory.is_dir():
        return directory
    if api is None and not has_credentials():
        raise UserError(
            f"{reference}: W&B needs a key: WANDB_API_KEY, for example in .env, or a login"
        )
    with tempfile.TemporaryDirectory() as folder:
        _download(api, "/".join(parts), Path(folder))
        fetched = Path(folder) / parts[-1]
        if not (fetched / "config.yaml").is_file():
            raise UserError(f"{reference}: this W&B run holds no run directory of this project")
        partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        shutil.copytree(fetched, partial)
        partial.rename(directory)
    return directory


def _download(api: Any, path: str, directory: Path) -> None:
    """Fetch what `WandbRun.upload` sent to the run at `path`."""
    folder = path.rpartition("/")[2] + "/"
    try:
        if api is None:
            import wandb

            api = wandb.Api(timeout=60)
        for file in api.run(path).files():
            if file.name.startswith(folder):
                file.download(root=str(directory), replace=True)
    except Exception as error:
        message = f"wandb:{path}: cannot be fetched from W&B: {_first_line(error)}"
        raise Unreachable(message) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def has_credentials() -> bool:
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
