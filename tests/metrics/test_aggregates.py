"""Aggregates and robustness against the formulas written out, and the limits in which they are known."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_unlearn.errors import DataError
from lit_unlearn.metrics import (
    attack_score,
    harmonic_mean,
    memorization_score,
    overall_score,
    privacy_score,
    quantization_robustness,
    relative_utility,
    relearning_robustness,
    robustness_score,
    truth_ratio_score,
    utility_score,
)

INF, NAN = math.inf, math.nan
shares = st.floats(0, 1)
scores_above_0 = st.floats(1e-6, 1)


def harmonic_mean_slowly(parts):
    return len(parts) / math.fsum(1 / max(part, 1e-12) for part in parts)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_harmonic_mean_equals_the_definition(parts):
    assert harmonic_mean(parts) == pytest.approx(harmonic_mean_slowly(parts), rel=1e-12)


@given(st.lists(scores_above_0, min_size=1, max_size=6))
def test_harmonic_mean_equals_the_standard_library_without_a_floor(parts):
    assert harmonic_mean(parts) == pytest.approx(statistics.harmonic_mean(parts), rel=1e-12)


def test_a_part_at_0_takes_the_mean_to_the_floor_of_published_code():
    assert harmonic_mean([0.0, 1.0, 1.0, 1.0]) == pytest.approx(4e-12, rel=1e-9)
    assert harmonic_mean([0.0]) == 1e-12
    # A method that forgets nothing has 0.00 in tables.
    assert overall_score(memorization_score(1.0, 1.0, 1.0, 1.0), 1.0, 1.0) < 1e-11


@given(shares, shares, shares, shares)
def test_memorization_equals_the_definition(strength, exact, probability, ratio):
    wanted = harmonic_mean_slowly([1 - strength, 1 - exact, 1 - probability, 1 - ratio])
    assert memorization_score(strength, exact, probability, ratio) == pytest.approx(wanted, rel=1e-12)


def test_the_truth_ratio_of_memorization_falls_as_a_model_forgets():
    """Unlike TOFU's mean min(R, 1/R), which rises: memorization would reward knowledge with that one."""
    knows, forgot = [0.01, 0.02], [0.9, 1.0]
    assert truth_ratio_score(knows, "memorization") > truth_ratio_score(forgot, "memorization")
    assert truth_ratio_score(knows, "forget") < truth_ratio_score(forgot, "forget")
    before = memorization_score(0.5, 0.5, 0.5, truth_ratio_score(knows, "memorization"))
    after = memorization_score(0.5, 0.5, 0.5, truth_ratio_score(forgot, "memorization"))
    assert before < after


@given(shares, scores_above_0)
def test_attack_score_equals_the_definition(area, retain):
    wanted = 1 - abs(area - retain) / retain
    assert attack_score(area, retain) == min(max(wanted, 0), 1)


@pytest.mark.parametrize(
    ("area", "retain", "score"), [(0.4, 0.4, 1.0), (0.2, 0.4, 0.5), (0.6, 0.4, 0.5), (1.0, 0.4, 0.0), (0.0, 0.4, 0.0)]
)
def test_attack_score_by_hand(area, retain, score):
    assert attack_score(area, retain) == pytest.approx(score, abs=1e-12)


@given(st.lists(scores_above_0, min_size=4, max_size=4), scores_above_0)
def test_privacy_equals_the_definition_with_and_without_depth(attacks, uds):
    plain = harmonic_mean_slowly(attacks)
    assert privacy_score(attacks) == pytest.approx(plain, rel=1e-12)
    assert privacy_score(attacks, uds) == pytest.approx(harmonic_mean_slowly([plain, uds]), rel=1e-12)


@given(shares, shares, scores_above_0, shares, shares)
def test_overall_equals_the_definition(utility, fluency, target, memorization, privacy):
    wanted = harmonic_mean_slowly([utility, fluency])
    assert utility_score(utility, fluency) == pytest.approx(wanted, rel=1e-12)
    relative = relative_utility(utility_score(utility, fluency), target)
    assert relative == pytest.approx(wanted / target, rel=1e-12)
    wanted = harmonic_mean_slowly([memorization, privacy, wanted / target])
    assert overall_score(memorization, privacy, relative) == pytest.approx(wanted, rel=1e-12)


def test_a_model_that_is_better_than_the_target():
    assert relative_utility(0.9, utility_target=0.6) == pytest.approx(1.5)
    assert overall_score(1.0, 1.0, 1.5) == pytest.approx(3 / (2 + 1 / 1.5))


# Robustness


@pytest.mark.parametrize(
    ("retain", "unlearned", "wanted"),
    [
        ((0.1, 0.3), (0.0, 0.4), 0.5),  # the unlearned model regains twice as much
        ((0.1, 0.3), (0.0, 0.2), 1.0),
        ((0.1, 0.3), (0.0, 0.1), 1.0),  # regains less: no more than 1
        ((0.1, 0.3), (0.2, 0.2), 1.0),  # does not move
        ((0.1, 0.3), (0.2, 0.1), 0.0),  # moves the other way
        ((0.1, 0.1), (0.0, 0.5), 0.0),  # all of the gain was hidden knowledge
        ((0.3, 0.1), (0.4, 0.0), 0.5),  # values that fall where knowledge returns
    ],
)
def test_relearning_robustness_by_hand(retain, unlearned, wanted):
    assert relearning_robustness(*retain, *unlearned) == pytest.approx(wanted, abs=1e-12)


@given(scores_above_0, shares)
def test_quantization_robustness_equals_the_definition(before, after):
    assert quantization_robustness(before, after) == min(after / before, 1)


def test_quantization_robustness_of_a_value_at_0():
    assert quantization_robustness(0.0, 0.0) == quantization_robustness(0.0, 0.5) == 1.0


@given(shares, shares)
def test_robustness_equals_the_definition(relearning, quantization):
    wanted = harmonic_mean_slowly([relearning, quantization])
    assert robustness_score(relearning, quantization) == pytest.approx(wanted, rel=1e-12)


# Errors

ERRORS = {
    "negative": (lambda: harmonic_mean([0.5, -0.5]), "`scores` must be at or above 0, but number 1 is -0.5"),
    "none": (lambda: harmonic_mean([]), "`scores` must have shape"),
    "percent": (
        lambda: memorization_score(0.5, 50.0, 0.5, 0.5),
        "`exact_memorization` must be from 0 to 1, but is 50.0",
    ),
    "nan": (lambda: memorization_score(0.5, 0.5, 0.5, NAN), "`truth_ratio` must be from 0 to 1, but is nan"),
    "auc": (lambda: attack_score(1.5, 0.5), "`auc` must be from 0 to 1"),
    "divides": (lambda: attack_score(0.5, 0.0), "`auc_retain` must be above 0"),
    "attacks": (lambda: privacy_score([0.5, 1.5]), "`attack_scores` must be from 0 to 1, but number 1 is 1.5"),
    "uds": (lambda: privacy_score([0.5], uds=2.0), "`uds` must be from 0 to 1"),
    "utility": (lambda: utility_score(0.5, NAN), "`fluency` must be from 0 to 1"),
    "target": (lambda: relative_utility(0.5, 0.0), "`utility_target` must be above 0"),
    "relative": (lambda: overall_score(0.5, 0.5, INF), "`relative_utility` must be finite"),
    "change": (lambda: relearning_robustness(0.1, 0.2, NAN, 0.3), "`unlearned_before` must be finite, but is nan"),
    "rounded": (lambda: quantization_robustness(-0.5, 0.5), "`before` must be at or above 0, but is -0.5"),
    "robust": (lambda: robustness_score(1.5, 0.5), "`relearning` must be from 0 to 1"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call()
