"""Weights & Biases, where it is configured. The only file of runs that imports wandb.

A W&B that fails is dropped with one line and never ends a run.
"""

import logging
import netrc
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spd.config import Unreachable, UserError
from spd.run_files import CONFIG_FILE
from spd.settings import output_root

logger = logging.getLogger(__name__)

WANDB_FOLDER = "wandb"
"""what W&B itself keeps in a run directory"""


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

    @property
    def begins_anew(self) -> bool:
        """Whether what an interrupted run logged has to be logged again: an offline run is a folder of
        its own each time, and the newest one, sent, is all that W&B shows."""
        return self.run is not None and self.run.offline

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

    def summarise(self, values: Mapping[str, Any]) -> None:
        """What stands in the run's summary, for the table of many runs."""
        self._try(lambda run: run.summary.update(dict(values)))

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


class Labels(NamedTuple):
    """By what W&B groups and finds a run."""

    group: str
    job_type: str
    tags: Sequence[str]
    notes: str


def start_wandb(
    project: str | None,
    *,
    name: str,
    directory: Path,
    config: Mapping[str, Any],
    run_id: str,
    labels: Labels,
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
            reinit="create_new",  # runs side by side have one each
        )
        wandb.setup(settings=quiet)
        run = wandb.init(
            project=project,
            entity=os.environ.get("WANDB_ENTITY") or None,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(directory),
            group=labels.group,
            job_type=labels.job_type,
            tags=list(labels.tags),
            notes=labels.notes,
            config=dict(config),
            settings=quiet,
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:
        logger.warning("W&B could not be started: logging locally only: %s", _first_line(error))
        return None
    started = WandbRun(run)
    hint = f" (offline; `wandb sync {started.place}` sends all of it)" if run.offline else ""
    logger.info("W&B: %s%s", started.place, hint)
    return started


def new_run_id(directory: Path) -> str:
    """A W&B run id that no other run has, whatever its directory is called."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.name).strip("-.")[:80]
    return f"{name or 'run'}-{secrets.token_hex(4)}"


def download_run(reference: str, api: Any = None) -> Path:
    """A local directory with the files of `wandb:entity/project/run-id`, or a `UserError`.

    It is kept below the output root and appears complete or not at all. `api` is a `wandb.Api`.
    """
    parts = reference.removeprefix("wandb:").split("/")
    if len(parts) != 3 or not all(re.fullmatch(r"[\w-][\w.-]{0,127}", part) for part in parts):
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
        found = list(Path(folder).glob(f"*/{CONFIG_FILE}"))
        if len(found) != 1:
            raise UserError(f"{reference}: this W&B run holds no run directory of this project")
        fetched = found[0].parent
        partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        shutil.copytree(fetched, partial)
        partial.rename(directory)
    return directory


def _download(api: Any, path: str, directory: Path) -> None:
    """Fetch what `WandbRun.upload` sent to the run at `path`: all that lies in a folder."""
    try:
        if api is None:
            import wandb

            api = wandb.Api(timeout=60)
        for file in api.run(path).files():
            parts = file.name.split("/")
            if ".." in parts or "\\" in file.name or file.name.startswith("/"):
                raise ValueError(f"the file {file.name!r} would lie outside of the run")
            if len(parts) > 1:
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
