"""Confidence intervals of values that are measured on a sample of rows: an audit compares these, not the values, with thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics.leakage import average_leak_bound
from lit_unlearn.metrics.privacy import auc
from lit_unlearn.metrics.validation import Array, read_finite

RESAMPLES = 2000
"""Resamples of the bootstrap: at 95 % confidence, 50 of them lie beyond either end."""

_EPSILON = float(np.finfo(np.float64).eps)


class Interval(NamedTuple):
    """A value and its two-sided confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of some rows' values, with a bootstrap interval for the mean of rows like these.

    The interval is the expanded percentile interval: plain percentiles are too narrow for few rows, because a resample spreads
    by n − 1 over n of the variance, and because the spread itself is estimated. Hesterberg, "What Teachers Should Know about the
    Bootstrap", 2015 (arXiv 1411.5279).

    Rows that all have the same value give an interval without width, whatever their number: ask for enough rows.

    Args:
        values: One finite number per row, shape ``(n,)``.
        confidence: Probability with which the interval is to hold the mean, between 0 and 1.
        seed: Of the resamples: the same values give the same interval.

    Raises:
        DataError: If there is no value, or one is not finite.
        ConfigError: If the confidence is out of range.

    Example:
        >>> value, low, high = mean_interval([0.1, 0.2, 0.3, 0.4, 0.5])
        >>> round(value, 3), 0.1 < low < 0.2, 0.4 < high < 0.5
        (0.3, True, True)
    """
    sample = read_finite("values", values)
    generator = np.random.default_rng(seed)

    def resample() -> float:
        return float(_draw(sample, generator).mean())

    return _bootstrap(float(sample.mean()), resample, len(sample), confidence)


def share_interval(hits: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the share of ones among zeros and ones, with the interval of Clopper and Pearson.

    It holds for every share and every number of draws, also where all draws are equal. Draws of different questions, each with a
    probability of its own, may be counted together, see `average_leak_bound`.

    Args:
        hits: Zeros and ones, shape ``(n,)``.
        confidence: As for `mean_interval`, at least 0.5.

    Raises:
        DataError: If there is no number, or one is neither 0 nor 1.
        ConfigError: If the confidence is out of range.

    Example:
        >>> value, low, high = share_interval([0.0] * 40)
        >>> value, low, round(high, 3)
        (0.0, 0.0, 0.088)
    """
    draws = read_finite("hits", hits)
    # Half of what is left on either side.
    one_sided = (1 + confidence) / 2
    low = 1 - average_leak_bound(1 - draws, 1, one_sided)
    return Interval(float(draws.mean()), low, average_leak_bound(draws, 1, one_sided))


def difference_interval(first: ArrayLike, second: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return how much larger the mean of one sample is than that of another, with a bootstrap interval.

    For rows that are the same in both, give `mean_interval` their differences: it is much narrower then.

    Args:
        first: One finite number per row, shape ``(n,)``.
        second: Likewise, of other rows, shape ``(m,)``.
        confidence: As for `mean_interval`.
        seed: As for `mean_interval`.

    Raises:
        DataError: If a sample is empty, or a value is not finite.
        ConfigError: If the confidence is out of range.

    Example:
        >>> difference_interval([1.0, 1.0], [0.25, 0.25])
        Interval(value=0.75, low=0.75, high=0.75)
    """
    larger, smaller = read_finite("first", first), read_finite("second", second)
    generator = np.random.default_rng(seed)

    def resample() -> float:
        return float(_draw(larger, generator).mean() - _draw(smaller, generator).mean())

    value = float(larger.mean() - smaller.mean())
    return _bootstrap(value, resample, min(len(larger), len(smaller)), confidence)


def seeds_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean over a few seeds, with the interval of Student's t for the mean over all seeds.

    Not the bootstrap: resamples of three values never leave the range of the three, which holds the mean in 75 % of cases. It
    assumes that the value is normally distributed over seeds, which few seeds cannot show.

    Args:
        values: One finite number per seed, shape ``(n,)``.
        confidence: As for `mean_interval`.

    Returns:
        Of a single seed, an interval without ends.

    Raises:
        DataError: If there is no value, or one is not finite.
        ConfigError: If the confidence is out of range.

    Example:
        >>> value, low, high = seeds_interval([0.5, 0.6, 0.7])
        >>> round(value, 3), round(low, 3), round(high, 3)
        (0.6, 0.352, 0.848)
    """
    sample = read_finite("values", values)
    _check_confidence(confidence)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, -math.inf, math.inf)
    half_width = _t_quantile(confidence, len(sample) - 1) * _standard_deviation(sample) / math.sqrt(len(sample))
    return Interval(mean, mean - half_width, mean + half_width)


def paired_test(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p-value of the paired t-test: two-sided, for equal means of two methods over the same seeds.

    Runs of one seed share the model that they start from and the order of the rows, so that the differences within seeds spread
    less than the values. Three seeds find only differences that are several times as large as their spread.

    Args:
        first: One finite number per seed, shape ``(n,)``, n at least 2.
        second: Of the same seeds, in the same order.

    Returns:
        NaN if all seeds differ by the same number, or none does: without a spread of the differences there is no test. Otherwise at
        least 2.2e-16, below which the sum in float64 cannot tell.

    Raises:
        DataError: If the samples have different lengths, or fewer than two numbers, or one is not finite.

    Example:
        >>> round(paired_test([0.5, 0.6, 0.7], [0.4, 0.5, 0.8]), 3)
        0.667
    """
    sample, reference = read_finite("first", first), read_finite("second", second)
    if len(sample) != len(reference) or len(sample) < 2:
        raise DataError(
            f"`first` and `second` must have one number for each of at least two seeds, not {len(sample)} and {len(reference)}: pair "
            "them by seed.",
            argument="first",
        )
    differences = sample - reference
    # Equal differences come out of the subtraction with a rounding each: 0.3 - 0.2 and 0.4 - 0.3 are not the same in float64.
    rounding = 4 * _EPSILON * max(np.abs(sample).max(), np.abs(reference).max())
    if np.ptp(differences) <= rounding:
        return math.nan

    # t = mean · √n / spread.
    degrees = len(differences) - 1
    distance = abs(float(differences.mean())) * math.sqrt(len(differences))
    angle = math.atan2(distance, _standard_deviation(differences) * math.sqrt(degrees))
    return max(_EPSILON, 1 - _central_probability(angle, degrees))


def _standard_deviation(sample: Array) -> float:
    """Return the standard deviation over seeds; 0 of equal numbers, whose mean may be off by a rounding."""
    return 0.0 if (sample == sample[0]).all() else float(sample.std(ddof=1))


def _t_quantile(confidence: float, degrees: int) -> float:
    """Return the t that Student's t lies within ± of with probability ``confidence``."""
    low, high = 0.0, math.pi / 2
    # Halved until nothing is left to halve in float64.
    for _ in range(60):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(angle: float, degrees: int) -> float:
    """Return P(|T| ≤ √degrees · tan(angle)) of Student's t.

    Of a whole number of degrees of freedom it is a finite sum, so that no library is needed: Abramowitz and Stegun, "Handbook of
    Mathematical Functions", 1964, 26.7.3 and 26.7.4.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2 == 1
    total, term = 0.0, cosine if is_odd else 1.0
    for number in range(1, degrees // 2 + 1):
        total += term
        ratio = 2 * number / (2 * number + 1) if is_odd else (2 * number - 1) / (2 * number)
        term *= ratio * cosine**2
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def auc_interval(members: ArrayLike, nonmembers: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the area under the ROC curve of a membership attack, as `auc` does, with a bootstrap interval.

    Members and non-members are resampled each among themselves.

    Args:
        members: Scores, higher for members, shape ``(n,)``.
        nonmembers: Likewise, shape ``(m,)``.
        confidence: As for `mean_interval`.
        seed: As for `mean_interval`.

    Raises:
        DataError: If a sample is empty, or a value is not finite.
        ConfigError: If the confidence is out of range.

    Example:
        >>> auc_interval([3.0, 4.0], [1.0, 2.0])  # every resample separates them, too
        Interval(value=1.0, low=1.0, high=1.0)
    """
    inside, outside = read_finite("members", members), read_finite("nonmembers", nonmembers)
    generator = np.random.default_rng(seed)

    def resample() -> float:
        return auc(_draw(inside, generator), _draw(outside, generator))

    return _bootstrap(auc(inside, outside), resample, min(len(inside), len(outside)), confidence)


def _draw(sample: Array, generator: np.random.Generator) -> Array:
    """Return as many of the values as there are, drawn with replacement."""
    drawn: Array = sample[generator.integers(0, len(sample), len(sample))]
    return drawn


def _bootstrap(value: float, resample: Callable[[], float], rows: int, confidence: float) -> Interval:
    """Return the expanded percentile interval of ``rows`` rows."""
    tail = _expanded_tail(rows, confidence)
    # One after the other: thousands of rows, thousands of times, would fill the memory.
    values = [resample() for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [tail, 1 - tail])
    # Of very few rows, the quantiles may both lie on one side of the value.
    return Interval(value, min(float(low), value), max(float(high), value))


def _expanded_tail(rows: int, confidence: float) -> float:
    """Return the probability beyond either end, smaller than (1 − confidence) / 2 by as much as few rows ask for."""
    _check_confidence(confidence)
    if rows < 2:
        return 0.0
    degrees = rows - 1
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    # Student's t by the Cornish-Fisher expansion: within 1 % from 5 degrees of freedom on, and no library is needed.
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return NormalDist().cdf(-t * math.sqrt(rows / degrees))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"`confidence` must be between 0 and 1, not {confidence!r}.", argument="confidence")
