"""The number format in which a GPU's tensor cores multiply float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
