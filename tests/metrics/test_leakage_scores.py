"""leak@k against all subsets, bounds against their definition, and their coverage: exactly where it can be summed, else simulated."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics import (
    average_leak_bound,
    average_mean_bound,
    corrected_confidence,
    exposure,
    leak_at_k,
    leak_upper_bound,
    mean_upper_bound,
    worst_leak_bound,
    worst_mean_bound,
)

NAN = math.nan
TRIALS = 2000
# Three standard errors of a share of .05 among the trials: a bound whose coverage is just the confidence passes nearly always.
MONTE_CARLO_ERROR = 3 * math.sqrt(0.05 * 0.95 / TRIALS)


# leak@k


def leak_at_k_slowly(scores, k):
    largest = [max(subset) for subset in itertools.combinations(scores, k)]
    return math.fsum(largest) / len(largest)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.data())
def test_leak_at_k_is_the_mean_over_all_subsets(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert leak_at_k(scores, k) == pytest.approx(leak_at_k_slowly(scores, k), rel=1e-12, abs=1e-15)


@given(st.integers(1, 40), st.data())
def test_leak_at_k_of_hits_is_the_chance_that_one_of_k_leaks(samples, data):
    hits, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    wanted = 1 - Fraction(math.comb(samples - hits, k), math.comb(samples, k))
    scores = [1.0] * hits + [0.0] * (samples - hits)
    assert leak_at_k(scores, k) == pytest.approx(float(wanted), rel=1e-12, abs=1e-15)


def test_leak_at_k_at_its_ends():
    scores = [0.2, 0.9, 0.4]
    assert leak_at_k(scores, 1) == pytest.approx(0.5)  # the mean
    assert leak_at_k(scores, 3) == 0.9  # the maximum
    assert leak_at_k([0.3], 1) == 0.3


def test_leak_at_k_of_many_samples():
    """Binomial coefficients of 5000 samples are beyond any float."""
    scores = np.arange(5000) / 5000
    total = sum(math.comb(j - 1, 99) * (j - 1) for j in range(100, 5001))
    wanted = Fraction(total, math.comb(5000, 100) * 5000)
    assert leak_at_k(scores, 100) == pytest.approx(float(wanted), rel=1e-9)


def test_leak_at_k_is_unbiased():
    """Over all draws of 5 samples from three scores, its mean is the expected maximum of k draws."""
    scores, chances = (0.0, 0.5, 1.0), (0.5, 0.3, 0.2)
    for k in (1, 2, 4):
        estimate = math.fsum(
            math.prod(chances[i] for i in draw) * leak_at_k([scores[i] for i in draw], k)
            for draw in itertools.product(range(3), repeat=5)
        )
        expected = math.fsum(
            math.prod(chances[i] for i in draw) * max(scores[i] for i in draw)
            for draw in itertools.product(range(3), repeat=k)
        )
        assert estimate == pytest.approx(expected, rel=1e-12)


# Clopper and Pearson


def binomial_tail(hits, samples, p):
    """Probability of ``hits`` or fewer, exactly."""
    p = Fraction(p)
    return float(sum(math.comb(samples, i) * p**i * (1 - p) ** (samples - i) for i in range(hits + 1)))


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("samples", [1, 2, 7, 30])
def test_leak_upper_bound_leaves_the_tail_that_the_definition_asks_for(samples, confidence):
    for hits in range(samples):
        bound = leak_upper_bound(hits, samples, confidence)
        assert binomial_tail(hits, samples, bound) == pytest.approx(1 - confidence, rel=1e-9)
    assert leak_upper_bound(samples, samples, confidence) == 1.0


@pytest.mark.parametrize(
    ("hits", "samples", "confidence", "bound"),
    [  # quantiles of the beta distribution with hits + 1 and samples − hits, from tables
        (0, 10, 0.95, 0.258866),
        (1, 10, 0.95, 0.394163),
        (5, 10, 0.95, 0.777559),
        (0, 1, 0.95, 0.95),
    ],
)
def test_leak_upper_bound_as_in_tables(hits, samples, confidence, bound):
    assert leak_upper_bound(hits, samples, confidence) == pytest.approx(bound, abs=1e-6)


def test_leak_upper_bound_of_many_samples():
    """Near the normal quantile 1.645, and above the share that was seen."""
    bound = leak_upper_bound(2_000, 100_000)
    assert bound == pytest.approx(0.02 + 1.645 * math.sqrt(0.02 * 0.98 / 100_000), rel=2e-3)
    bounds = [leak_upper_bound(hits, 200) for hits in range(201)]
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert all(bound > hits / 200 for hits, bound in enumerate(bounds[:-1]))


@pytest.mark.parametrize("samples", [1, 5, 20, 60])
def test_leak_upper_bound_has_its_coverage_for_every_probability(samples):
    """Summed over all numbers of hits, so without Monte-Carlo error; it is .95 exactly just below a bound."""
    bounds = [leak_upper_bound(hits, samples) for hits in range(samples + 1)]
    probabilities = [
        *np.linspace(0, 1, 41),
        *(bound - 1e-9 for bound in bounds),
        *(bound + 1e-9 for bound in bounds[:-1]),
    ]
    coverages = []
    for p in probabilities:
        chances = [math.comb(samples, hits) * p**hits * (1 - p) ** (samples - hits) for hits in range(samples + 1)]
        coverages.append(math.fsum(chance for chance, bound in zip(chances, bounds, strict=True) if bound >= p))
    assert min(coverages) == pytest.approx(0.95, abs=1e-6)


# Means of bounded scores


def mean_upper_bound_slowly(scores, confidence):
    """One minus the integral of the lower edge of the band, step by step."""
    width = math.sqrt(math.log(1 / (1 - confidence)) / (2 * len(scores)))
    edges = sorted({*scores, 1.0})
    area = 0.0
    for low, high in itertools.pairwise(edges):
        below = sum(score <= low for score in scores) / len(scores)
        area += (high - low) * max(0.0, below - width)
    return 1 - area


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.sampled_from([0.6, 0.95, 0.999]))
def test_mean_upper_bound_equals_the_definition(scores, confidence):
    bound = mean_upper_bound(scores, confidence)
    assert bound == pytest.approx(mean_upper_bound_slowly(scores, confidence), rel=1e-9)
    assert sum(scores) / len(scores) - 1e-12 <= bound <= 1


def draw_scores(kind, shape, rng):
    """Samples of a bounded score, and their expectation."""
    if kind == "hits":
        return (rng.random(shape) < 0.1).astype(float), 0.1
    if kind == "uniform":
        return rng.random(shape), 0.5
    if kind == "rare and large":
        return np.where(rng.random(shape) < 0.03, 0.9, 0.05), 0.03 * 0.9 + 0.97 * 0.05
    return rng.beta(0.5, 3, shape), 0.5 / 3.5


@pytest.mark.parametrize("kind", ["hits", "uniform", "rare and large", "beta"])
@pytest.mark.parametrize("samples", [5, 50])
def test_mean_upper_bound_has_its_coverage(kind, samples):
    scores, expectation = draw_scores(kind, (TRIALS, samples), np.random.default_rng(0))
    bounds = np.array([mean_upper_bound(row) for row in scores])
    assert (bounds >= expectation).mean() >= 0.95 - MONTE_CARLO_ERROR


# Several questions


def test_corrected_confidence_by_hand():
    assert corrected_confidence(0.95, 1) == pytest.approx(corrected_confidence(0.95, 1, "sidak")) == pytest.approx(0.95)
    assert corrected_confidence(0.95, 5) == pytest.approx(0.99)
    # What is left over of five confidences together: at least .95 in any case, and just that if they are independent.
    assert corrected_confidence(0.95, 5, "sidak") ** 5 == pytest.approx(0.95)
    assert corrected_confidence(0.95, 5, "sidak") < corrected_confidence(0.95, 5)


PROBABILITIES = {
    "equal": [0.1] * 12,
    "one that leaks": [0.0] * 11 + [0.4],
    "all kinds": list(np.linspace(0, 0.6, 12)),
    "certain and never": [0.0] * 6 + [1.0] * 6,
    "nearly certain": [1.0] * 11 + [0.99],
}


def draw_hits(probabilities, samples):
    return np.random.default_rng(1).binomial(samples, probabilities, (TRIALS, len(probabilities)))


@pytest.mark.parametrize("probabilities", PROBABILITIES.values(), ids=PROBABILITIES)
@pytest.mark.parametrize("samples", [4, 20])
def test_bounds_of_several_questions_have_their_coverage(probabilities, samples):
    hits = draw_hits(probabilities, samples)

    # The bound is of all samples together: how the hits are spread over the questions does not matter.
    bounds = {}
    for total in np.unique(hits.sum(axis=1)):
        full, rest = divmod(int(total), samples)
        counts = [samples] * full + [rest] + [0] * len(probabilities)
        bounds[total] = average_leak_bound(counts[: len(probabilities)], samples)
    covered = [bounds[total] >= np.mean(probabilities) - 1e-12 for total in hits.sum(axis=1)]
    assert np.mean(covered) >= 0.95 - MONTE_CARLO_ERROR

    table = np.array([worst_leak_bound([count], samples) for count in range(samples + 1)])
    assert (table[hits.max(axis=1)] >= max(probabilities)).mean() >= 0.95 - MONTE_CARLO_ERROR


@pytest.mark.parametrize("correction", ["bonferroni", "sidak"])
@pytest.mark.parametrize("probabilities", PROBABILITIES.values(), ids=PROBABILITIES)
def test_corrected_bounds_hold_together(probabilities, correction):
    """Of each question its own bound, all at once; without the correction they fail together far more often."""
    samples = 20
    hits = draw_hits(probabilities, samples)
    confidence = corrected_confidence(0.95, len(probabilities), correction)
    table = np.array([leak_upper_bound(count, samples, confidence) for count in range(samples + 1)])
    assert (table[hits] >= probabilities).all(axis=1).mean() >= 0.95 - MONTE_CARLO_ERROR


def test_uncorrected_bounds_do_not_hold_together():
    """Shows that the test above can fail: without a hit the bound is .139, and each of the twelve has none with 4.9 %."""
    hits = draw_hits([0.14] * 12, 20)
    table = np.array([leak_upper_bound(count, 20) for count in range(21)])
    assert (table[hits] >= 0.14).all(axis=1).mean() < 0.7


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_bounds_of_several_questions_by_their_definition(hits):
    assert worst_leak_bound(hits, 9) == max(leak_upper_bound(count, 9) for count in hits)
    total, draws = sum(hits), 9 * len(hits)
    wanted = 1.0 if total >= draws - 1 else leak_upper_bound(total, draws)
    assert average_leak_bound(hits, 9) == wanted


@pytest.mark.parametrize("kinds", [["hits", "uniform", "beta"], ["rare and large"] * 3])
def test_mean_bounds_of_several_questions_have_their_coverage(kinds):
    rng = np.random.default_rng(2)
    samples, expectations = zip(*(draw_scores(kind, (TRIALS, 20), rng) for kind in kinds), strict=True)
    trials = np.stack(samples, axis=1)
    average = np.array([average_mean_bound(rows) for rows in trials])
    assert (average >= np.mean(expectations)).mean() >= 0.95 - MONTE_CARLO_ERROR
    worst = np.array([worst_mean_bound(rows) for rows in trials])
    assert (worst >= max(expectations)).mean() >= 0.95 - MONTE_CARLO_ERROR


def test_mean_bounds_of_several_questions_by_their_definition():
    scores = np.random.default_rng(3).random((4, 15))
    assert worst_mean_bound(scores) == max(mean_upper_bound(row) for row in scores)
    assert average_mean_bound(scores) == pytest.approx(scores.mean() + math.sqrt(math.log(20) / 120))
    assert average_mean_bound([[1.0]]) == 1.0


# Canaries


@given(st.floats(0, 9), st.lists(st.floats(0, 9), min_size=1, max_size=9))
def test_exposure_equals_the_definition(canary, others):
    rank = 1 + sum(other < canary for other in others) + sum(other == canary for other in others) / 2
    assert exposure(canary, others) == pytest.approx(math.log2((len(others) + 1) / rank), abs=1e-12)


def test_exposure_by_hand():
    assert exposure(0.0, [1.0] * 1023) == 10.0
    assert exposure(2.0, [1.0] * 1023) == 0.0
    # A model that finds all equally likely knows nothing: about one bit, not the largest value.
    assert exposure(1.0, [1.0] * 1023) == pytest.approx(1.0, abs=2e-3)


def test_exposure_of_a_model_that_never_saw_the_canary():
    """The mean of log2(n / rank) over uniform ranks is log2(e) for many sequences."""
    others = np.arange(4096.0)
    values = [exposure(place - 0.5, others) for place in range(4097)]
    assert np.mean(values) == pytest.approx(math.log2(math.e), abs=5e-3)


# Errors

ERRORS = {
    "k": (
        lambda: leak_at_k([0.5, 0.5], 3),
        ConfigError,
        "`k` must be a whole number from 1 to the number of samples, 2, not 3",
    ),
    "no k": (lambda: leak_at_k([0.5], 0), ConfigError, "`k` must be"),
    "half a k": (lambda: leak_at_k([0.5, 0.5], 1.5), ConfigError, "`k` must be"),
    "nan": (lambda: leak_at_k([0.5, NAN], 1), DataError, "`scores` must be finite, but number 1 is nan"),
    "hits": (lambda: leak_upper_bound(3, 2), DataError, "`hits` must be a whole number from 0 to `samples`, 2, not 3"),
    "share": (lambda: leak_upper_bound(0.5, 2), DataError, "`hits` must be.*not their share"),
    "no sample": (lambda: leak_upper_bound(0, 0), DataError, "`samples` must be a whole number of at least 1, not 0"),
    "per cent": (lambda: leak_upper_bound(0, 9, 95), ConfigError, "`confidence` must be above 0 and below 1, not 95"),
    "certain": (lambda: leak_upper_bound(0, 9, 1.0), ConfigError, "`confidence` must be"),
    "massart": (lambda: mean_upper_bound([0.5], 0.5), ConfigError, "`confidence` must be above 0.5 and below 1"),
    "hoeffding": (lambda: average_leak_bound([0], 9, 0.7), ConfigError, "`confidence` must be at least 0.75"),
    "percent": (lambda: mean_upper_bound([50.0]), DataError, "`scores` must be from 0 to 1, but number 0 is 50.0"),
    "many": (lambda: worst_leak_bound([1, 10], 9), DataError, "`hits` must be whole numbers.*number 1 is 10.0"),
    "questions": (lambda: corrected_confidence(0.95, 0), ConfigError, "`questions` must be"),
    "correction": (
        lambda: corrected_confidence(0.95, 2, "holm"),
        ConfigError,
        "`correction` must be 'bonf.*not 'holm'",
    ),
    "flat": (lambda: worst_mean_bound([0.5]), DataError, r"`scores` must have shape \(n, k\)"),
    "diverged": (lambda: exposure(NAN, [1.0]), DataError, "`canary_nll` must be finite, but is nan"),
    "alone": (lambda: exposure(1.0, []), DataError, "`other_nll` must have shape"),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
