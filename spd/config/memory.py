"""Whether what is about to be made fits into memory, asked before it is made.

What is counted is the least that there will be, so that nothing is refused that would have worked.
"""

from pathlib import Path

import psutil
import torch

from spd.config import UserError

NUMBER = 4
"""bytes of a float32"""
TRAINED = 4 * NUMBER
"""bytes of a parameter that is trained: itself, its gradient, and two moments of AdamW"""
OF_THE_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def require_memory(n_bytes: int, what: str, device: torch.device | str = "cpu") -> None:
    """`UserError` that begins with `what`, the setting and what it asks for, unless so much is free."""
    free = free_memory(torch.device(device))
    if n_bytes > free:
        raise UserError(
            f"{what} at least {in_words(n_bytes)} of memory, and {in_words(free)} are free on {device};"
            " less is needed"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        return min(free, int(OF_THE_CONTAINER.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def in_words(n_bytes: int) -> str:
    """`1.5 GB`, with the unit that leaves one to three digits before the point where there is one."""
    size, units = float(n_bytes), ["PB", "TB", "GB", "MB", "kB", "bytes"]
    while size >= 1000 and len(units) > 1:
        size, _ = size / 1000, units.pop()
    return f"{size:.3g} {units[-1]}"
