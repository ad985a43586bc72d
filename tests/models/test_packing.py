from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_unlearn.data.example import IGNORED
from lit_unlearn.models.packed_attention import segment_mask
from lit_unlearn.models.packing import (
    ROW_LENGTH,
    SHORTEST_PREFIX,
    count_shared_tokens,
    divide_evenly,
    pack,
)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=40), st.integers(1, 8))
def test_shares_have_every_sequence_once_and_about_as_many_tokens(lengths: list[int], parts: int) -> None:
    shares = divide_evenly(lengths, parts)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert len(shares) == parts
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)  # moving one sequence could not help
    assert all(shares) or len(lengths) < parts


def sequences(lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.arange(1, n + 1) + 1000 * i, "labels": torch.full((n,), i), "mark": torch.full((n,), i)}
        for i, n in enumerate(lengths)
    ]


def test_packed_by_hand() -> None:
    packed = pack(sequences([2, 3, 1]))
    assert packed["input_ids"].tolist() == [[1, 2, 1001, 1002, 1003, 2001]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]
    assert packed["labels"].tolist() == packed["mark"].tolist() == [[0, 0, 1, 1, 1, 2]]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=12))
def test_rows_are_bounded_and_hold_every_sequence_with_its_positions(lengths: list[int]) -> None:
    packed = pack(sequences(lengths))
    rows, width = packed["input_ids"].shape
    # nearly equal: a row is fuller than the average by less than one sequence
    assert width <= max(*lengths, 0, sum(lengths) / rows + max(lengths))
    assert width <= ROW_LENGTH + max(lengths)
    assert int(packed["position_ids"].max()) < max(lengths)  # also in the tails: positions are what a model has
    found = {}
    for ids, positions, labels in zip(*(packed[k] for k in ("input_ids", "position_ids", "labels")), strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), width]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            if ids[start] == 0:
                assert (labels[start:end] == IGNORED).all()
            else:
                found[int(labels[start])] = ids[start:end].tolist()
    assert found == {i: (torch.arange(1, n + 1) + 1000 * i).tolist() for i, n in enumerate(lengths)}


def test_little_is_wasted_on_rows_like_tofus() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(30, 110, (32,), generator=generator).tolist()
    packed = pack(sequences(lengths))
    assert sum(lengths) / packed["input_ids"].numel() > 0.9
    assert sum(lengths) / (32 * max(lengths)) == pytest.approx(0.64, abs=0.08)  # what padding would make of it


# Shared first tokens --------------------------------------------------------------------------------------------------

PREFIX = list(range(900, 900 + SHORTEST_PREFIX))


def answer(*rest: int, prompt: int = 1, prefix: list[int] = PREFIX) -> dict[str, torch.Tensor]:
    """A sequence whose prompt is the prefix and the first tokens of the rest."""
    ids = [*prefix, *rest]
    without = len(prefix) + prompt
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORED] * without + ids[without:])}


def test_shared_tokens_are_those_that_all_begin_with() -> None:
    assert count_shared_tokens([answer(1, 2), answer(3, 4, 5)]) == SHORTEST_PREFIX
    assert count_shared_tokens([answer(1, 2, 3, prompt=2), answer(1, 4, 5, prompt=2)]) == SHORTEST_PREFIX + 1
    assert count_shared_tokens([answer(1, 2), answer(3, 4), answer(1, 2, prefix=[*PREFIX[1:], 1])]) == 0


def test_what_predicts_a_label_is_not_shared() -> None:
    # All that differs is supervised: the last token before it is each sequence's own.
    assert count_shared_tokens([answer(1, 2), answer(1, 3)]) == SHORTEST_PREFIX
    assert count_shared_tokens([answer(2, prompt=0, prefix=PREFIX[1:])] * 2) == 0


def test_sequences_without_labels_keep_a_token() -> None:
    assert count_shared_tokens([answer(prompt=0, prefix=[*PREFIX, 1])] * 2) == SHORTEST_PREFIX


def test_shared_tokens_stand_once_in_a_row() -> None:
    packed = pack([answer(1, 2), answer(3, 4, 5)], shared=SHORTEST_PREFIX)
    n = SHORTEST_PREFIX
    assert packed["input_ids"].tolist() == [[*PREFIX, 1, 2, 3, 4, 5]]
    assert packed["labels"].tolist() == [[*[IGNORED] * (n + 1), 2, IGNORED, 4, 5]]
    assert packed["position_ids"].tolist() == [[*range(n), n, n + 1, n, n + 1, n + 2]]
    assert packed["segments"].tolist() == [[*[0] * n, 1, 1, 2, 2, 2]]


def test_a_token_sees_the_shared_ones_and_its_own() -> None:
    # Two shared tokens, sequences of two and one, and a tail, which nothing sees.
    (mask,) = segment_mask(torch.tensor([[0, 0, 1, 1, 2, 0]]))[:, 0].int()
    assert mask.tolist()[:5] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]
