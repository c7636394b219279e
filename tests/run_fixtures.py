"""The real scripts in processes of their own, with a target that needs no training.

The processes are forked from a server that has imported what the scripts import: each costs a
fraction of a second. They run without shape checks, as a user's command does.
"""

import fcntl
import fnmatch
import json
import multiprocessing
import os
import runpy
import struct
import sys
import termios
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spd import registry
from spd.config import read_yaml
from spd.settings import PACKAGE_DIR, PATIENCE

EXPERIMENTS = PACKAGE_DIR / "experiments"
TMS_SCRIPT = EXPERIMENTS / "tms" / "tms_decomposition.py"
TMS_CONFIG = EXPERIMENTS / "tms" / "tms_5-2_config.yaml"
QUICK = (
    *("steps=6", "log_every=1", "eval_every=4", "save_every=2", "sites={linear1: 6, linear2: 6}"),
    *("batch_size=16", "eval_batch_size=16", "n_eval_batches=1", "figures={}", "metrics={}"),
    *(
        "losses={stochastic_recon: {coeff: 1}}",
        "data.feature_probability=0.5",
        "data.unlike_target=true",
    ),
)
"""a run of less than a second that logs, evaluates and saves several times"""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.run_server"])


class Stop(NamedTuple):
    """A signal that comes just before something happens to a file below the output root."""

    signum: int
    event: str | int
    """the first that matches this pattern (`fnmatch`), or the one with this number, from 0"""


class Finished(NamedTuple):
    """A command that has ended."""

    status: int
    """exit status; the negative number of the signal that killed it"""
    out: str
    err: str
    events: list[str]
    """what it did to files below the output root, in order"""


class Terminal:
    """A terminal that others write to, 120 columns wide."""

    def __init__(self) -> None:
        self.shown = b""
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
        self.path = Path(os.ttyname(self.slave))
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while not self.shown.endswith(b"\0"):
            self.shown += os.read(self.master, 65536)

    def close(self) -> bytes:
        """What was written."""
        os.write(self.slave, b"\0")
        self.reader.join()
        os.close(self.master)
        os.close(self.slave)
        return self.shown[:-1]


class Command:
    """Runs scripts under one output root, away from the user's own settings and logins."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target
        self.home = folder / "home"
        self.out = folder / "out"
        self.home.mkdir(parents=True)
        self.environment = {
            **{"HOME": str(self.home), "SPD_OUT_DIR": str(self.out)},
            **PATIENCE,
            **{"WANDB_API_KEY": "", "WANDB_ENTITY": "", "WANDB_MODE": ""},  # whatever .env says
        }

    def run(
        self,
        script: Path,
        *args: str | Path,
        env: Mapping[str, str | None] | None = None,
        stop: Stop | None = None,
        terminal: bool = False,
        drawn: bool = False,
    ) -> Finished:
        """`python SCRIPT ARGS`, sent a signal where `stop` says, its messages on a terminal or not."""
        settings = {**self.environment, **(env or {})}
        logs = [self.folder / name for name in ("stdout", "stderr", "events")]
        for log in logs:
            log.write_bytes(b"")
        screen = Terminal() if terminal else None
        if screen is not None:
            logs[1] = screen.path
        process = SERVER.Process(
            target=_child,
            args=(
                str(script),
                [str(arg) for arg in args],
                settings,
                self.folder,
                logs,
                stop,
                drawn,
            ),
        )
        process.start()
        process.join(timeout=600)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail(f"{script.name} {args} took too long")
        status = process.exitcode
        process.close()
        if screen is not None:
            logs[1] = self.folder / "stderr"
            logs[1].write_bytes(screen.close())
        out, err, events = (log.read_bytes().decode("utf-8") for log in logs)
        return Finished(status, out, err, events.splitlines())

    def tms(self, *args: str | Path, **options: Any) -> Finished:
        """A quick decomposition of the small target; `args` come after the defaults."""
        return self.run(TMS_SCRIPT, TMS_CONFIG, f"target={self.target}", *QUICK, *args, **options)

    def resume(self, directory: Path, *args: str | Path, **options: Any) -> Finished:
        return self.run(TMS_SCRIPT, *args, "--resume", directory, **options)

    def runs(self) -> list[Path]:
        """The run directories there are."""
        return sorted(path for path in self.out.glob("*/*-*-*") if path.is_dir())

    def only_run(self) -> Path:
        (directory,) = self.runs()
        return directory


def make_tms_target(directory: Path, name: str = "tms_5-2", seed: int = 0) -> Path:
    """A target directory as training leaves it: initial weights, but no output is always 0."""
    import torch

    from spd.config import load_config
    from spd.experiments.target_training import training_record
    from spd.experiments.targets import TrainedTarget, save_target
    from spd.experiments.tms.model import empty_model, initial_weights, with_tie
    from spd.experiments.tms.train_tms import TMSTrainConfig, outputs_at_probe

    config = load_config(TMSTrainConfig, EXPERIMENTS / "tms" / f"{name}_target.yaml")
    generator = torch.Generator().manual_seed(seed)
    initial = initial_weights(config.model, generator=generator)
    weights = with_tie({**initial, "linear2.bias": initial["linear2.bias"].abs()})
    outputs = outputs_at_probe(empty_model(config.model), {n: w[None] for n, w in weights.items()})
    record = training_record(
        outputs, torch.zeros(1), required=0.375, probe=0.75, seeds=[0], seconds=0.0
    )
    contiguous = torch.contiguous_format
    copies = {name: w.clone(memory_format=contiguous) for name, w in weights.items()}
    save_target(directory, config, TrainedTarget(copies, record))
    return directory


def make_resid_mlp_target(directory: Path, name: str) -> Path:
    """The same for a residual MLP, with a narrow residual stream."""
    import torch

    from spd.config import load_config
    from spd.experiments.resid_mlp.model import initial_weights
    from spd.experiments.resid_mlp.train_resid_mlp import ResidMLPTrainConfig, bends_at_probe
    from spd.experiments.target_training import training_record
    from spd.experiments.targets import TrainedTarget, save_target

    path = EXPERIMENTS / "resid_mlp" / f"{name}_target.yaml"
    config = load_config(ResidMLPTrainConfig, path, ["model.d_embed=120"])
    weights = initial_weights(config.model, generator=torch.Generator().manual_seed(0))
    bends = bends_at_probe(config, {n: w[None] for n, w in weights.items()})
    record = training_record(
        bends, torch.zeros(1), required=0.25, probe=0.75, seeds=[0], seconds=0.0
    )
    save_target(directory, config, TrainedTarget(weights, record))
    return directory


def make_target(directory: Path, name: str) -> Path:
    """A target for the registered experiment `name`."""
    path = PACKAGE_DIR / registry.EXPERIMENTS[name].config
    training = read_yaml(path)["target"].removesuffix("_target.yaml")
    makers = {"tms": make_tms_target, "resid_mlp": make_resid_mlp_target}
    return makers[path.parent.name](directory, training)


@pytest.fixture(scope="session", name="tms_target")
def target_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ensure_running()  # now, before a test changes the environment that the server inherits
    return make_tms_target(tmp_path_factory.mktemp("targets") / "tms_5-2")


@pytest.fixture(name="command")
def command_fixture(tmp_path: Path, tms_target: Path) -> Command:
    return Command(tmp_path, tms_target)


def finished_run(command: Command, *args: str) -> Finished:
    done = command.tms(*args)
    assert done.status == 0, done.err
    return done


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sign_again(checkpoint: Path) -> None:
    """Have the digests of a checkpoint be those of the files that are there now."""
    from spd.run_files import sha256_of

    path = checkpoint / "digests.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["files"] = {name: sha256_of(checkpoint / name) for name in record["files"]}
    path.write_text(json.dumps(record), encoding="utf-8")


def log_lines(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- what runs in the processes ------------------------------------------------------------------


def _child(
    script: str,
    args: list[str],
    settings: dict[str, str | None],
    folder: Path,
    logs: list[Path],
    stop: Stop | None,
    drawn: bool,
) -> None:
    import torch

    from tests.undrawn import undrawn

    for number, log in zip((1, 2), logs, strict=False):
        os.dup2(os.open(log, os.O_WRONLY), number)
    for name in [n for n in os.environ if n.startswith(("WANDB_", "SPD_", "NETRC"))]:
        del os.environ[name]
    os.environ.update({name: value for name, value in settings.items() if value is not None})
    os.chdir(folder / "home")
    torch.set_num_threads(1)
    sys.argv = [script, *args]
    _watch_files(str(folder / "out"), os.open(logs[2], os.O_WRONLY), stop)
    with nullcontext() if drawn else undrawn():
        runpy.run_path(script, run_name="__main__")


def _is_event(wanted: str | int, line: str, number: int) -> bool:
    return number == wanted if isinstance(wanted, int) else fnmatch.fnmatchcase(line, wanted)


def _watch_files(root: str, log: int, stop: Stop | None) -> None:
    """Record what happens to files below `root`, and signal this process once, before an event."""
    seen, sent = 0, False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, sent
        if event not in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            return
        if not isinstance(args[0], str | os.PathLike) or not str(args[0]).startswith(root):
            return
        line = f"{event} {str(args[0]).removeprefix(root)}"
        if stop is not None and not sent and _is_event(stop.event, line, seen):
            sent = True
            os.kill(os.getpid(), stop.signum)
        seen += 1
        os.write(log, f"{line}\n".encode())

    sys.addaudithook(hook)
