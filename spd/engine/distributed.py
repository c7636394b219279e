"""Several processes that train one decomposition, each on its rows of every batch (started by torchrun).

Every process reads the same batches and holds the same parameters; one of them, the leader, writes. Without
torchrun everything here does nothing. Knows no model.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spd.config import RunError, UserError
from spd.noise import Share

PATIENCE = timedelta(hours=6)
"""how long the others wait for the leader, which alone evaluates and writes the report"""

T = TypeVar("T")


class PeerEnded(RunError):  # noqa: N818 - it is the other's error
    """Another process of the run ended before its time; that one says why."""


class StoppedTogether(SystemExit):  # noqa: N818 - nor is this an error
    """All processes of the run stop, as they have agreed; what stops one alone is another `SystemExit`."""


class SaidByLeader(UserError):  # noqa: N818 - it is the mistake, as in its parent
    """A mistake of the user that the leader has a message for."""


def own_share() -> Share:
    """Rank and number of the processes of this run; one of one where torchrun started none."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Share()


def is_leader() -> bool:
    """Whether this is the process that writes."""
    return own_share().rank == 0


def own_gpu() -> torch.device:
    """The GPU of this process, by its number on this machine."""
    return (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if own_share().of > 1
        else torch.device("cuda")
    )


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other processes that torchrun started, if it did.

    All of them end when the leader does, unless something failed or one was stopped alone: the others are
    then waiting for it elsewhere, and hear that it is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    except SystemExit as ended:
        if ended.code == 0 or isinstance(ended, StoppedTogether):
            with _together():
                dist.barrier()
        raise
    finally:
        dist.destroy_process_group()


def on_leader(function: Callable[[], T]) -> T:
    """What the leader's call gives, in all processes; its `UserError` too, `SaidByLeader` in the others."""
    if own_share().of == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_leader():
        try:
            outcome = [function(), None]
        except UserError as error:
            outcome = [None, error]
    with _together():
        dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error if is_leader() else SaidByLeader(str(error))
    return result


@contextmanager
def leader_first() -> Iterator[None]:
    """The others begin when the leader has done it: they find what it put into a cache."""
    several = own_share().of > 1
    if several and not is_leader():
        with _together():
            dist.barrier()
    yield
    if several and is_leader():
        with _together():
            dist.barrier()


def agreed_maximum(value: int) -> int:
    """The largest of the values of all processes."""
    if own_share().of == 1:
        return value
    largest = torch.tensor(value)
    with _together():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each by its mean over the processes, in one exchange."""
    own = list(tensors)
    if own_share().of == 1 or not own:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in own])
    with _together():
        dist.all_reduce(flat)
    flat /= own_share().of
    for tensor, mean in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def mean_over_processes(value: Tensor) -> Tensor:
    """Its mean over the processes, without a gradient; all of them have to ask at the same time."""
    return _mean_over_processes(value)


@torch.library.custom_op("spd::mean_over_processes", mutates_args=())
def _mean_over_processes(value: Tensor) -> Tensor:
    """An operation of its own, which a compiled step calls as it is."""
    mean = value.clone()
    average_([mean])
    return mean


@_mean_over_processes.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise PeerEnded(f"another process of this run has ended: {reason}") from None
