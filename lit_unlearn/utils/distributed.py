"""The processes of a run, for values that are not tensors."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

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
