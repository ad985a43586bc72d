"""Resumable batches: batch k is a pure function of (seed, k, rank, number of processes)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count

import torch

from lit_unlearn.data.example import Example


class BatchStream:
    """Endless batches of one set of examples: pass follows pass, each in its own random order, with no short batch.

    Its whole state is `cursor`, the number of batches handed out, so that resuming is exact at any point. The processes'
    batches are disjoint parts of one global batch, which does not depend on how many processes there are. Where the parts
    cannot be equal, the shorter ones end with an example without supervised tokens, which has no weight: every process has
    the same number of examples to pass through the model, as sharded strategies need it.

    It is not a ``DataLoader``: Lightning would inject a sampler, and there is no work for its workers, because examples are
    tokenised beforehand and packed by the training step.

    Args:
        examples: At least one.
        batch_size: Examples per batch, over all processes.
        name: Distinguishes the order of one stream from another's.
        seed: Of the shuffling; ``None`` for the order of ``examples``.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        name: str,
        seed: int | None = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cursor = 0
        self._examples, self._batch_size = examples, batch_size
        self._key = None if seed is None else f"{seed}/{name}"
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Example]]:
        """Resume from the cursor."""
        for number in self._batch_numbers():
            # Counted before it is handed over: what the training step has received is not to come again.
            self.cursor += 1
            yield self.batch(number)

    def batch(self, number: int) -> list[Example]:
        """Return batch ``number`` of this process, with as many examples as every other process has."""
        examples = [self._examples[i] for i in self.example_indices(number)]
        filler = self._examples[0].without_labels()
        size = -(-len(self._global_indices(number)) // self._world_size)
        return [*examples, *[filler] * (size - len(examples))]

    def example_indices(self, number: int) -> list[int]:
        """Return which examples are in batch ``number`` of this process; none if the others took the last ones."""
        return list(self._global_indices(number)[self._rank :: self._world_size])

    def _batch_numbers(self) -> Iterable[int]:
        return count(self.cursor)

    def _global_indices(self, number: int) -> Sequence[int]:
        size = len(self._examples)
        positions = range(number * self._batch_size, (number + 1) * self._batch_size)
        return [self._order_of_pass(position // size)[position % size] for position in positions]

    def _order_of_pass(self, number: int) -> Sequence[int]:
        size = len(self._examples)
        return range(size) if self._key is None else _permutation(size, f"{self._key}/{number}")


class FiniteStream(BatchStream):
    """Batches of one pass over the examples per ``iter``; the last one may be short, and no example counts twice."""

    def __len__(self) -> int:
        """Return the number of batches per pass."""
        return -(-len(self._examples) // self._batch_size)

    def _batch_numbers(self) -> Iterable[int]:
        return range(self.cursor, (self.cursor // len(self) + 1) * len(self))

    def _global_indices(self, number: int) -> Sequence[int]:
        epoch, batch = divmod(number, len(self))
        return self._order_of_pass(epoch)[batch * self._batch_size : (batch + 1) * self._batch_size]


@lru_cache(maxsize=8)
def _permutation(length: int, key: str) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
