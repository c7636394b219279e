"""When and how the step is compiled; eager execution is always there to fall back on."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from spd import reassociation
from spd.config import UserError

logger = logging.getLogger(__name__)

WORTHWHILE_STEPS = 500
"""Below this many steps compiling usually takes longer than it saves."""


class CompiledStep:
    """A callable that is compiled as one graph, or not.

    `auto` compiles long runs where there is a C++ compiler and falls back to eager execution, with
    one line in the log, where compiling fails. `compiled` tells what was decided; None until the
    first call.
    """

    def __init__(
        self, function: Callable[..., Any], setting: Literal["auto"] | bool, n_steps: int
    ) -> None:
        self.eager = function
        self.may_fall_back = setting == "auto"
        self.compiled: bool | None = None
        wanted = setting is True or (setting == "auto" and n_steps >= WORTHWHILE_STEPS)
        if wanted and not self.may_fall_back:
            require_compiler()
        elif wanted and not _has_compiler():
            logger.info("no C++ compiler found: running without torch.compile, which is slower")
            wanted = False
        self.fast = (
            torch.compile(function, fullgraph=True, dynamic=False, options=inductor_options())
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
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        started = time.perf_counter()
        try:
            result = self.fast(*args)
        except (TorchDynamoException, InductorError) as error:
            if not self.may_fall_back:
                raise
            reason = str(error).strip().splitlines()[0]
            logger.info("torch.compile failed, running without it, which is slower: %s", reason)
            self.compiled = False
            return self.eager(*args)
        self.compiled = True
        logger.info("compiled the training step in %.0f s", time.perf_counter() - started)
        return result


def inductor_options() -> dict[str, Any]:
    """Recompute rather than store, and multiply matrices in the cheapest order.

    The former keeps tensors of shape (batch, C, hidden) out of memory.
    """
    # here, since the compiler takes a while to import and changes the environment
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class CheapestProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            reassociation.multiply_cheaply(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((reassociation.__file__,))

    return {
        "realize_opcount_threshold": 1000,
        "realize_reads_threshold": 100,
        "joint_custom_pre_pass": CheapestProducts(),
    }


def require_compiler() -> None:
    """Raise `UserError` where nothing can be compiled."""
    if not _has_compiler():
        where = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "no g++ or clang++"
        raise UserError(
            f"compile: a run that is compiled (true) needs a C++ compiler, found none: {where};"
            " install one, point CXX to it, or choose auto or false"
        )


def _has_compiler() -> bool:
    """Whether there is a compiler, by torch's own rule: `$CXX` alone where it is set."""
    if torch.cuda.is_available():
        return True
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return any(shutil.which(name) for name in names)
