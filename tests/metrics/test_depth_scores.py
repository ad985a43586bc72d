"""The Unlearning Depth Score of arrays, against its definition in plain Python and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics import mean_unlearning_depth, unlearning_depth

drops = st.integers(-300, 300).map(lambda hundredths: hundredths / 100)  # with 0, and exactly the threshold
layers = st.lists(st.tuples(drops, drops), min_size=3, max_size=3)


def depth_slowly(pairs: list[tuple[float, float]], threshold: float) -> float:
    """One example, as the paper writes it."""
    weighted, total = 0.0, 0.0
    for retain, unlearned in pairs:
        if retain > threshold:
            weighted += retain * min(max(unlearned / retain, 0.0), 1.0)
            total += retain
    return weighted / total if total else math.nan


@given(st.lists(layers, min_size=1, max_size=4), st.sampled_from([0.0, 0.05, 1.0]))
def test_depth_equals_the_definition(examples, threshold):
    array = np.array(examples)
    expected = [depth_slowly(pairs, threshold) for pairs in examples]
    scores = unlearning_depth(array[:, :, 0], torch.tensor(array[:, :, 1]), threshold)
    assert scores.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)
    with_knowledge = [score for score in expected if not math.isnan(score)]
    if with_knowledge:
        mean = mean_unlearning_depth(array[:, :, 0], array[:, :, 1], threshold)
        assert mean == pytest.approx(sum(with_knowledge) / len(with_knowledge), rel=1e-12)


@given(st.lists(st.lists(drops, min_size=2, max_size=2), min_size=1, max_size=4))
def test_nothing_and_everything_erased(retain_drop):
    scores = unlearning_depth(retain_drop, np.zeros_like(retain_drop))
    has_knowledge = (np.array(retain_drop) > 0.05).any(axis=1)
    assert scores[has_knowledge].tolist() == [0.0] * has_knowledge.sum()
    # Exactly 1, and no NaN from 0 / 0.
    assert unlearning_depth(retain_drop, retain_drop)[has_knowledge].tolist() == [1.0] * has_knowledge.sum()
    assert np.isnan(scores[~has_knowledge]).all()


def test_a_layer_at_the_threshold_holds_nothing():
    assert np.isnan(unlearning_depth([[0.05]], [[0.05]])).all()
    # Without the second layer the score would be 0.5.
    assert unlearning_depth([[1.0, 0.05]], [[0.5, 0.05]]).tolist() == [0.5]
    assert unlearning_depth([[1.0, 0.05]], [[0.5, 0.05]], threshold=0.0).tolist() == [pytest.approx(0.55 / 1.05)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0, 2.0]], [[1.0]]), DataError, r"`retain_drop` and `unlearned_drop` .*\(1, 2\) and \(1, 1\)"),
        (([1.0], [1.0]), DataError, "`retain_drop` must have shape"),
        (([[1.0]], [[math.nan]]), DataError, "`unlearned_drop` must be finite, but number 0, 0 is nan"),
        (([[1.0]], [[1.0]], -0.1), ConfigError, "`threshold` must be at least 0, not -0.1"),
        (([[1.0]], [[1.0]], math.nan), ConfigError, "`threshold`"),
    ],
)
def test_refusals(arguments, error, message):
    for function in (unlearning_depth, mean_unlearning_depth):
        with pytest.raises(error, match=message):
            function(*arguments)


def test_a_target_without_knowledge_has_no_mean():
    with pytest.raises(DataError, match=r"no layer of any of the 2 examples .*`threshold` \(0.05\)"):
        mean_unlearning_depth([[0.0], [0.01]], [[1.0], [1.0]])
