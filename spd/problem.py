"""What an experiment hands to the core."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd.config import UserError, counted, nearest

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


class NamedTensors:
    """A batch of several Tensors, each under the name by which the target takes it.

    Along the first axis of each are the examples. Of what a Tensor has it has what is asked of a batch.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def shape(self) -> tuple[tuple[str, torch.Size], ...]:
        """What decides the shapes of all that the target computes."""
        return tuple((name, tensor.shape) for name, tensor in self.tensors.items())

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def is_cuda(self) -> bool:
        return self._first.is_cuda

    @property
    def is_meta(self) -> bool:
        return self._first.is_meta

    def is_floating_point(self) -> bool:
        return all(tensor.is_floating_point() for tensor in self.tensors.values())

    def numel(self) -> int:
        """Of all together; 0 if one of them is empty."""
        sizes = [tensor.numel() for tensor in self.tensors.values()]
        return sum(sizes) if all(sizes) else 0

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._first)

    def __getitem__(self, examples: slice | list[int]) -> "NamedTensors":
        return NamedTensors({name: tensor[examples] for name, tensor in self.tensors.items()})

    @property
    def _first(self) -> Tensor:
        return next(iter(self.tensors.values()))


Batch = Tensor | NamedTensors


def of_ids(batch: Batch) -> bool:
    """Whether a batch holds whole numbers, such as tokens: what is looked up, and has no gradient.

    That a target is a language model its problem says, and which axes are rows each kind of site.
    """
    return not batch.is_floating_point()


def as_batch(given: Batch | Mapping[str, Tensor]) -> Batch:
    """A mapping becomes the batch that it stands for; `UserError` of what is none."""
    if isinstance(given, Mapping):
        return NamedTensors(given)
    if not isinstance(given, Batch):
        raise UserError(f"a batch is {describe(given)}; a Tensor, or names with Tensors, is needed")
    return given


def run_target(target: nn.Module, batch: Batch) -> Any:
    """What a target gives for a batch: a Tensor is its only argument, Tensors with names are keywords."""
    return target(**batch.tensors) if isinstance(batch, NamedTensors) else target(batch)


MOST_IN_A_LIST = 4
"""Tensors of one shape, such as (x, y, mask); more are the examples of a batch that was not stacked"""


class Batches:
    """A field that is given whatever holds batches, such as a `DataLoader`, and is an iterator of batches.

    Of a pair (x, y) it gives x, which is a Tensor or a mapping of names to Tensors. What is no iterator
    begins again at its end, if `again`. Batches that can be resumed stay the object that was given.
    """

    def __init__(self, *, again: bool, optional: bool = False) -> None:
        self.again, self.optional = again, optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Iterator[Batch]:
        if instance is None and self.optional:
            return iter(())
        if instance is None:
            raise AttributeError(f"{self.name} has no default")
        return instance.__dict__[self.name]

    def __set__(self, instance: Any, given: Any) -> None:
        if isinstance(given, Tensor | Mapping) or not isinstance(given, Iterable):
            raise UserError(
                f"{self.name}: {describe(given)}; a DataLoader, a list or an iterator of batches is needed"
            )
        resumable = isinstance(given, Iterator) and isinstance(given, Resumable)
        instance.__dict__[self.name] = given if resumable else self._batches(given)

    def _batches(self, given: Iterable[Any]) -> Iterator[Batch]:
        begins_again = self.again and not isinstance(given, Iterator)
        said = False
        while True:
            n = 0
            for item in given:
                n += 1
                _check_no_examples(item, self.name, n)
                batch = item[0] if isinstance(item, list | tuple) and item else item
                batch = self._named(batch, n) if isinstance(batch, Mapping) else batch
                if not isinstance(batch, Batch):
                    raise UserError(
                        f"{self.name}: a batch is {describe(item)}; a Tensor, names with Tensors, or (x, y)"
                        " with one of these, is needed"
                    )
                batch = _plain(batch)
                if isinstance(batch, Tensor) and batch.dim() == 0:
                    raise UserError(
                        f"{self.name}: batch {n} is one number; a Tensor with an axis is needed"
                    )
                if batch.numel() == 0:
                    raise UserError(f"{self.name}: batch {n} is {describe(batch)}: it is empty")
                yield batch
            if not begins_again or n == 0:
                return
            if not said:
                seen = counted(n, "batch", "batches")
                logger.warning("%s: ended after %s, and begins again", self.name, seen)
                said = True

    def _named(self, item: Mapping[Any, Any], n: int) -> NamedTensors:
        other = [name for name, value in item.items() if not isinstance(value, Tensor)]
        if other or not item:
            found = f"{other[0]!r} is {describe(item[other[0]])}" if other else "no name"
            raise UserError(
                f"{self.name}: in batch {n}, {found}; a batch of names has a Tensor for each"
            )
        lengths = {name: len(value) if value.dim() else 0 for name, value in item.items()}
        if len(set(lengths.values())) != 1:
            counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise UserError(
                f"{self.name}: batch {n} has different numbers of examples ({counts}); the first axis of"
                " each Tensor is that of the examples"
            )
        return NamedTensors(item)


def _check_no_examples(item: Any, name: str, n: int) -> None:
    """`UserError` of a list of examples where a batch is needed: all but the first would be lost."""
    alike = isinstance(item, list) and len(item) > MOST_IN_A_LIST
    if alike and all(isinstance(x, Tensor) and x.shape == item[0].shape for x in item):
        raise UserError(
            f"{name}: batch {n} is a list of {len(item)} Tensors of one shape; a Tensor that holds them all"
            " (torch.stack), or (x, y), is needed"
        )


def _are_pairs(ties: Any) -> bool:
    return isinstance(ties, list | tuple) and all(
        isinstance(tie, list | tuple)
        and len(tie) == 2
        and all(isinstance(path, str) for path in tie)
        for tie in ties
    )


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target": (lambda x: isinstance(x, nn.Module), "an instance of a torch.nn.Module"),
    "independent_rows": (lambda x: isinstance(x, bool), "True or False"),
    "position_weights": (lambda x: x is None or callable(x), "a function of a batch"),
    "tied_sites": (_are_pairs, "a tuple of pairs of names, (('source', 'tied'),),"),
    "probes": (lambda x: x is None or isinstance(x, Tensor), "a Tensor"),
    "solution": (lambda x: isinstance(x, Mapping), "a mapping of sites to patterns"),
    "target_dir": (lambda x: x is None or isinstance(x, Path), "a pathlib.Path"),
    "device": (lambda x: isinstance(x, torch.device), "a torch.device"),
}
"""what the fields of a problem may be, and in words"""


@dataclass(frozen=True)
class Problem:
    """A frozen target, its data, and what is known about the answer.

    `target` maps one batch, a Tensor or several by name, to one output Tensor; it is decomposed in place.
    Held-out data must come from another seed than `train_batches`.
    """

    target: nn.Module
    train_batches: Any = Batches(again=True)
    """given as whatever holds batches, kept as an `Iterator[Batch]`; what is no iterator begins again"""
    eval_batches: Any = Batches(again=False)
    """the same, without beginning again"""
    recon: ReconKind = "mse"
    independent_rows: bool = False
    """the target maps every row of a batch by itself; zero rows then cost nothing"""
    position_weights: Callable[[Any], Tensor] | None = None
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
    choice_batches: Any = Batches(again=False, optional=True)
    """by which several `starts` are compared: from another seed than the two others; where none are given,
    those of `eval_batches` serve that come after the `n_eval_batches` of the verdict"""

    def __post_init__(self) -> None:
        for name, (right, needed) in KINDS.items():
            given = getattr(self, name)
            if not right(given):
                found = f"{given.__name__}, a class" if isinstance(given, type) else describe(given)
                raise UserError(f"{name}: {found}; {needed} is needed")
        for path, pattern in self.solution.items():
            if not isinstance(pattern, Pattern):
                raise UserError(
                    f"solution: that of {path!r} is {describe(pattern)}; an Identity or a Dense is needed"
                )
        if self.solution and self.probes is None:
            raise UserError("probes: there are none, but the solution is that on probes; give both")
        if self.independent_rows and self.position_weights is not None:
            raise UserError(
                "independent_rows: True merges the rows without input, of which position_weights would give"
                " each its own weight; give one of the two"
            )
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
            copy_folder(self.target_dir, directory)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy the files below a folder; of the source's modes the copies keep none."""
    folder.mkdir(parents=True)
    for path in sorted(source.rglob("*")):  # a folder comes before what lies in it
        if path.is_dir():
            (folder / path.relative_to(source)).mkdir()
        else:
            shutil.copyfile(path, folder / path.relative_to(source))


def _plain(batch: Batch) -> Batch:
    """Without a graph that it came with, and as autograd can keep it."""
    if isinstance(batch, NamedTensors):
        return NamedTensors({name: _plain_tensor(t) for name, t in batch.tensors.items()})
    return _plain_tensor(batch)


def _plain_tensor(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def describe(given: Any) -> str:
    """What something given as a batch is."""
    if isinstance(given, NamedTensors):
        return f"Tensors of shapes {', '.join(f'{name} {tuple(s)}' for name, s in given.shape)}"
    if isinstance(given, Tensor):
        return f"a Tensor of shape {tuple(given.shape)}"
    return "None" if given is None else f"a {type(given).__name__}"
