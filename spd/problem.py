"""What an experiment hands to the core."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd.config import UserError, nearest

logger = logging.getLogger(__name__)

ReconKind = Literal["mse", "kl"]


@dataclass(frozen=True)
class Identity:
    """Known solution: probe j needs one subcomponent of its own, j = 1 … n."""

    n: int
    reads: Float[Tensor, "n d_in"] | None = field(default=None, compare=False)
    """the direction in which the matrix reads each feature; None: feature j is its j-th input, or it writes
    them"""
    writes: bool = field(default=False, compare=False)
    """feature j is the j-th output of the matrix"""


@dataclass(frozen=True)
class Dense:
    """Known solution: exactly k subcomponents are used, whichever probes use them."""

    k: int
    read_basis: Float[Tensor, "d_out r"] | None = None
    """orthonormal columns spanning what is read of this matrix's output; None: all of it"""


Pattern = Identity | Dense


@runtime_checkable
class Resumable(Protocol):
    """Batches whose position can be saved; what resuming needs."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batches:
    """A field that is given whatever holds batches, such as a `DataLoader`, and is an iterator of Tensors.

    Of a pair (x, y) it gives x. What is no iterator begins again at its end, if `again`. Batches that can
    be resumed stay the object that was given.
    """

    def __init__(self, *, again: bool) -> None:
        self.again = again

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Iterator[Tensor]:
        if instance is None:
            raise AttributeError(f"{self.name} has no default")
        return instance.__dict__[self.name]

    def __set__(self, instance: Any, given: Any) -> None:
        if isinstance(given, Tensor) or not isinstance(given, Iterable):
            raise UserError(
                f"{self.name}: {_kind(given)}; a DataLoader, a list or an iterator of batches is needed"
            )
        resumable = isinstance(given, Iterator) and isinstance(given, Resumable)
        instance.__dict__[self.name] = given if resumable else self._tensors(given)

    def _tensors(self, given: Iterable[Any]) -> Iterator[Tensor]:
        begins_again = self.again and not isinstance(given, Iterator)
        said = False
        while True:
            n = 0
            for item in given:
                n += 1
                batch = item[0] if isinstance(item, list | tuple) and item else item
                if not isinstance(batch, Tensor):
                    raise UserError(
                        f"{self.name}: a batch is {_kind(item)}; a Tensor, or (x, y) with one, is needed"
                    )
                if batch.numel() == 0:
                    raise UserError(f"{self.name}: batch {n} is {_kind(batch)}: it is empty")
                yield batch
            if not begins_again or n == 0:
                return
            if not said:
                logger.info("%s: ended after %d batches, and begins again", self.name, n)
                said = True


@dataclass(frozen=True)
class Problem:
    """A frozen target, its data, and what is known about the answer.

    `target` maps one batch Tensor to one output Tensor; it is decomposed in place. Held-out
    data must come from another seed than `train_batches`.
    """

    target: nn.Module
    train_batches: Any = Batches(again=True)
    """given as whatever holds batches, kept as an `Iterator[Tensor]`; what is no iterator begins again"""
    eval_batches: Any = Batches(again=False)
    """the same, without beginning again"""
    recon: ReconKind = "mse"
    independent_rows: bool = False
    """the target maps every row of a batch by itself; zero rows then cost nothing"""
    position_weights: Callable[[Tensor], Tensor] | None = None
    """batch → a weight for each of its rows or positions, with mean 1, 0 for what does not count in losses
    and figures; None: all count alike"""
    tied_sites: tuple[tuple[str, str], ...] = ()
    """(source, tied): the target's matrix of `tied` is the transpose of that of `source`"""
    probes: Tensor | None = None
    """a batch with one known cause each (one-hot inputs for the toy models)"""
    solution: dict[str, Pattern] = field(default_factory=dict)
    """site → known importance pattern on `probes`; empty where none is known"""
    target_dir: Path | None = None
    """where the target was loaded from; copied into the run directory"""
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        allowed = get_args(ReconKind)
        if self.recon not in allowed:
            hint = nearest(str(self.recon).lower(), allowed)
            raise UserError(
                f"recon: {self.recon!r} is no divergence{hint} (allowed: mse, the mean squared error,"
                " and kl, the KL divergence of logits)"
            )

    def save_target(self, directory: Path) -> None:
        """Write what a run needs to load its target again; `directory` is made if there is any."""
        if self.target_dir is not None:
            shutil.copytree(self.target_dir, directory, copy_function=shutil.copyfile)


def _kind(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a Tensor of shape {tuple(given.shape)}"
    return "None" if given is None else f"a {type(given).__name__}"
