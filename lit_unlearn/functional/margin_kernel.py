"""A Triton kernel that finds each row's largest logit without writing any. Imported only where it is asked for."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows, vocabulary entries and elements of a state that a program multiplies at once.
BLOCK_ROWS, BLOCK_ENTRIES, BLOCK_ELEMENTS = 64, 128, 64
PARTS = 64
"""Parts of the vocabulary, each searched by programs of its own: a pass has too few rows to keep a GPU busy."""


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    values,
    indices,
    rows,
    vocabulary,
    width,
    entries_per_part,
    HAS_BIAS: tl.constexpr,
    WIDENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    first = part * entries_per_part
    best = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(first, tl.minimum(first + entries_per_part, vocabulary), BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        logits = tl.zeros((BLOCK_ROWS, BLOCK_ENTRIES), tl.float32)
        for offset in range(0, width, BLOCK_ELEMENTS):
            element = offset + tl.arange(0, BLOCK_ELEMENTS)
            in_width = element < width
            # 64 bits: a large head has more elements than 32 can count.
            states = tl.load(
                hidden + row.to(tl.int64)[:, None] * width + element[None, :],
                mask=(row < rows)[:, None] & in_width[None, :],
                other=0.0,
            )
            weights = tl.load(
                weight + entry.to(tl.int64)[None, :] * width + element[:, None],
                mask=(entry < vocabulary)[None, :] & in_width[:, None],
                other=0.0,
            )
            if WIDENS:
                states, weights = states.to(tl.float32), weights.to(tl.float32)
            # Not TF32, which has the digits of float16.
            logits = tl.dot(states, weights, logits, input_precision="ieee")
        if HAS_BIAS:
            logits += tl.load(bias + entry, mask=entry < vocabulary, other=0.0).to(tl.float32)[None, :]
        logits = tl.where((entry < tl.minimum(first + entries_per_part, vocabulary))[None, :], logits, float("-inf"))
        top = tl.max(logits, axis=1)
        column = tl.argmax(logits, axis=1)
        # Strictly, so that the first of equal maxima stays.
        better = top > best
        best = tl.where(better, top, best)
        index = tl.where(better, start + column, index)
    place = part * rows + row
    tl.store(values + place, best, mask=row < rows)
    tl.store(indices + place, index, mask=row < rows)


def find_largest(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the index of the largest entry of each row of ``hidden @ weight.T + bias``, the first on ties.

    Sums are float32. What they round to in the operands' dtype is never compared, so that in half precision the index can
    differ from that of written logits, of which more are equal.

    Args:
        hidden: Shape ``(N, D)``, float32, float16 or bfloat16.
        weight: Shape ``(V, D)``, of the same dtype.
        bias: Shape ``(V,)``, or ``None``.

    Returns:
        Shape ``(N,)``, int64.
    """
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    parts = max(1, min(PARTS, triton.cdiv(vocabulary, BLOCK_ENTRIES)))
    values = hidden.new_empty(parts, rows, dtype=torch.float32)
    indices = hidden.new_empty(parts, rows, dtype=torch.int32)
    if rows == 0:
        return indices[0].long()
    grid: Any = (triton.cdiv(rows, BLOCK_ROWS), parts)
    _search[grid](
        hidden,
        weight,
        weight if bias is None else bias,
        values,
        indices,
        rows,
        vocabulary,
        width,
        triton.cdiv(vocabulary, parts),
        HAS_BIAS=bias is not None,
        # The interpreter multiplies the bits of bfloat16 as if they were whole numbers. The sums are the same.
        WIDENS=triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
        BLOCK_ELEMENTS=BLOCK_ELEMENTS,
    )
    # A reduction may give any of several equal maxima.
    is_best = values == values.amax(dim=0)
    return indices.masked_fill(~is_best, torch.iinfo(torch.int32).max).amin(dim=0).clamp_max(vocabulary - 1).long()
