from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_unlearn.data.example import IGNORED
from lit_unlearn.models.packing import ROW_LENGTH, divide_evenly, pack


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
    assert sum(lengths) / packed["input_ids"].numel() > 0.95
    assert sum(lengths) / (32 * max(lengths)) == pytest.approx(0.64, abs=0.08)  # what padding would make of it
