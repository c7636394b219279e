"""What a GPU's tensor cores make of float32 products: every factor rounded to TF32, float32 sums."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 2, aten.bmm.default: 2, aten.addmm.default: 3, aten.baddbmm.default: 3}
"""operation → how many of its leading arguments are tensors; the last two are the factors"""
DROPPED_BITS = 13
"""TF32 has the exponent of float32, and 10 of its 23 bits of mantissa"""


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To the nearest, ties away from zero."""
    bits = x.contiguous().view(torch.int32) + (1 << (DROPPED_BITS - 1))
    return (bits & -(1 << DROPPED_BITS)).view(torch.float32)


class EmulatedTF32(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and args[0].dtype == torch.float32:
            n = PRODUCTS[func]
            args = (*args[: n - 2], *map(rounded_to_tf32, args[n - 2 : n]), *args[n:])
        return func(*args, **(kwargs or {}))
