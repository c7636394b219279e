"""What a computation would cost on a machine that always has the same speed.

A decision that changes numbers, be it by rounding alone, must not hang on what else a machine is doing.
So nothing is timed: operations, the numbers they write and the products they do are counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Machine(NamedTuple):
    """Seconds for one of each, rounded from what was measured."""

    operation: float
    written: float
    """number that an operation writes"""
    product: float
    """floating-point operation of a matrix product"""


LAPTOP = Machine(operation=3e-6, written=5e-10, product=7e-12)
GPU = Machine(operation=1e-5, written=5e-12, product=3e-14)


class _Count(TorchDispatchMode):
    """Counts operations that write something, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.written = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if not getattr(func, "is_view", False):
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.written += sum(leaf.numel() for leaf in outputs)
        return result


@torch.no_grad()
def nominal_seconds(function: Callable[..., Any], *args: Any) -> float:
    """Of one call without gradients, the same wherever and whenever it is asked."""
    on_gpu = any(isinstance(arg, Tensor) and arg.is_cuda for arg in tree_leaves(args))
    machine = GPU if on_gpu else LAPTOP
    with FlopCounterMode(display=False) as products, _Count() as count:
        function(*args)
    return (
        count.operations * machine.operation
        + count.written * machine.written
        + products.get_total_flops() * machine.product
    )
