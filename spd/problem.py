"""What an experiment hands to the core."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

ReconKind = Literal["mse", "kl"]


@dataclass(frozen=True)
class Identity:
    """Known solution: probe j needs one subcomponent of its own, j = 1 … n."""

    n: int


@dataclass(frozen=True)
class Dense:
    """Known solution: exactly k subcomponents are used, whichever probes use them."""

    k: int
    read_basis: Float[Tensor, "d_out r"] | None = None
    """orthonormal columns spanning what is read of this matrix's output; None: all of it"""


Pattern = Identity | Dense


@runtime_checkable
class Resumable(Protocol):
    """Batches whose position can be saved; what `optimize` needs for resuming."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Problem:
    """A frozen target, its data, and what is known about the answer.

    `target` maps one batch Tensor to one output Tensor; `optimize` decomposes it in place. Held-out
    data must come from another seed than `train_batches`.
    """

    target: nn.Module
    train_batches: Iterator[Tensor]
    eval_batches: Iterator[Tensor]
    recon: ReconKind = "mse"
    independent_rows: bool = False
    """the target maps every row of a batch by itself; zero rows then cost nothing"""
    tied_sites: tuple[tuple[str, str], ...] = ()
    """(source, tied): the target's matrix of `tied` is the transpose of that of `source`"""
    probes: Tensor | None = None
    """a batch with one known cause each (one-hot inputs for the toy models)"""
    solution: dict[str, Pattern] = field(default_factory=dict)
    """site → known importance pattern on `probes`; empty where none is known"""
    target_dir: Path | None = None
    """where the target was loaded from; copied into the run directory"""
    device: torch.device = torch.device("cpu")

    def save_target(self, directory: Path) -> None:
        """Write what a run needs to load its target again; `directory` is made if there is any."""
        if self.target_dir is not None:
            shutil.copytree(self.target_dir, directory)
