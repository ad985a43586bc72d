"""The processes of a run, for what is not a tensor."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather_objects(mine: Value) -> list[Value]:
    """What every process has, in their order; a collective call."""
    world_size = rank_and_world_size()[1]
    gathered: list[Any] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(gathered, mine)
    return gathered
