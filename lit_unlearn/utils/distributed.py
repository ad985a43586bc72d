"""The processes of a run, for values that are not tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Value = TypeVar("Value")


def rank_and_world_size() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_objects(value: Value) -> list[Value]:
    """Return the value of every process, in their order; a collective call."""
    world_size = rank_and_world_size()[1]
    gathered: list[Any] = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process of a run has ended, or cannot be reached within the time limit."""
    # Gloo has no class for it; its messages begin with the file of its source.
    is_of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return isinstance(error, dist.DistError) or is_of_gloo


def measure_shares(
    items: Sequence[Item], measure: Callable[[Sequence[Item]], Sequence[Value]], is_sharded: bool = False
) -> list[Value]:
    """Measure every item on exactly one process, and return all values in the order of the items; a collective call.

    Args:
        items: The same ones on every process.
        measure: Returns a value for each item of a process's share, which may be empty.
        is_sharded: Whether a sharded model measures: its processes must make the same passes, so that each of them measures all
            items, and the values of the first one count.
    """
    rank, world_size = rank_and_world_size()
    if is_sharded:
        return gather_objects(list(measure(items)))[0]
    share = list(measure(items[rank::world_size]))
    values: list[Any] = [None] * len(items)
    for process, of_process in enumerate(gather_objects(share)):
        # The stride that divided the items puts their values back.
        values[process::world_size] = of_process
    return values
