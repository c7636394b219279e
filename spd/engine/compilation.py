"""When and how the step is compiled, and the number format in which a GPU multiplies; eager execution is
always there to fall back on.
"""

import logging
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from spd.config import UserError
from spd.engine import reassociation
from spd.engine.cost import nominal_seconds
from spd.problem import NamedTensors

logger = logging.getLogger(__name__)

MAX_SHAPES = 4
"""of batches for which a graph is compiled: each takes as long as the first"""
WORTHWHILE_SECONDS = 30.0
"""Of eager steps. Compiling takes 10 to 30 s, a few from the cache, and a step then about a quarter."""


class CompiledStep:
    """A callable that is compiled as one graph, or not.

    `auto` compiles where there is a C++ compiler and `n_steps` eager steps would take longer than
    compiling does, by their nominal cost (`spd.engine.cost`), and falls back to eager execution, with one
    line in the log, where compiling fails.
    `compiled` tells what was decided; None until the first call. Functions in `opaque` are not looked
    into, only the operations they do are recorded; `n_members` is the length of the axis over which a
    step is mapped. With `cuda_graphs` what is compiled is recorded, there and back, and launched as a
    whole; its results and gradients are overwritten from the next call on.

    A graph belongs to one shape of batch. The first `MAX_SHAPES` that come are compiled, others run
    eagerly; `shapes` lists the former, so that a run that is resumed goes on with the same ones.
    `eager_shapes` lists those among the first for which compiling failed, though it had succeeded for
    another; where `may_fall_back`, they run eagerly, too.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        setting: Literal["auto"] | bool,
        n_steps: int,
        *,
        opaque: Sequence[Callable[..., Any]] = (),
        n_members: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        self.eager = self.function = function
        self.setting = setting
        self.n_steps = n_steps
        self.opaque, self.n_members = opaque, n_members
        self.cuda_graphs = cuda_graphs
        self.compiled: bool | None = None
        self.may_fall_back = setting == "auto"
        self.shapes: list[list[list[int]]] = []
        self.eager_shapes: list[list[list[int]]] = []
        self._ready: list[list[list[int]]] = []
        """of `shapes`, those for which this process has a graph"""
        self._made = False
        self._passed_over = False
        if setting is True:
            require_compiler()

    @property
    def worthwhile_seconds(self) -> float:
        """How long eager steps have to take for `auto` to compile."""
        return WORTHWHILE_SECONDS

    def forward(self, *args: Any) -> Any:
        """What is counted without gradients: half of an eager step."""
        return self.eager(*args)

    def make_compiled(self) -> Callable[..., Any]:
        """The step that the first call compiles."""
        for inner in self.opaque:
            torch.compiler.allow_in_graph(inner)
        options = inductor_options(self.n_members, cuda_graphs=self.cuda_graphs)
        return torch.compile(self.eager, fullgraph=True, dynamic=False, options=options)

    def go_back(self) -> None:
        """Undo what `make_compiled` and a call that failed have left behind."""

    def __call__(self, *args: Any) -> Any:
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.compiled is None:
            self.compiled = self._wanted(*args)
        if not self.compiled:
            return self.eager(*args)
        shape = _shapes(*args)
        if shape in self._ready:
            return self.function(*args)
        if shape in self.shapes or self._has_room_for(shape):
            return self._first_of_its_shape(shape, *args)
        return self.run_eagerly(*args)

    def _has_room_for(self, shape: list[list[int]]) -> bool:
        """Whether a shape that is not among `shapes` is to be compiled."""
        if shape in self.eager_shapes:
            return False
        if len(self.shapes) + len(self.eager_shapes) < MAX_SHAPES:
            return True
        if not self._passed_over:
            self._passed_over = True
            logger.info(
                "batches come in more than %d shapes: others are not compiled, which is slower",
                MAX_SHAPES,
            )
        return False

    def covers(self, *args: Any) -> bool:
        """Whether arguments of these shapes have a graph."""
        return bool(self.compiled) and _shapes(*args) in self.shapes

    def run_eagerly(self, *args: Any) -> Any:
        """The step without what is compiled."""
        return self.eager(*args)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """For a call and its backward pass: an error of what CUDA graphs launch says how to do without."""
        try:
            yield
        except RuntimeError as error:
            if self.compiled and self.cuda_graphs:
                error.add_note(
                    "The step was launched as CUDA graphs; cuda_graphs: false does without."
                )
            raise

    def _first_of_its_shape(self, shape: list[list[int]], *args: Any) -> Any:
        """A call that compiles a graph, or finds that this fails.

        A shape that had a graph before the run was resumed must have one again.
        """
        if shape in self.shapes:
            return self._compile(shape, *args)
        try:
            result = self._compile(shape, *args)
        except _compiler_errors() as error:
            if not self.may_fall_back:
                raise
            self._fall_back(shape, str(error).strip().splitlines()[0])
            return self.run_eagerly(*args) if self.compiled else self.eager(*args)
        self.shapes.append(shape)
        return result

    def _fall_back(self, shape: list[list[int]], reason: str) -> None:
        """For batches of this shape; for all, if there has been no graph for another."""
        self.go_back()
        if self.shapes:
            self.eager_shapes.append(shape)
            text = (
                "torch.compile failed, running batches of another shape without it, which is slower"
            )
        else:
            self.compiled, self.function = False, self.eager
            text = "torch.compile failed, running without it, which is slower"
        logger.info("%s: %s", text, reason)

    def _wanted(self, *args: Any) -> bool:
        if isinstance(self.setting, bool):
            return self.setting
        if self.n_steps * 2 * nominal_seconds(self.forward, *args) < self.worthwhile_seconds:
            return False
        if not _has_compiler():
            logger.info("no C++ compiler found: running without torch.compile, which is slower")
        return _has_compiler()

    def _compile(self, shape: list[list[int]], *args: Any) -> Any:
        started, before = time.perf_counter(), _counts()
        if not self._made:
            self.function, self._made = self.make_compiled(), True
        with _whole_and_cached():
            result = self.function(*args)
        found = _counts() - before
        notes = ", found in the cache" if found["hit"] and not found["miss"] else ""
        notes += ", without CUDA graphs" if found["skipped"] else ""
        what = (
            "compiled it for batches of another shape"
            if self._ready
            else "compiled the training step"
        )
        logger.info("%s in %.0f s%s", what, time.perf_counter() - started, notes)
        self._ready.append(shape)
        return result


class CompiledSequel:
    """What follows a compiled step, eagerly wherever that has no graph, else compiled with it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = function
        self.function: Callable[..., Any] | None = None
        self.shapes: list[list[list[int]]] = []

    def __call__(self, step: CompiledStep, of_step: Sequence[Any], *args: Any) -> Any:
        """The function of `args`, after a step of the arguments `of_step`."""
        if not step.covers(*of_step):
            return self.eager(*args)
        if self.function is None:
            self.function = torch.compile(self.eager, fullgraph=True, dynamic=False)
        shapes = _shapes(*of_step)
        if shapes in self.shapes:
            return self.function(*args)
        self.shapes.append(shapes)
        with _whole_and_cached():
            return self.function(*args)


def _shapes(*args: Any) -> list[list[int]]:
    """What decides whether a graph fits: the shapes of the tensors among the arguments."""
    tensors: list[torch.Tensor] = []
    for arg in args:
        tensors += arg.tensors.values() if isinstance(arg, NamedTensors) else [arg]
    return [list(arg.shape) for arg in tensors if isinstance(arg, torch.Tensor)]


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


@contextmanager
def _whole_and_cached() -> Iterator[None]:
    """The backward graph is compiled with the forward one, and both are found again by the next run.

    The cache is torch's own, keyed by the graph and everything it is compiled with; gradients that are
    written out are part of that graph, but have to be allowed. However many runs a process has compiled
    before, as a notebook may: torch takes each for another attempt at the same function, and gives up.
    """
    import torch._dynamo.config
    import torch._functorch.config

    with (
        torch._dynamo.config.patch(
            recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
        ),
        torch._functorch.config.patch(
            autograd_cache_allow_custom_autograd_functions=True,
            force_non_lazy_backward_lowering=True,
        ),
        warnings.catch_warnings(),
    ):
        # it looks at the gradients of all that goes into a graph, whether they have one or not
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


def _counts() -> Counter[str]:
    """How many graphs this process has found in the cache (`hit`), how many not (`miss`), and how many
    could not be launched as CUDA graphs, though they were to be (`skipped`)."""
    from torch._dynamo.utils import counters

    keys = {"hit": "fxgraph_cache_hit", "miss": "fxgraph_cache_miss", "skipped": "cudagraph_skips"}
    return Counter({name: counters["inductor"][key] for name, key in keys.items()})


def inductor_options(n_members: int = 1, *, cuda_graphs: bool = False) -> dict[str, Any]:
    """Recompute rather than store, and multiply matrices in the cheapest order.

    The former keeps tensors of shape (batch, C, hidden) out of memory. `cuda_graphs` launches what is
    compiled as a whole, for which its inputs are copied to where the recording read them.
    """
    # here, since the compiler takes a while to import and changes the environment
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class CheapestProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            reassociation.multiply_cheaply(graph, n_members)

        def uuid(self) -> Any:
            return get_hash_for_files((reassociation.__file__,), extra=str(n_members))

    return {
        "realize_opcount_threshold": 1000,
        "realize_reads_threshold": 100,
        "joint_custom_pre_pass": CheapestProducts(),
        "triton.cudagraphs": cuda_graphs,
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


@contextmanager
def tf32_matmuls(wanted: bool) -> Iterator[None]:
    """Multiply float32 matrices in TF32 on a GPU within the block, where that is wanted.

    TF32 keeps 10 of the 23 bits of a factor's mantissa; sums stay float32. What that does to a step of
    trained runs, emulated on the CPU: the terms of a language model (`pydoc_mlp`) change by up to 4e-5 of
    themselves, its gradient by 0.6 %. A toy's total changes by up to 2e-4, the gradient of residual MLPs by
    1.0 to 1.5 %, and that of `tms_40-10` at its optimum by 29 %: there faithfulness, 1e-8, is as small as
    the rounding.
    """
    if not wanted:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
