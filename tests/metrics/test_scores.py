"""Every score against a slow form in plain Python, and against cases worked out by hand."""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics import (
    auc,
    exact_memorization,
    extraction_strength,
    forget_quality,
    min_k,
    min_k_plus_plus,
    model_utility,
    normalized_probability,
    privleak,
    rouge,
    truth_ratio,
    truth_ratio_score,
    zlib_score,
)

INF, NAN = math.inf, math.nan
losses = st.floats(0, 50)
questions = st.lists(st.tuples(losses, st.lists(losses, min_size=1, max_size=4)), min_size=1, max_size=4)
few = st.lists(st.integers(0, 4), min_size=1, max_size=6)  # with many ties


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def filled(rows):
    """Rows of unequal length as one array."""
    return list(zip(*itertools.zip_longest(*rows, fillvalue=NAN), strict=True))


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


# Truth ratio and probability


def truth_ratio_slowly(right, wrong, form):
    p_wrong = [math.exp(-loss) for loss in wrong]
    centre = math.prod(p ** (1 / len(wrong)) for p in p_wrong) if form == "geometric" else mean(p_wrong)
    return centre / math.exp(-right)


@given(questions)
def test_truth_ratio_and_probability_equal_the_definition(rows):
    right, wrong = [right for right, _ in rows], filled(wrong for _, wrong in rows)
    for form in ("geometric", "arithmetic"):
        wanted = [truth_ratio_slowly(*row, form) for row in rows]
        assert truth_ratio(right, wrong, form).tolist() == pytest.approx(wanted, rel=1e-12)
    wanted = [math.exp(-r) / math.fsum(math.exp(-loss) for loss in (r, *w)) for r, w in rows]
    assert normalized_probability(right, wrong).tolist() == pytest.approx(wanted, rel=1e-12)


def test_one_option():
    """Both forms are the one probability over the other; two equal options share."""
    right, wrong = [math.log(2), 1.0], [[math.log(8)], [1.0]]
    for form in ("geometric", "arithmetic"):
        assert truth_ratio(right, wrong, form).tolist() == pytest.approx([0.25, 1.0], rel=1e-15)
    assert normalized_probability(right, wrong).tolist() == pytest.approx([0.8, 0.5], rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_lists_and_arrays_give_the_same(dtype):
    right, wrong = [0.5, 2.0], [[1.5, 0.25], [3.0, NAN]]  # exact in bfloat16
    tensors = torch.tensor(right, dtype=dtype, requires_grad=True), torch.tensor(wrong, dtype=dtype)
    for form in ("geometric", "arithmetic"):
        got = truth_ratio(*tensors, form)
        assert got.dtype == np.float64
        assert got.tolist() == truth_ratio(right, wrong, form).tolist()
        assert got.tolist() == truth_ratio(np.float32(right), np.float32(wrong), form).tolist()


def test_losses_so_high_that_probabilities_underflow():
    assert normalized_probability([1e4], [[1e4]]).tolist() == [0.5]
    assert normalized_probability([0.0, 1e4], [[1e4], [0.0]]).tolist() == [1.0, 0.0]
    for form in ("geometric", "arithmetic"):
        assert truth_ratio([0.0, 1e4, 1e4], [[1e4], [0.0], [1e4]], form).tolist() == [0.0, INF, 1.0]


def test_truth_ratio_score_by_hand():
    ratios = [0.0, 5e-324, 0.5, 1.0, 4.0, INF]
    assert truth_ratio_score(ratios, "forget") == (0 + 0 + 0.5 + 1 + 0.25 + 0) / 6
    assert truth_ratio_score(ratios, "utility") == (1 + 1 + 0.5 + 0 + 0 + 0) / 6
    assert truth_ratio_score(ratios, "memorization") == pytest.approx((1 + 1 + 2 / 3 + 0.5 + 0.2 + 0) / 6, rel=1e-15)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5))
def test_truth_ratio_score_equals_the_definition(ratios):
    assert truth_ratio_score(ratios, "forget") == pytest.approx(mean([min(r, 1 / r) for r in ratios]), rel=1e-14)
    assert truth_ratio_score(ratios, "utility") == pytest.approx(mean([max(0, 1 - r) for r in ratios]), rel=1e-14)
    assert truth_ratio_score(ratios, "memorization") == pytest.approx(mean([1 / (1 + r) for r in ratios]), rel=1e-14)
    assert truth_ratio_score([1 / r for r in ratios], "forget") == pytest.approx(truth_ratio_score(ratios, "forget"))


# Forget quality


def distance_of(first, second):
    """The Kolmogorov-Smirnov statistic, as a fraction."""
    return max(
        abs(Fraction(sum(x <= at for x in first), len(first)) - Fraction(sum(x <= at for x in second), len(second)))
        for at in (*first, *second)
    )


def forget_quality_slowly(first, second):
    """The share of all orders of n + m different ratios that are at least as far apart, one by one."""
    places = range(len(first) + len(second))
    orders = list(itertools.combinations(places, len(first)))
    far = sum(distance_of(order, set(places) - set(order)) >= distance_of(first, second) for order in orders)
    return far / len(orders)


@given(few, st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_forget_quality_equals_the_count_of_all_orders(first, second):
    wanted = forget_quality_slowly(first, second)
    assert forget_quality(first, second) == wanted
    assert forget_quality(second, first) == wanted
    assert forget_quality([10 + 3 * r for r in first], [10 + 3 * r for r in second]) == wanted  # only the order counts


@pytest.mark.parametrize("n", [1, 20, 40, 200, 400])  # forget01, forget05 and forget10 have 40, 200 and 400 rows
def test_forget_quality_equals_the_series_of_two_equal_samples(n):
    """Gnedenko and Korolyuk: Σ_i 2 (−1)^(i+1) C(2n, n − ih) / C(2n, n) for h ranks of n, here to the last digit."""
    for shift in {0, 1, n // 3, n - 1, n}:
        ranks = range(1, n // shift + 1) if shift else ()
        terms = [(-1) ** (i + 1) * Fraction(2 * math.comb(2 * n, n - i * shift), math.comb(2 * n, n)) for i in ranks]
        wanted = float(sum(terms)) if shift else 1.0
        assert forget_quality(range(n), [rank + shift - 0.5 if shift else rank for rank in range(n)]) == wanted


def test_forget_quality_of_samples_that_do_not_overlap():
    """2 / C(n + m, n), far below what rounding leaves of 1 − x."""
    assert forget_quality([0.1] * 200, [0.9] * 200) == 2 / math.comb(400, 200) == pytest.approx(1.94e-119, rel=2e-3)
    assert forget_quality([0.0] * 400, [INF] * 200) == 2 / math.comb(600, 200)
    assert forget_quality([0.0] * 40, [1.0] * 39) == 2 / math.comb(79, 39)
    assert forget_quality([0.3], [0.4]) == 1.0
    assert forget_quality([0.3] * 50, [0.3] * 70) == 1.0


# Model utility


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9))
def test_model_utility_is_the_harmonic_mean(scores):
    parts = {str(n): score for n, score in enumerate(scores)}
    wanted = len(scores) / math.fsum(1 / score for score in scores)
    assert model_utility(parts) == pytest.approx(wanted, rel=1e-13)
    assert model_utility({**parts, "last": 0.0}) == 0.0


def test_model_utility_by_hand():
    assert model_utility({"only": 0.3}) == 0.3
    assert model_utility({"a": np.float32(0.5), "b": torch.tensor(0.25), "c": 1}) == pytest.approx(3 / 7)


# Memorisation


def extraction_strength_slowly(predictions, labels, floor=False):
    n = len(labels)
    k = next(k for k in range(n + 1) if predictions[k:] == labels[k:])
    return 1 - (min(k, n - 1) if floor else k) / n


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=8))
def test_memorization_equals_the_definition(pairs):
    predictions, labels = [p for p, _ in pairs], [label for _, label in pairs]
    assert exact_memorization(predictions, labels) == sum(p == label for p, label in pairs) / len(pairs)
    assert extraction_strength(torch.tensor(predictions), labels) == extraction_strength_slowly(predictions, labels)
    wanted = extraction_strength_slowly(predictions, labels, floor=True)
    assert extraction_strength(predictions, labels, floor=True) == wanted > 0


@pytest.mark.parametrize(
    ("predictions", "exact", "strength"),
    [
        ([1, 2, 3, 4], 1.0, 1.0),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([1, 2, 3, 0], 0.75, 0.0),  # the last one wrong: nothing is extracted
        ([0, 2, 3, 4], 0.75, 0.75),
        ([1, 0, 3, 4], 0.75, 0.5),
    ],
)
def test_memorization_by_hand(predictions, exact, strength):
    assert exact_memorization(predictions, [1, 2, 3, 4]) == exact
    assert extraction_strength(predictions, [1, 2, 3, 4]) == strength


@pytest.mark.parametrize("score", [exact_memorization, extraction_strength])
def test_memorization_of_a_single_token(score):
    assert (score([7], [7]), score([7], [8])) == (1.0, 0.0)


def longest_common_subsequence(a, b):
    table = {(i, j): 0 for i in range(-1, len(a)) for j in range(-1, len(b))}
    for i, j in itertools.product(range(len(a)), range(len(b))):
        best = max(table[i - 1, j], table[i, j - 1])
        table[i, j] = table[i - 1, j - 1] + 1 if a[i] == b[j] else best
    return table[len(a) - 1, len(b) - 1]


def rouge_slowly(prediction, reference):
    """From words that are already lower-case and apart."""
    a, b = prediction.split(), reference.split()
    common = {
        "rouge1": sum(min(a.count(word), b.count(word)) for word in set(a)),
        "rougeL": longest_common_subsequence(a, b),
    }
    recall = {f"{name}_recall": hits / max(1, len(b)) for name, hits in common.items()}
    return recall | {f"{name}_f1": 2 * hits / max(1, len(a) + len(b)) for name, hits in common.items()}


texts = st.lists(st.sampled_from(["a", "dog", "cat", "sat"]), max_size=6).map(" ".join)


# No deadline: the first example imports rouge_score and nltk, 0.4 to 0.8 s on a busy machine.
@settings(deadline=None)
@given(texts, texts)
def test_rouge_equals_the_definition(prediction, reference):
    wanted = pytest.approx(rouge_slowly(prediction, reference), rel=1e-14)
    assert rouge(prediction, reference) == wanted
    assert rouge(prediction, reference, stemmer=False) == wanted


def test_rouge_by_hand():
    """The stemmer makes one of 'poems' and 'poem'; order counts in L only; recall is of the reference."""
    assert rouge("Poems!", "poem")["rougeL_recall"] == 1.0
    assert rouge("Poems!", "poem", stemmer=False)["rougeL_recall"] == 0.0
    got = rouge("sat cat", "cat sat on mat")
    assert got == pytest.approx({"rouge1_recall": 0.5, "rougeL_recall": 0.25, "rouge1_f1": 2 / 3, "rougeL_f1": 1 / 3})
    for empty in ("", " \n", "…"):
        assert set(rouge(empty, "poem").values()) == set(rouge("poem", empty).values()) == {0.0}
    assert set(rouge("", "").values()) == {0.0}


# Privacy


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=12), st.sampled_from([0.05, 0.2, 0.4, 0.5, 1.0]))
def test_min_k_equals_the_definition(logp, k):
    count = max(1, int(len(logp) * k))
    assert min_k(logp, k) == pytest.approx(mean(sorted(logp)[:count]), rel=1e-13)
    assert min_k(logp) == min_k(logp, k=0.4)
    standard = [(value + 3) / 0.7 for value in logp]
    got = min_k_plus_plus(logp, [-3.0] * len(logp), [0.7] * len(logp), k)
    assert got == pytest.approx(min_k(standard, k), rel=1e-13)


def test_min_k_by_hand():
    assert min_k([-2.0], k=0.4) == -2.0  # 0.4 of a token is one token
    assert min_k([-1.0, -2.0, -3.0, -4.0], k=0.4) == -4.0  # 1.6 tokens are one
    assert min_k([-1.0, -2.0, -3.0, -4.0], k=1) == -2.5


def test_min_k_plus_plus_from_logits():
    """Mean and deviation under p, one position at a time; the hard position's token counts as the lowest no more."""
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.5], [9.0, 1.0, 0.0]], dtype=torch.float64)
    logp, labels = logits.log_softmax(-1), [1, 0, 0]
    means, deviations, standard = [], [], []
    for row, label in zip(logp.tolist(), labels, strict=True):
        centre = math.fsum(math.exp(value) * value for value in row)
        deviation = math.sqrt(math.fsum(math.exp(value) * (value - centre) ** 2 for value in row))
        means.append(centre)
        deviations.append(deviation)
        standard.append((row[label] - centre) / deviation)
    taken = [row[label] for row, label in zip(logp.tolist(), labels, strict=True)]
    assert min_k_plus_plus(taken, means, deviations, k=0.7) == pytest.approx(mean(sorted(standard)[:2]), rel=1e-12)


def test_min_k_plus_plus_without_deviation():
    """One-hot and uniform predictions give 0, and a token that is ruled out stays the lowest, finite."""
    assert min_k_plus_plus([0.0, -math.log(4)], [0.0, -math.log(4)], [0.0, 0.0], k=1) == 0.0
    assert min_k_plus_plus([-90.0, -1.0], [0.0, -1.0], [0.0, 0.5], k=0.5) == pytest.approx(-9e4)


@pytest.mark.parametrize("text", ["a", "TO BE or not to be " * 9, "naïve – 东"])
def test_zlib_score_equals_the_definition(text):
    assert zlib_score(12.5, text) == 12.5 / len(zlib.compress(bytes(text, "utf-8")))


@given(few, few)
def test_auc_is_the_share_of_pairs(members, nonmembers):
    pairs = list(itertools.product(members, nonmembers))
    wanted = float(sum(Fraction(1 + (a > b) - (a < b), 2) for a, b in pairs) / len(pairs))
    assert auc(members, nonmembers) == wanted
    assert auc([-x for x in members], [-x for x in nonmembers]) == pytest.approx(1 - wanted)


@given(few, few)
def test_auc_is_the_area_under_the_curve(members, nonmembers):
    """The trapezoids under the points (false positives, true positives) of all thresholds."""
    points = [
        [sum(x >= threshold for x in side) / len(side) for side in (nonmembers, members)]
        for threshold in (INF, *sorted({*members, *nonmembers}, reverse=True))
    ]
    area = math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert auc(members, nonmembers) == pytest.approx(area, abs=1e-12)


def test_auc_by_hand():
    assert (auc([2, 3], [0, 1]), auc([0, 1], [2, 3]), auc([1, 1], [1])) == (1.0, 0.0, 0.5)


def test_privleak_by_hand():
    assert privleak(0.5, 0.5) == 0.0
    assert privleak(0.25, 0.5) == -50.0
    assert privleak(1.0, 0.4772) == pytest.approx(100 * 0.5228 / 0.4772)
    assert privleak(0.0, 0.4772) == -100.0  # MUSE's sense: no forget text scores below a holdout text


# Errors

OK = [0.5, 0.5]
ERRORS = {
    "ragged": (
        lambda: truth_ratio(OK, [[1.0], [1.0, 2.0]]),
        r"`wrong` must be numbers of shape \(n, k\).*fill up rows",
    ),
    "words": (lambda: min_k(["a"]), r"`logp` must be numbers of shape \(n,\)"),
    "empty": (lambda: truth_ratio([], [[]]), r"`right` must have shape \(n,\).*its shape is \(0,\)"),
    "flat": (lambda: truth_ratio(OK, OK), r"`wrong` must have shape \(n, k\).*its shape is \(2,\): reshape it"),
    "no options": (lambda: normalized_probability(OK, [[], []]), r"`wrong` must.*its shape is \(2, 0\)"),
    "rows": (lambda: truth_ratio(OK, [[1.0]]), "one row for each question, but have 2 and 1: give both"),
    "nan row": (lambda: truth_ratio(OK, [[1.0, 2.0], [NAN, NAN]]), "row 1 of `wrong` must have.*all its 2 numbers"),
    "nan right": (
        lambda: truth_ratio([0.5, NAN], [OK, OK]),
        r"`right` must be finite, but number 1 is nan \(1 of 2 are",
    ),
    "infinite": (lambda: truth_ratio(OK, [OK, [1.0, INF]]), "`wrong` must be finite, or NaN.*number 1, 1 is inf"),
    "form": (lambda: truth_ratio(OK, [OK, OK], "harmonic"), "`form` must be 'geometric' or 'arithmetic', not 'harm"),
    "kind": (lambda: truth_ratio_score(OK, "retain"), "`kind` must be 'forget', 'utility' or 'mem.*not 'retain'"),
    "ratio": (lambda: truth_ratio_score([0.5, -1.0], "forget"), "`ratios` must be at or above 0, but number 1 is -1.0"),
    "ratio nan": (lambda: truth_ratio_score([NAN], "utility"), "`ratios` must be at or above 0, but number 0 is nan"),
    "no sample": (lambda: forget_quality(OK, []), "`truth_ratio_retain` must have shape"),
    "sample": (
        lambda: forget_quality([NAN], OK),
        "`truth_ratio_unlearned` must be at or above 0.*not their logarithms",
    ),
    "no part": (lambda: model_utility({}), "got none at all"),
    "part": (lambda: model_utility({"a": NAN, "b": 0.5, "c": -1.0}), "got {'a': nan, 'c': -1.0}: measure these parts"),
    "missing part": (lambda: model_utility({"a": None, "b": INF}), "got {'a': None, 'b': inf}"),
    "lengths": (lambda: exact_memorization([1, 2], [1]), "of the same tokens, but are 2 and 1 long"),
    "ignored": (
        lambda: extraction_strength([1, 2], [-100, 2]),
        "`labels` must be token ids.*number 0 is -100.0.*ignored",
    ),
    "logits": (lambda: exact_memorization([1.5], [1]), "`predictions` must be token ids.*take the argmax"),
    "batch": (lambda: exact_memorization([[1]], [[1]]), r"`predictions` must have shape \(n,\).*\(1, 1\)"),
    "no token": (lambda: extraction_strength([], []), "`predictions` must have shape"),
    "fraction": (lambda: min_k(OK, k=40), "`k` must be a fraction above 0 and at most 1, not 40: 0.4 means"),
    "no fraction": (lambda: min_k_plus_plus(OK, OK, OK, k=0), "`k` must be a fraction"),
    "logp": (lambda: min_k([-INF]), "`logp` must be finite, but number 0 is -inf"),
    "positions": (lambda: min_k_plus_plus(OK, OK, [1.0]), "one number for each token, but have 2, 2 and 1"),
    "deviation": (lambda: min_k_plus_plus(OK, OK, [1, -1]), "`std` must be at or above 0.*square root"),
    "text": (lambda: zlib_score(1.0, ""), "got 1.0 for 0 characters"),
    "nll": (lambda: zlib_score(NAN, "a"), "got nan for 1 characters: leave empty texts out"),
    "scores": (lambda: auc(OK, [NAN]), "`nonmembers` must be finite"),
    "no member": (lambda: auc([], OK), "`members` must have shape"),
    "percent": (lambda: privleak(47.7, 0.5), "but got 47.7 and 0.5: give areas, not percentages"),
    "divides": (lambda: privleak(0.5, 0.0), "above 0 because it divides"),
    "nan auc": (lambda: privleak(NAN, 0.5), "AUCs must be from 0 to 1"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(call, message):
    with pytest.raises((DataError, ConfigError), match=message):
        call()
