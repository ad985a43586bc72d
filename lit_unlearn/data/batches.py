"""Batches of examples of which some hide tokens, as ``mask_padding_ids`` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_unlearn.data.example import Example
from lit_unlearn.models.packing import pack_or_pad, pad

VISIBLE = "visible"
"""Key of the tokens' entries in the attention mask, while sequences have no padding yet."""


def to_sequence(example: Example, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return an example's tensors, shape ``(T,)``: ``input_ids``, ``labels`` and, if it hides tokens, which are visible."""
    lists = {"input_ids": example.input_ids, "labels": example.labels}
    if example.attention_mask is not None:
        lists[VISIBLE] = example.attention_mask
    return {name: torch.tensor(values, device=device) for name, values in lists.items()}


def pack_visible(
    sequences: Sequence[Mapping[str, Tensor]], packs: bool, shares_prefix: bool = False
) -> dict[str, Tensor]:
    """Put sequences into a batch as `pack_or_pad` does; if some hide tokens, each into a row with its attention mask.

    Packed rows have no attention mask: there, positions say which tokens belong together.

    Args:
        sequences: From `to_sequence`, perhaps with more keys.
        packs: Whether the model separates packed sequences.
        shares_prefix: Whether it lets them share their first tokens.
    """
    if not any(VISIBLE in sequence for sequence in sequences):
        return pack_or_pad(sequences, packs, shares_prefix)
    rows = []
    for sequence in sequences:
        rows.append({VISIBLE: torch.ones_like(sequence["input_ids"]), **sequence})
    batch = pad(rows)
    # Padded with zeros, as the mask is where there is no token.
    batch["attention_mask"] = batch.pop(VISIBLE)
    return batch
