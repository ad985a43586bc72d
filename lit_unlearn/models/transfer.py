"""Sending a batch to the device, together with what transformers would otherwise read back from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

_Find = Callable[[Tensor], Tensor | None]

_FUNCTION = "find_packed_sequence_indices"  # of transformers.masking_utils
_packed_sequences: ContextVar[Tensor | None] = ContextVar("packed_sequences")


def send(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the copy."""
    # Only from pinned memory does a copy run beside the computation.
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def drop_full_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without its attention mask if that hides nothing, which transformers would look up on the device.

    Args:
        batch: On the CPU.
    """
    kept = dict(batch)
    # Beside positions, the absence of a mask would mean that sequences are packed.
    if "attention_mask" in batch and "position_ids" not in batch and bool(batch["attention_mask"].all()):
        del kept["attention_mask"]
    return kept


@contextmanager
def known_packing(batch: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """Tell transformers within the block which tokens of a batch are of one packed sequence.

    Without an attention mask, it finds that out from the values of the positions, at every pass, on the device. Here its own
    function answers on the CPU. A version of transformers without that function is left alone.

    Args:
        batch: On the CPU.
        device: The model's.
    """
    from transformers import masking_utils

    find: _Find | None = getattr(masking_utils, _FUNCTION, None)
    # Where there is a mask, transformers does not ask.
    if find is None or "attention_mask" in batch or "segments" in batch:
        yield
        return
    sequences = None
    if "position_ids" in batch:
        sequences = find(batch["position_ids"])
    token = _packed_sequences.set(None if sequences is None else send(sequences, device))
    setattr(masking_utils, _FUNCTION, _answer_for(find))
    try:
        yield
    finally:
        setattr(masking_utils, _FUNCTION, find)
        _packed_sequences.reset(token)


# The same function at every pass: a compiled trunk would be compiled anew for another one.
@cache
def _answer_for(find: _Find) -> _Find:
    def answer(position_ids: Tensor) -> Tensor | None:
        # While it is compiled, transformers reads no values.
        return find(position_ids) if torch.compiler.is_compiling() else _packed_sequences.get()

    return answer
