"""Resumable batches: batch k is a pure function of (seed, k, rank, number of processes)."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lit_unlearn.data.encoding import Example, collate


class BatchStream:
    """Endless batches of one set of rows: pass follows pass, each in its own random order, with no short batch.

    Its whole state is `cursor`, the number of batches handed out. Deliberately no ``DataLoader`` subclass: Lightning
    then injects no sampler, and resuming is exact at any point with any number of workers. The processes' batches are
    disjoint parts of one global batch, which does not depend on how many processes there are. Where the parts cannot be
    equal, the shorter ones end with a row without supervised tokens, which weighs nothing: every process has the same
    number of rows to pass through the model, as sharded strategies need it.

    Args:
        rows: Tokenised rows, at least one.
        pad_id: Fills the tails of shorter rows.
        batch_size: Rows per batch, over all processes.
        name: Distinguishes the order of one stream from another's.
        seed: Of the shuffling; ``None`` for the order of ``rows``.
        rank: This process.
        world_size: Number of processes.
        num_workers: Processes that collate; 0 for this one.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        pad_id: int,
        batch_size: int,
        *,
        name: str,
        seed: int | None = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.cursor = 0
        self._rows, self._pad_id, self._batch_size = rows, pad_id, batch_size
        self._key = None if seed is None else f"{seed}/{name}"
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Goes on from the cursor."""
        loader = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=self._numbers(),
            num_workers=self._num_workers,
            multiprocessing_context=_context() if self._num_workers else None,
            generator=torch.Generator(),  # its own, so that the global one is not advanced
        )
        for batch in loader:
            self.cursor += 1
            yield batch

    def _numbers(self) -> Iterable[int]:
        return count(self.cursor)

    def _global_indices(self, number: int) -> Sequence[int]:
        size = len(self._rows)
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        return [self._order(place // size)[place % size] for place in places]

    def row_indices(self, number: int) -> list[int]:
        """Which rows are in batch ``number`` of this process; none if the others took the last ones."""
        return list(self._global_indices(number)[self._rank :: self._world_size])

    def batch(self, number: int) -> dict[str, Any]:
        """Batch ``number`` of this process, padded, with as many rows as every other process has."""
        rows = [self._rows[i] for i in self.row_indices(number)]
        filler = self._rows[0].without_labels()
        most = -(-len(self._global_indices(number)) // self._world_size)
        return collate([*rows, *[filler] * (most - len(rows))], self._pad_id)

    def _order(self, epoch: int) -> Sequence[int]:
        size = len(self._rows)
        return range(size) if self._key is None else _permutation(size, f"{self._key}/{epoch}")


class FiniteStream(BatchStream):
    """Batches of one pass over the rows per ``iter``; the last one may be short, and no row counts twice."""

    def __len__(self) -> int:
        """Batches per pass."""
        return -(-len(self._rows) // self._batch_size)

    def _numbers(self) -> Iterable[int]:
        return range(self.cursor, (self.cursor // len(self) + 1) * len(self))

    def _global_indices(self, number: int) -> Sequence[int]:
        epoch, batch = divmod(number, len(self))
        return self._order(epoch)[batch * self._batch_size : (batch + 1) * self._batch_size]


def _context() -> BaseContext:
    """Starts workers from a process without threads.

    A fork of the training process, which torch would make, has been seen to hang: what held a lock in another thread
    (autograd's, Gloo's) never lets go of it in the child.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([__name__])  # or every worker would import torch anew
    return context


class _Batches(Dataset[dict[str, Any]]):
    """A stream as a map from batch number to batch, which is what ``DataLoader`` workers ask for."""

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._stream.batch(number)


@lru_cache(maxsize=8)
def _permutation(length: int, key: str) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
