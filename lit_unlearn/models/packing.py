"""Packing: several sequences in one row, told apart by positions that restart at 0, so that no work goes into padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_unlearn.data.example import IGNORED

ROW_LENGTH = 512
"""Tokens of a packed row, unless one sequence is longer: the mask and the work of attention grow with its square.

Lengths chosen from the sequences, by the work that is expected, were no faster (docs/speed.md).
"""

SHORTEST_PREFIX = 8
"""Common first tokens that are shared; fewer are not worth a mask."""


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


def count_shared_tokens(sequences: Sequence[Mapping[str, Tensor]]) -> int:
    """Return how many tokens at their beginning all sequences have in common, such as a system message; 0 if hardly any.

    The tokens that sequences have for themselves begin with one without a label: what predicts a label is never shared.

    Args:
        sequences: As for `pack`, on the CPU.
    """
    first = sequences[0]["input_ids"]
    count = len(first)
    for sequence in sequences:
        ids, labels = sequence["input_ids"], sequence["labels"]
        supervised = (labels != IGNORED).nonzero()
        count = min(count, int(supervised[0]) - 1 if len(supervised) else len(ids) - 1)
        different = (ids[: max(count, 0)] != first[: max(count, 0)]).nonzero()
        if len(different):
            count = int(different[0])
    return count if count >= SHORTEST_PREFIX else 0


def pack(sequences: Sequence[Mapping[str, Tensor]], shared: int = 0) -> dict[str, Tensor]:
    """Put sequences one after the other into rows of nearly equal length.

    Args:
        sequences: Each with ``input_ids``, ``labels`` and any further value per token, shape ``(length,)``.
        shared: Number of their first tokens, from `count_shared_tokens`, that stand only once in each row: they are the same
            in every sequence, and so is what a causal model makes of them.

    Returns:
        The same keys and ``position_ids``, shape ``(R, L)``. The tail of a row counts as further sequences, of zeros
        without labels. With ``shared`` tokens also ``segments``: 0 for these, else the number of the sequence in its row.
    """
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    own_lengths = [length - shared for length in lengths]
    # The rows depend on nothing but the lengths, so that a resumed run makes the same ones.
    number = -(-sum(own_lengths) // max(ROW_LENGTH - shared, *own_lengths))
    rows = divide_evenly(own_lengths, number)
    packed_rows, row_positions = [], []
    for row in rows:
        parts, positions = [], []
        if shared:
            prefix = _cut(sequences[row[0]], slice(shared))
            parts.append({**prefix, "segments": torch.zeros_like(prefix["input_ids"])})
            positions.append(torch.arange(shared))
        for number, i in enumerate(row, start=1):
            rest = _cut(sequences[i], slice(shared, None))
            if shared:
                rest["segments"] = torch.full_like(rest["input_ids"], number)
            parts.append(rest)
            positions.append(torch.arange(shared, lengths[i]))
        packed_rows.append(_concatenate(parts))
        row_positions.append(torch.cat(positions))
    packed = _stack(packed_rows)

    width = packed["input_ids"].shape[1]
    all_positions = []
    for position in row_positions:
        # Positions of the tail restart before they exceed what the model has learned.
        tail = torch.arange(width - len(position)) % max(lengths)
        all_positions.append(torch.cat([position, tail]))
    return {**packed, "position_ids": torch.stack(all_positions).to(packed["input_ids"].device)}


def pack_or_pad(
    sequences: Sequence[Mapping[str, Tensor]], packs: bool, shares_prefix: bool = False
) -> dict[str, Tensor]:
    """Put sequences into a batch, without padding where the model allows it and lengths differ.

    Args:
        sequences: As for `pack`.
        packs: Whether the model separates packed sequences.
        shares_prefix: Whether it lets them share their first tokens.
    """
    shared = count_shared_tokens(sequences) if packs and shares_prefix and len(sequences) > 1 else 0
    equal = len({len(sequence["input_ids"]) for sequence in sequences}) == 1
    return pack(sequences, shared) if shared or (packs and not equal) else pad(sequences)


def pad(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put every sequence into a row of its own, for models that let packed ones see each other.

    Args:
        sequences: As for `pack`.

    Returns:
        The same keys and ``attention_mask``, shape ``(B, T)``.
    """
    masked = [{**sequence, "attention_mask": torch.ones_like(sequence["input_ids"])} for sequence in sequences]
    return _stack(masked)


def _cut(sequence: Mapping[str, Tensor], extent: slice) -> dict[str, Tensor]:
    return {key: values[extent] for key, values in sequence.items()}


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
