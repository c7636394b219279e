"""Python imports this first in every run of `scripts/soak.py`: it strikes the run at the planned moment.

It wraps the functions in which a run spends its phases. What SPD_SOAK says is either where the calls of an
undisturbed run are to be written (`observe`), or a blow: a signal at the n-th file event below the output
root, or after some seconds, of the n-th call of a phase.
"""

import atexit
import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from typing import Any

TRAINING, START, END = "training", "start", "end"
PHASES = {
    ("spd.experiments.targets", "cached_target"): "target training",
    ("spd.runs.run", "_create"): "beginning",
    ("spd.runs.tracking", "RunTracker.stepped"): TRAINING,
    ("spd.optimize", "_evaluate"): "evaluation",
    ("spd.engine.checkpoint", "save"): "checkpoint",
    ("spd.runs.execution", "_finish"): "result",
    ("spd.reports.report", "report_on"): "report",
}
"""where a function lies → its phase; training goes on until the next step is logged"""
ANYWHERE = "anywhere"
"""from the start of the process on"""


class Watch:
    """The phases of this process, and the blow that is to hit one of them."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.root: str = order["root"]
        self.observe: str | None = order.get("observe")
        self.blow: dict[str, Any] | None = order.get("blow")
        self.begun = self.stepped = time.perf_counter()
        self.open: list[tuple[str, int]] = []
        self.calls: dict[str, list[dict[str, float]]] = {}
        self.n_events = 0
        if self.observe:
            atexit.register(self._write)
        if self.blow and self.blow["phase"] == ANYWHERE:
            self._later()

    def event(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: counts what is done to files below the output root."""
        if event not in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            return
        if not isinstance(args[0], str | os.PathLike) or not str(args[0]).startswith(self.root):
            return
        self.n_events += 1
        blow = self.blow
        if blow and self.open and blow["event"] is not None:
            phase, n_before = self.open[-1]
            wanted = (blow["phase"], len(self.calls[phase]), blow["event"])
            if wanted == (phase, blow["call"] + 1, self.n_events - n_before - 1):
                self.strike()

    def wrapped(self, function: Any, phase: str) -> Any:
        """The same function, whose calls are noted."""

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            calls = self.calls.setdefault(phase, [])
            started, before = time.perf_counter(), self.n_events
            if phase == TRAINING and calls:
                calls[-1]["seconds"] += started - self.stepped
            record = {"seconds": 0.0, "events": 0}
            calls.append(record)
            self.open.append((phase, before))
            blow = self.blow
            if blow and blow["event"] is None:
                wanted = (blow["phase"], blow["call"])
                if wanted == (phase, len(calls) - 1):
                    self._later()
            try:
                return function(*args, **kwargs)
            finally:
                self.open.pop()
                self.stepped = time.perf_counter()
                record["seconds"] = self.stepped - started
                record["events"] = self.n_events - before

        return inner

    def _later(self) -> None:
        assert self.blow is not None, "planned"
        timer = threading.Timer(self.blow["seconds"], self.strike)
        timer.daemon = True
        timer.start()

    def phase(self) -> str:
        """Where this process is."""
        if self.open:
            return self.open[-1][0]
        if "result" in self.calls:
            return END
        return TRAINING if {TRAINING, "evaluation"} & self.calls.keys() else START

    def strike(self) -> None:
        """Leave word of the phase that is hit, and send the signal."""
        blow, self.blow = self.blow, None
        assert blow is not None, "planned"
        try:
            with open(blow["mark"], "x", encoding="utf-8") as mark:
                mark.write(self.phase())
        except FileExistsError:
            return
        os.kill(os.getpid(), blow["signum"])

    def _write(self) -> None:
        whole = {ANYWHERE: [{"seconds": time.perf_counter() - self.begun, "events": 0}]}
        assert self.observe is not None, "registered only then"
        with open(self.observe, "w", encoding="utf-8") as file:
            json.dump({**self.calls, **whole}, file)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that hold a phase, and wraps it when they have been executed."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.modules = {module for module, _ in PHASES}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.loader is not None, fullname
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for (name, dotted), phase in PHASES.items():
                if name == fullname:
                    *owners, last = dotted.split(".")
                    owner = functools.reduce(getattr, owners, module)
                    setattr(owner, last, self.watch.wrapped(getattr(owner, last), phase))

        spec.loader.exec_module = exec_module
        return spec


def _arm() -> None:
    """Watch this process if it is the run (of several, the one of that rank), or torchrun itself."""
    text = os.environ.get("SPD_SOAK")
    words = sys.orig_argv
    if text is None or "spd.registry" in words:  # which becomes the run in a moment
        return
    order = json.loads(text)
    if "torch.distributed.run" in words:
        rank = "launcher"
    else:
        rank = os.environ.get("RANK", "alone")
        del os.environ["SPD_SOAK"]  # what the run starts is left alone
    if rank != order["rank"]:
        return
    watch = Watch(order)
    sys.meta_path.insert(0, Finder(watch))
    sys.addaudithook(watch.event)


_arm()
