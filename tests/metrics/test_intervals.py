"""Confidence intervals: against binomial tails, known quantiles, and their coverage in a simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics import intervals
from lit_unlearn.metrics.intervals import (
    auc_interval,
    difference_interval,
    mean_interval,
    paired_test,
    seeds_interval,
    share_interval,
)


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


# Over seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228), (101, 1.984)]
)
def test_over_seeds_the_quantile_is_that_of_the_tables(seeds: int, quantile: float) -> None:
    values = np.random.default_rng(seeds).normal(0.5, 0.1, seeds)
    mean, low, high = seeds_interval(values)
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((quantile * values.std(ddof=1) / math.sqrt(seeds),) * 2, rel=1e-3)


def test_three_seeds_cover_their_mean_where_the_bootstrap_does_not() -> None:
    draws = np.random.default_rng(0).normal(0.7, 0.02, (2000, 3))
    covered = 0
    for values in draws:
        _, low, high = seeds_interval(values)
        covered += low <= 0.7 <= high
    # 95 %, within three standard deviations of the simulation.
    assert 0.935 <= covered / 2000 <= 0.965
    within_range = (draws.min(axis=1) <= 0.7) & (draws.max(axis=1) >= 0.7)
    assert within_range.mean() < 0.8


def test_a_single_seed_has_no_interval() -> None:
    assert seeds_interval([0.5]) == (0.5, -math.inf, math.inf)
    with pytest.raises(DataError, match="`values`"):
        seeds_interval([0.5, math.nan])
    with pytest.raises(ConfigError, match="`confidence`"):
        seeds_interval([0.5, 0.6], confidence=95)


def integrate_tails(t: float, degrees: int) -> float:
    """Return P(|T| > t) by the trapezoidal rule over Student's density, in the angle atan(T / √degrees)."""
    angles = np.linspace(math.atan(t / math.sqrt(degrees)), math.pi / 2, 200_001)
    # The density of T times dT / d angle is proportional to this.
    density = np.cos(angles) ** (degrees - 1)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(math.pi) * math.gamma(degrees / 2))
    return float(2 * scale * np.trapezoid(density, angles))


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 8, 21])
def test_the_paired_test_is_that_of_student(seeds: int) -> None:
    draws = np.random.default_rng(seeds)
    first, second = draws.normal(0.5, 0.1, seeds), draws.normal(0.45, 0.1, seeds)
    differences = first - second
    t = abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(seeds))
    assert paired_test(first, second) == pytest.approx(integrate_tails(t, seeds - 1), abs=1e-8)
    assert paired_test(second, first) == paired_test(first, second)


def test_differences_without_spread() -> None:
    assert math.isnan(paired_test([0.5, 0.75], [0.5, 0.75]))
    assert math.isnan(paired_test([1.0, 1.0, 1.0], [0.5, 0.5, 0.5]))
    # In float64, these differences differ by a rounding.
    assert 0.3 - 0.2 != 0.4 - 0.3
    assert math.isnan(paired_test([0.3, 0.4], [0.2, 0.3]))
    # A spread that is smaller than any of real runs, and no rounding.
    assert 0 < paired_test([1.0, 1.0, 1.0 + 1e-12], [0.5, 0.5, 0.5]) < 1e-15
    for pair in (([0.5], [0.4]), ([0.5, 0.6], [0.4])):
        with pytest.raises(DataError, match="`first` and `second`"):
            paired_test(*pair)
