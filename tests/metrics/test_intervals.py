"""Confidence intervals: against binomial tails, known quantiles, and their coverage in a simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics import intervals
from lit_unlearn.metrics.intervals import auc_interval, difference_interval, mean_interval, share_interval


@pytest.mark.parametrize(("rows", "quantile"), [(6, 2.571), (10, 2.262), (40, 2.023), (1000, 1.962)])
def test_the_tail_is_that_of_students_t(rows: int, quantile: float) -> None:
    tail = intervals._expanded_tail(rows, 0.95)
    assert -NormalDist().inv_cdf(tail) == pytest.approx(quantile * math.sqrt(rows / (rows - 1)), rel=0.01)


def test_of_many_rows_it_is_the_interval_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    value, low, high = mean_interval(values)
    width = 1.96 * values.std() / math.sqrt(len(values))
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - width, value + width), abs=0.15 * width)


@pytest.mark.parametrize("shape", [(0.5, 2.0), (2.0, 2.0)], ids=["skewed", "even"])
def test_the_mean_is_covered(shape: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    draws, mean, covered = np.random.default_rng(1), shape[0] / sum(shape), 0
    for seed in range(200):
        _, low, high = mean_interval(draws.beta(*shape, 40), seed=seed)
        covered += low <= mean <= high
    # 95 % of 200, less three standard deviations of the simulation; skewed values are covered a little less often.
    assert covered >= 179


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.linspace(0.1, 0.9, 30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert mean_interval(values, confidence=0.5).high < mean_interval(values).high
    assert mean_interval([0.3]) == (0.3, 0.3, 0.3)


def test_a_difference_is_wider_than_each_of_its_means() -> None:
    draws = np.random.default_rng(2)
    first, second = draws.uniform(0.5, 1.0, 50), draws.uniform(0.0, 0.5, 30)
    value, low, high = difference_interval(first, second)
    assert value == pytest.approx(first.mean() - second.mean())
    assert low < value < high
    alone = mean_interval(second)
    assert high - low > alone.high - alone.low


def test_an_area_has_an_interval_that_shrinks_with_the_rows() -> None:
    draws = np.random.default_rng(3)
    widths = []
    for rows in (20, 400):
        value, low, high = auc_interval(draws.normal(0.5, 1, rows), draws.normal(0, 1, rows))
        assert 0 <= low < value < high <= 1
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


@pytest.mark.parametrize(("hits", "rows"), [(0, 40), (1, 40), (17, 40), (39, 40), (40, 40)])
def test_a_share_has_equal_binomial_tails(hits: int, rows: int) -> None:
    value, low, high = share_interval([1.0] * hits + [0.0] * (rows - hits))

    def tail(p: float, counts: range) -> float:
        return math.fsum(math.comb(rows, count) * p**count * (1 - p) ** (rows - count) for count in counts)

    assert value == hits / rows
    # One draw short of certainty, the bound over questions of different probabilities is 1.
    if hits < rows - 1:
        assert tail(high, range(hits + 1)) == pytest.approx(0.025)
    else:
        assert high == 1
    if hits > 1:
        assert tail(low, range(hits, rows + 1)) == pytest.approx(0.025)
    else:
        assert low == 0


def test_bad_values_are_refused() -> None:
    with pytest.raises(DataError, match="values"):
        mean_interval([0.1, math.nan])
    with pytest.raises(DataError):
        share_interval([0.5])
    with pytest.raises(ConfigError, match="confidence"):
        mean_interval([0.1, 0.2], confidence=1.0)
