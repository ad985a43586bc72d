"""Weights as a whole: whether they have changed, and what they are once they are rounded for an export."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_unlearn.utils.distributed import gather_objects

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# A sum in 64 bits converts what it reads: in parts, that takes no second copy of an embedding.
_NUMBERS_PER_PART = 2**24


@torch.no_grad()
def checksum(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """Return a number in hexadecimal that is another one once a step has changed the weights.

    Of every tensor, the bytes are read as integers and added, in 64 bits. That is exact, so that the same weights give the same
    checksum on any device, and sharded or not; and it reads the weights once, where a digest of the bytes takes as long as
    reading them from a disk. It is no protection against somebody who wants the same checksum for other weights.

    Args:
        tensors: Names and tensors; a collective call if some are sharded.
        dtype: Compare the values in this dtype, whatever the dtype of the tensors; ``None`` to compare bytes.
    """
    names: list[str] = []
    totals: list[int] = []
    is_sharded: list[bool] = []
    for name, tensor in tensors:
        names.append(f"{name} {tuple(tensor.shape)}")
        is_sharded.append(isinstance(tensor, DTensor))
        totals.append(_add_bytes(local_part(tensor).detach(), dtype))

    if any(is_sharded):
        # Every process has a part of a sharded tensor, and all of the others.
        of_processes = gather_objects(totals)
        for i, sharded in enumerate(is_sharded):
            if sharded:
                totals[i] = sum(of_process[i] for of_process in of_processes)
    lines = [f"{name} {total % 2**64}" for name, total in zip(names, totals, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _add_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    total = 0
    for part in tensor.contiguous().flatten().split(_NUMBERS_PER_PART):
        if dtype is not None and part.is_floating_point():
            # float32 holds the values of every narrower dtype, so that these can be compared with it.
            part = part.to(dtype).float()
        total += int(part.view(_INTEGERS[part.element_size()]).sum(dtype=torch.int64))
    return total


def changes_values(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Return whether weights lose digits when they are converted to ``dtype``."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return any(torch.promote_types(given, dtype) != dtype for given in dtypes)


class TemporaryValues:
    """Other values for tensors, put in place and taken out again, bit for bit.

    Args:
        tensors: The tensors that are written to.
        values: The values; ``None`` for those of the tensors, rounded to ``dtype``.
        dtype: The dtype to round to.
    """

    def __init__(self, tensors: list[Tensor], values: list[Tensor] | None, dtype: torch.dtype) -> None:
        self._tensors = [local_part(tensor) for tensor in tensors]
        self._values = values
        self._dtype = dtype
        self._originals: list[Tensor] = []

    @torch.no_grad()
    def put_in(self) -> None:
        """Write the values into the tensors."""
        self._originals = [tensor.clone() for tensor in self._tensors]
        for i, tensor in enumerate(self._tensors):
            value = tensor if self._values is None else self._values[i]
            tensor.copy_(value.to(self._dtype))
        # Autocast keeps casts of weights, and would not see that these changed.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def take_out(self) -> None:
        """Write the originals into the tensors."""
        for tensor, original in zip(self._tensors, self._originals, strict=True):
            tensor.copy_(original)
        self._originals = []
        torch.clear_autocast_cache()

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Put the originals in place within the block."""
        self.take_out()
        try:
            yield
        finally:
            self.put_in()


@contextmanager
def shifted(tensors: Sequence[Tensor], directions: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Add ``factor · direction`` to tensors within the block; afterwards they are what they were, bit for bit.

    Args:
        tensors: Parameters, sharded or not.
        directions: One for each, of the same shape and sharding.
        factor: With 0, nothing is changed or copied, whatever the directions are.
    """
    if factor == 0:
        yield
        return
    with torch.no_grad():
        parts = [local_part(tensor) for tensor in tensors]
        # Subtracting again would leave the rounding of both steps in the weights.
        originals = [part.clone() for part in parts]
        for i, part in enumerate(parts):
            part.add_(local_part(directions[i]), alpha=factor)
    # Gradients, perhaps, whose memory is needed now.
    del directions
    # Autocast keeps casts of weights, and would not see that these changed.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            for part, original in zip(parts, originals, strict=True):
                part.copy_(original)
        torch.clear_autocast_cache()


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def convert(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a state on the CPU with its floating-point tensors in ``dtype``; tensors that share memory still do."""
    converted: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        # By its memory: tied weights are one tensor under two names, and must be written once.
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in converted:
            converted[key] = tensor.detach().to("cpu", dtype)
        result[name] = converted[key]
    return result
