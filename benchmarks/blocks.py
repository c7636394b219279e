"""Variants of a step, each in a process of its own, timed in turn block by block.

Whatever else the machine does hits all of them alike, and each has a peak of memory of its own.
"""

import copy
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.cases import Case, load
from benchmarks.naive import Naive
from spd.component_model import ComponentModel
from spd.engine.prepare import prepare
from spd.launch.resources import n_usable_cores
from spd.optimize import Interrupted, Member, Silent, run_side_by_side
from spd.problem import Problem

Variant = Literal["naive", "eager", "compiled"]
WARM_UP_STEPS = 3


class Measured(NamedTuple):
    """One variant on one case."""

    steps_per_second: list[float]
    """of each block"""
    first_seconds: float
    """of the first steps, with whatever is compiled and evaluated before them"""
    megabytes: float
    """largest resident set of the process, imports included, in 10⁶ bytes; on a GPU, of its memory"""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(own: Measured, base: Measured) -> list[float]:
    """How many times faster, block by block."""
    pairs = zip(own.steps_per_second, base.steps_per_second, strict=True)
    return [mine / other for mine, other in pairs]


def measure(
    case: Case, variants: Sequence[Variant], *, n_blocks: int, block_seconds: float
) -> dict[Variant, Measured]:
    """Every variant's blocks, one after another in turn."""
    workers: dict[Variant, Worker] = {variant: Worker(case, variant) for variant in variants}
    try:
        first = {name: worker.run(WARM_UP_STEPS) for name, worker in workers.items()}
        lengths = {
            name: max(1, round(block_seconds * WARM_UP_STEPS / worker.run(WARM_UP_STEPS)))
            for name, worker in workers.items()
        }
        speeds: dict[Variant, list[float]] = {name: [] for name in workers}
        for _ in range(n_blocks):
            for name, worker in workers.items():
                speeds[name].append(lengths[name] / worker.run(lengths[name]))
        return {
            name: Measured(speeds[name], first[name], worker.finish())
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.process.kill()


class Worker:
    """A process that runs as many steps as it is told to."""

    def __init__(self, case: Case, variant: Variant) -> None:
        self.name = f"{variant} {case.experiment}"
        command = [sys.executable, "-m", "benchmarks.blocks", variant, json.dumps(case)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def run(self, n_steps: int) -> float:
        """Seconds for the next `n_steps` steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{n_steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def finish(self) -> float:
        """Its peak of memory, in 10⁶ bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._answer()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended with {self.process.wait()}")
        return float(line)


# --- in the worker ---------------------------------------------------------------------------------


class Pace:
    """Asked before every step whether to stop: between blocks it waits, and says how long one took."""

    def __init__(self) -> None:
        self.left = 0
        self.started: float | None = None

    def __call__(self) -> bool:
        if self.left == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self.started is not None:
                print(time.perf_counter() - self.started, flush=True)
            line = sys.stdin.readline()
            if not line:
                return True
            self.left, self.started = int(line), time.perf_counter()
        self.left -= 1
        return False


def run_package(runs: Sequence[tuple[Any, Problem]]) -> None:
    """The package's own loop, with its evaluation before the first step; several runs go side by side."""
    members = [Member(prepare(problem, config), Silent()) for config, problem in runs]
    try:
        run_side_by_side(members, stop_requested=Pace())
    except Interrupted:
        return
    raise AssertionError("the run ended before it was told to")


def run_naive(config: Any, problem: Problem) -> None:
    target = copy.deepcopy(problem.target)
    model = ComponentModel(
        problem.target, config.sites, config.importance, tied_sites=problem.tied_sites
    )
    parameters = model.subcomponent_parameters()
    naive = Naive(target, parameters, config.losses, problem.tied_sites)
    widths = 2 * [model.sites[path].C for path in naive.paths]
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0)
    pace = Pace()
    while not pace():
        batch = next(problem.train_batches)
        noise = (torch.rand(len(batch), C, device=batch.device) for C in widths)
        naive.total(batch, noise).backward()
        optimizer.step()
        optimizer.zero_grad()


def peak_megabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_resident_megabytes()


def peak_resident_megabytes() -> float:
    """Largest resident set of this process, in 10⁶ bytes; psutil knows only the present one."""
    per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * per_unit / 1e6


def machine() -> str:
    """What the figures were measured on, in one line."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    threads = torch.get_num_threads()
    return f"{name}, {n_usable_cores()} CPU cores, {threads} threads, torch {torch.__version__}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """`VARIANT CASE`: read numbers of steps from stdin, print seconds, at the end the peak of memory."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("spd.engine.compilation").setLevel(logging.INFO)
    variant, case = sys.argv[1], Case(*json.loads(sys.argv[2]))
    compiling = ["compile=false"] if variant == "eager" else []
    runs = []
    for seed in range(1 if variant == "naive" else case.n_seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(load(case, Path(folder) / "target", f"seed={seed}", *compiling))
    if variant == "naive":
        run_naive(*runs[0])
    else:
        run_package(runs)
    print(peak_megabytes(), flush=True)


if __name__ == "__main__":
    main()
