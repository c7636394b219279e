"""When and how the step is compiled; eager execution is always there to fall back on."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from spd.config import UserError

logger = logging.getLogger(__name__)

WORTHWHILE_STEPS = 500
"""Below this many steps compiling usually takes longer than it saves."""


INDUCTOR_OPTIONS = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 100}
"""Recompute rather than store: keeps tensors of shape (batch, C, hidden) out of memory."""


class CompiledStep:
    """A callable that is compiled as one graph, or not.

    `auto` compiles long runs where there is a C++ compiler and falls back to eager execution, with one
    line in the log, where compiling fails. `compiled` tells what was decided; None until the first call.
    """

    def __init__(
        self, function: Callable[..., Any], setting: Literal["auto"] | bool, n_steps: int
    ) -> None:
        self.eager = function
        self.may_fall_back = setting == "auto"
        self.compiled: bool | None = None
        wanted = setting is True or (setting == "auto" and n_steps >= WORTHWHILE_STEPS)
        if wanted and not _has_compiler():
            if not self.may_fall_back:
                raise UserError("compile: true needs a C++ compiler (g++ or clang++, or $CXX)")
            logger.info("no C++ compiler found: running without torch.compile, which is slower")
            wanted = False
        self.fast = (
            torch.compile(function, fullgraph=True, dynamic=False, options=INDUCTOR_OPTIONS)
            if wanted
            else None
        )

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            return self._first_call(*args)
        if self.compiled and self.fast is not None:
            return self.fast(*args)
        return self.eager(*args)

    def _first_call(self, *args: Any) -> Any:
        if self.fast is None:
            self.compiled = False
            return self.eager(*args)
        failures = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
        started = time.perf_counter()
        try:
            result = self.fast(*args)
        except failures as error:
            if not self.may_fall_back:
                raise
            reason = str(error).strip().splitlines()[0]
            logger.info("torch.compile failed, running without it, which is slower: %s", reason)
            self.compiled = False
            return self.eager(*args)
        self.compiled = True
        logger.info("compiled the training step in %.0f s", time.perf_counter() - started)
        return result


def _has_compiler() -> bool:
    if torch.cuda.is_available():
        return True
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(name) for name in candidates if name)
