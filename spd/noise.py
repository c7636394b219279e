"""Random numbers by what they are for: seeds, and the uniform draws that stochastic masks are made of."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part; for reproducible streams that do not overlap."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Share(NamedTuple):
    """Which rows of a batch are this process's."""

    rank: int = 0
    of: int = 1

    def rows(self, n: int) -> slice:
        """Those of n rows that are this process's; `of` divides n."""
        assert n % self.of == 0, f"{n} rows for {self.of} processes"
        return slice(self.rank * n // self.of, (self.rank + 1) * n // self.of)


def seeded(device: torch.device, *place: object) -> torch.Generator:
    """A generator whose draws depend on `place` alone."""
    return torch.Generator(device=device).manual_seed(derive_seed(*place))


@contextmanager
def own_generators(*place: object) -> Iterator[None]:
    """Seed torch's global generators by `place` for the time of a block, and put them back as they were.

    Nothing of this package draws from them; a target or data of somebody else's may.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derive_seed(*place))
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(derive_seed(*place))
        yield


def uniform(
    shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draws in [0, 1): all that stochastic masks are made of come from here."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)


class StepNoise(Mapping[str, Tensor]):
    """All uniform draws in [0, 1) of one step by name, each made anew when it is asked for.

    A draw depends on (stream, seed, step) and its name alone, not on what else is drawn or in which
    order, so that a caller holds only what it needs at a time. `dict(noise)` holds all of them.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
        *,
        stream: str,
        seed: int,
        step: int,
        rows: Mapping[str, slice] | None = None,
    ) -> None:
        self.shapes = shapes
        self.rows = rows or {}
        """which rows of a draw are handed out, where not all are"""
        self.place = (stream, seed, step)
        self.generator = torch.Generator(device=device)

    def __getitem__(self, key: str) -> Tensor:
        self.generator.manual_seed(derive_seed(*self.place, key))
        draw = uniform(self.shapes[key], self.generator)
        return draw[self.rows[key]].clone() if key in self.rows else draw

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
