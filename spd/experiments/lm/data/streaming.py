"""Token batches from a data set that is read while training; its position can be saved."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Self

import datasets
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from spd.config import RunError
from spd.experiments.lm.data.tokens import (
    DOCUMENTS_AT_ONCE,
    Encode,
    begun,
    check_ids,
    copied_to,
    permutation,
)


class StreamedBatches:
    """Endless batches `[batch, length]` out of a buffer of sequences that a stream keeps full.

    Every epoch reads the shards in an order of its own; within them the buffer mixes. The state holds
    the buffer and the stream's position, so that a resumed run sees the batches it would have seen.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        encode: Encode,
        *,
        column: str,
        length: int,
        n_vocab: int,
        batch_size: int,
        buffer_size: int,
        seed: int,
        stream: str,
        device: torch.device | str = "cpu",
        epochs: int | None = None,
        begin: int | None = None,
    ) -> None:
        self.documents, self.encode, self.column = documents, encode, column
        self.length, self.n_vocab = length, n_vocab
        self.batch_size, self.buffer_size = batch_size, max(buffer_size, batch_size)
        self.seed, self.stream, self.device = seed, stream, device
        self.epochs, self.begin = epochs, begin
        self.position, self.epoch, self.n_in_epoch = 0, 0, 0
        self.shard_index = 0
        self.shard_state: dict[str, Any] | None = None
        self.pending: list[int] = []
        self.buffer = torch.empty((0, length), dtype=torch.int32)
        self._rows: Iterator[dict[str, Any]] | None = None
        self._shard: datasets.IterableDataset | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Int[Tensor, "batch length"]:
        self._fill()
        if len(self.buffer) < self.batch_size:
            raise StopIteration
        chosen = torch.as_tensor(
            permutation(len(self.buffer), self.stream, self.seed, "buffer", self.position)
        )
        batch, kept = chosen[: self.batch_size], chosen[self.batch_size :].sort().values
        self.position += 1
        ids = self.buffer[batch].long()
        self.buffer = self.buffer[kept]
        check_ids(ids, self.n_vocab)
        return copied_to(ids, self.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "epoch": self.epoch,
            "n_in_epoch": self.n_in_epoch,
            "shard_index": self.shard_index,
            "shard_state": self.shard_state,
            "pending": list(self.pending),
            "buffer": self.buffer.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.epoch = int(state["position"]), int(state["epoch"])
        self.n_in_epoch = int(state["n_in_epoch"])
        self.shard_index, self.shard_state = int(state["shard_index"]), state["shard_state"]
        self.pending, self.buffer = list(state["pending"]), state["buffer"].clone()
        self._rows = self._shard = None

    def _fill(self) -> None:
        missing = self.buffer_size - len(self.buffer)
        length = self.length - (self.begin is not None)
        while len(self.pending) < missing * length and self._read():
            pass
        n = min(missing, len(self.pending) // length)
        ids = np.array(self.pending[: n * length], dtype=np.int32).reshape(n, length)
        self.pending = self.pending[n * length :]
        self.buffer = torch.cat([self.buffer, torch.from_numpy(begun(ids, self.begin))])

    def _read(self) -> bool:
        """Read some documents, or go on to the next shard or epoch; False where there are no more."""
        if self.epochs is not None and self.epoch >= self.epochs:
            return False
        shard, rows = self._open()
        documents = list(islice(rows, DOCUMENTS_AT_ONCE))
        if documents:
            encoded = self.encode([document[self.column] for document in documents])
            self.n_in_epoch += sum(map(len, encoded))
            self.pending.extend(i for document in encoded for i in document)
            self.shard_state = shard.state_dict()
            return True
        self._rows, self._shard, self.shard_state = None, None, None
        self.shard_index += 1
        if self.shard_index == self.documents.num_shards:
            if self.n_in_epoch == 0:
                raise RunError("the stream of training data has no tokens")
            self.shard_index, self.n_in_epoch, self.epoch = 0, 0, self.epoch + 1
        return True

    def _open(self) -> tuple[datasets.IterableDataset, Iterator[dict[str, Any]]]:
        if self._shard is None or self._rows is None:
            n = self.documents.num_shards
            order = permutation(n, self.stream, self.seed, "shards", self.epoch)
            self._shard = self.documents.shard(n, int(order[self.shard_index]))
            if self.shard_state is not None:
                self._shard.load_state_dict(self.shard_state)
            self._rows = iter(self._shard)
        return self._shard, self._rows
