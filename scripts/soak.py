"""Kills runs at random moments, resumes them as they say, and compares them with undisturbed ones.

    python scripts/soak.py --kills 50              # some 15 minutes on two cores
    python scripts/soak.py --kills 50 --seed 7 --kinds plain,compiled

Small runs of five kinds are struck by SIGKILL, SIGTERM and SIGINT, also while they write a checkpoint,
train their target, evaluate or write their report (`scripts/soak_hook`), one to four times each. After
every blow the run goes on with the command that it printed, or with the same command where it had no
directory yet. What it has left in the end must be, byte for byte, what the undisturbed run left. Exit
status 1 if a run was lost or is unequal; its folder is then kept.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from soak_runs import KINDS, Kind, differences, new_folder, runs_in

from spd.config import UserError, report_error
from spd.settings import REPO_DIR, patient_threads

HOOK = Path(__file__).parent / "soak_hook"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (128 + signal.SIGINT, -signal.SIGINT),
}
"""exit statuses of a run that a signal has ended; torchrun has its own"""
MOST_BLOWS = 4
"""to one run"""
PATIENCE = 600.0
"""seconds after which a run counts as hanging"""
ANYWHERE = 0.25
"""of the blows come anywhere in the life of a process; the others are dealt to the phases alike"""


class LostError(Exception):
    """A run that did not go on as it should."""


class Blow(NamedTuple):
    """A signal at some moment of a process."""

    signum: signal.Signals
    phase: str
    call: int
    event: int | None
    """before which file event of that call it comes; None: after some seconds of it"""
    seconds: float
    rank: str


class Done(NamedTuple):
    """A process that has ended."""

    status: int
    text: str
    hit: str | None
    """the phase in which it was struck; None: the blow's moment never came"""


class Tally:
    """What has happened so far."""

    def __init__(self) -> None:
        self.hits: list[tuple[str, signal.Signals, str]] = []
        self.n_runs, self.n_resumed, self.n_anew = 0, 0, 0
        self.lost: list[str] = []
        self.unequal: list[str] = []
        self.statuses: Counter[str] = Counter()

    def lines(self) -> Iterator[str]:
        names = [signum.name for signum in SIGNALS]
        for title, index in (("kind of run", 0), ("hit in", 2)):
            yield f"{title:20}" + "".join(f"{name:>9}" for name in (*names, "all"))
            for key in dict.fromkeys(sorted(str(hit[index]) for hit in self.hits)):
                of = Counter(hit[1].name for hit in self.hits if hit[index] == key)
                cells = [*(of[name] for name in names), of.total()]
                yield f"  {key:18}" + "".join(f"{cell:9}" for cell in cells)
        ends = ", ".join(f"{words}: {n}" for words, n in sorted(self.statuses.items()))
        yield f"ended with  {ends}"
        yield (
            f"{len(self.hits)} kills of {self.n_runs} runs, {self.n_resumed} resumed, {self.n_anew} begun"
            f" anew: {len(self.lost)} lost, {len(self.unequal)} unequal"
        )
        yield from (f"LOST {line}" for line in self.lost)
        yield from (f"UNEQUAL {line}" for line in self.unequal)


def run_process(command: Sequence[str], folder: Path, order: dict[str, Any]) -> Done:
    """A command under an output root of its own, watched or struck as `order` says."""
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    out = str(folder / "out")
    order = {"root": out, **order}
    if order.get("blow"):
        order["blow"]["mark"] = str(mark)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SPD_")},
        **{"SPD_OUT_DIR": out, "SPD_SOAK": json.dumps(order), "WANDB_MODE": "disabled"},
        **{"PYTHONPATH": os.pathsep.join((str(HOOK), str(REPO_DIR))), "OMP_NUM_THREADS": "1"},
        **{"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "compiled"), "HF_HUB_OFFLINE": "1"},
        **{"HF_HOME": str(folder.parent / "hf"), "CUDA_VISIBLE_DEVICES": "", **patient_threads()},
    }
    log = folder / "log.txt"
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_hears_ctrl_c,
        )
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise LostError(f"hangs: {' '.join(command)}; see {log}") from None
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    return Done(status, text, mark.read_text() if mark.exists() else None)


def _hears_ctrl_c() -> None:
    """For a child: a shell that starts this in the background lets it ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Undisturbed(NamedTuple):
    """The run that the others of its kind are compared with."""

    folder: Path
    profiles: dict[str, dict[str, list[dict[str, float]]]]
    """of each process: its calls by phase, with their seconds and file events"""


def undisturbed(kind: Kind, root: Path) -> Undisturbed:
    folder = new_folder(root, f"undisturbed {kind.name}")
    path = folder / "profile.json"
    first = kind.ranks[0]
    done = run_process(kind.begin(), folder, {"rank": first, "observe": str(path)})
    if done.status:
        raise LostError(f"{kind.name}: does not run at all: {done.text[-2000:]}")
    if (kind.name == "compiled") != ("compiled the training step" in done.text):
        raise LostError(f"{kind.name}: compiled where it should not be, or the other way round")
    profile = json.loads(path.read_text())
    whole = {"anywhere": profile["anywhere"]}
    return Undisturbed(folder, {rank: profile if rank == first else whole for rank in kind.ranks})


def drawn(kind: Kind, before: Undisturbed, rng: random.Random) -> Blow:
    rank = kind.ranks[0] if rng.random() < 0.7 else rng.choice(kind.ranks)
    profile = before.profiles[rank]
    phase = "anywhere" if rng.random() < ANYWHERE else rng.choice(sorted(profile))
    call = int(len(profile[phase]) * rng.random() ** 2)  # a process that goes on has fewer
    found = profile[phase][call]
    at_event = found["events"] > 0 and rng.random() < 0.6
    event = rng.randrange(int(found["events"])) if at_event else None
    signum = rng.choice(SIGNALS)
    if rank == "launcher" and signum == signal.SIGKILL:
        signum = signal.SIGTERM  # what a killed torchrun leaves behind is beyond a run's reach
    return Blow(signum, phase, call, event, found["seconds"] * rng.random(), rank)


def struck(kind: Kind, before: Undisturbed, folder: Path, blows: list[Blow], tally: Tally) -> None:
    """A run that is struck by one blow after another, and resumed until it ends."""
    command = kind.begin()
    while True:
        blow = blows.pop(0) if blows else None
        order: dict[str, Any] = {"rank": blow.rank if blow else "none"}
        done = run_process(command, folder, order | ({"blow": blow._asdict()} if blow else {}))
        if blow and done.hit:
            tally.hits.append((kind.name, blow.signum, done.hit))
            clean = kind.processes > 1 or done.status in (0, *STOPPED[blow.signum])
            tally.statuses[f"{blow.signum.name} {done.status}"] += 1
            if not clean:
                raise LostError(
                    f"{kind.name}: {blow}: ended with {done.status}: {done.text[-1500:]}"
                )
        elif done.status:
            raise LostError(
                f"{kind.name}: {' '.join(command[-4:])} gave {done.status}: {done.text[-1500:]}"
            )
        if done.status == 0:
            return
        command = next_command(kind, folder, done, tally)


def next_command(kind: Kind, folder: Path, done: Done, tally: Tally) -> list[str]:
    """What the run has printed, or what its user would do who finds a directory, or none."""
    said = re.findall(r"continue with (--resume|--run_dir) (\S+)", done.text)
    there = runs_in(folder)
    if not said and not there:
        tally.n_anew += 1
        return kind.begin()
    tally.n_resumed += 1
    if kind.seeds:
        base = said[-1][1] if said else str(there[0]).rpartition("-seed")[0]
        return [*kind.begin(), "--run_dir", base]
    return kind.resume(Path(said[-1][1]) if said else there[0])


def soak(
    kinds: Sequence[Kind], n_kills: int, seed: int, root: Path, *, minutes: float = math.inf
) -> Tally:
    """Runs of one kind after the other, until so many blows have hit, or so many minutes are over."""
    end = time.monotonic() + 60 * minutes
    tally, models = Tally(), {kind.name: undisturbed(kind, root) for kind in kinds}
    number = 0
    while len(tally.hits) < n_kills and len(tally.lost) < 5 and time.monotonic() < end:
        kind = kinds[number % len(kinds)]
        rng = random.Random(f"{seed} {number}")
        before, folder = models[kind.name], new_folder(root, f"{number:03d} {kind.name}")
        n_blows = min(rng.randint(1, MOST_BLOWS), n_kills - len(tally.hits))
        blows = [drawn(kind, before, rng) for _ in range(n_blows)]
        n_before, started = len(tally.hits), time.monotonic()
        try:
            struck(kind, before, folder, blows, tally)
            unequal = list(differences(folder, before.folder))
        except LostError as lost:
            tally.lost.append(str(lost))
            unequal = ["lost"]
        else:
            tally.unequal += unequal
        hits = ", ".join(f"{signum.name} in {hit}" for _, signum, hit in tally.hits[n_before:])
        verdict = f"NOT EQUAL, see {folder}" if unequal else "equal"
        seconds = time.monotonic() - started
        print(
            f"{number:3} {kind.name}: {hits or 'no blow hit'}: {verdict} ({seconds:.0f} s)",
            flush=True,
        )
        if not unequal:
            shutil.rmtree(folder)
        number += 1
    tally.n_runs = number
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="so many blows hit")
    parser.add_argument("--seed", type=int, default=0, help="of the blows")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no further run after so many"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    args = parser.parse_args(argv)
    names = args.kinds.split(",")
    unknown = [name for name in names if name not in KINDS]
    if unknown or args.kills < 1:
        wrong = f"--kinds: {unknown[0]!r}" if unknown else f"--kills: {args.kills}"
        return report_error(UserError(f"{wrong} (allowed: {', '.join(KINDS)}; at least 1 kill)"))
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {args.seed}, {args.kills} kills of: {', '.join(names)}; in {root}", flush=True)
    tally = soak([KINDS[name] for name in names], args.kills, args.seed, root, minutes=args.minutes)
    print("\n".join(tally.lines()))
    if tally.lost or tally.unequal:
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
