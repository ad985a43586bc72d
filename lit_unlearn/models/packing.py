"""Packing: several sequences in one row, told apart by positions that restart at 0, so that no work goes into padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_unlearn.data.example import IGNORED
from lit_unlearn.models.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROW_LENGTH = 512
"""Tokens of a packed row, unless one sequence is longer: the mask and the work of attention grow with its square."""


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Return whether the rows of a batch hold several sequences each."""
    return "position_ids" in batch and "attention_mask" not in batch


def separates_packed_sequences(model: PreTrainedModel) -> bool:
    """Return whether no sequence sees the one before it in its row. Where it does, losses would be silently wrong.

    transformers separates packed sequences where the model hands the positions on to the mask; not every model does.

    Args:
        model: Any causal LM; its trunk runs once on two short rows, without dropout.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    # The second half of both rows is the same sequence, and follows different ones.
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 1, 2, 3, 4]], device=embeddings.device)
    positions = torch.arange(4, device=rows.device).repeat(2, 2)
    with evaluation_mode(model):
        output = model.base_model(input_ids=rows % embeddings.shape[0], position_ids=positions, use_cache=False)[0]

    first, second = output[:, 4:].float()
    # Measured at random weights: exactly 0 where they are kept apart, 0.2 for OPT and GPT-OSS, 0.006 for BLOOM.
    tolerance = max(1e-4, 2 * torch.finfo(output.dtype).eps)
    return bool((first - second).norm() <= tolerance * first.norm())


def divide_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Divide sequences into parts with about as many tokens each.

    Args:
        lengths: Tokens of each sequence.
        parts: Number of parts, at least 1.

    Returns:
        The indices of each part's sequences, ascending; none is empty where there are enough sequences.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    # The longest first, each to the part with the fewest tokens: a simple and good rule for this scheduling problem.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = min(range(parts), key=lambda part: (tokens[part], len(shares[part])))
        shares[least].append(i)
        tokens[least] += lengths[i]
    return [sorted(share) for share in shares]


def pack(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put sequences one after the other into rows of bounded and nearly equal length.

    Args:
        sequences: Each with ``input_ids``, ``labels`` and any further value per token, shape ``(length,)``.

    Returns:
        The same keys and ``position_ids``, shape ``(R, L)``. The tail of a row counts as further sequences, of zeros
        without labels.
    """
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    num_rows = -(-sum(lengths) // max(ROW_LENGTH, *lengths))
    rows = divide_evenly(lengths, num_rows)
    packed_rows, row_positions = [], []
    for row in rows:
        in_row = [sequences[i] for i in row]
        packed_rows.append(_concatenate(in_row))
        row_positions.append(torch.cat([torch.arange(lengths[i]) for i in row]))
    packed = _stack(packed_rows)

    width = packed["input_ids"].shape[1]
    positions = []
    for position in row_positions:
        # Positions of the tail restart before they exceed what the model has learned.
        tail = torch.arange(width - len(position)) % max(lengths)
        positions.append(torch.cat([position, tail]))
    return {**packed, "position_ids": torch.stack(positions).to(packed["input_ids"].device)}


def pack_or_pad(sequences: Sequence[Mapping[str, Tensor]], packs: bool) -> dict[str, Tensor]:
    """Put sequences into a batch, without padding where the model allows it and lengths differ.

    Args:
        sequences: As for `pack`.
        packs: Whether the model separates packed sequences.
    """
    equal = len({len(sequence["input_ids"]) for sequence in sequences}) == 1
    return pack(sequences) if packs and not equal else pad(sequences)


def pad(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put every sequence into a row of its own, for models that let packed ones see each other.

    Args:
        sequences: As for `pack`.

    Returns:
        The same keys and ``attention_mask``, shape ``(B, T)``.
    """
    masked = [{**sequence, "attention_mask": torch.ones_like(sequence["input_ids"])} for sequence in sequences]
    return _stack(masked)


def _concatenate(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    joined = {}
    for key in sequences[0]:
        joined[key] = torch.cat([sequence[key] for sequence in sequences])
    return joined


def _stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for key in rows[0]:
        fill = IGNORED if key == "labels" else 0
        stacked[key] = pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)
    return stacked
