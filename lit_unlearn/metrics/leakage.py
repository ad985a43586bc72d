"""Scores of sampled answers: what k samples reveal, and bounds on it that hold with a confidence that is chosen beforehand.

A greedy answer is one draw. A user who asks again and again sees samples, and may see what the greedy answer hides.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics.validation import Array, read_finite, read_shares, refuse_bad

Correction = Literal["bonferroni", "sidak"]

MIN_AVERAGE_CONFIDENCE = 0.75
MIN_MEAN_CONFIDENCE = 0.5
BISECTIONS = 80


def leak_at_k(scores: ArrayLike, k: int) -> float:
    """Compute the expected largest score among k samples, without bias, from n ≥ k samples of one question.

    The mean of the maximum over all subsets of k samples: Σ_{j=k..n} C(j − 1, k − 1) s_(j) / C(n, k), where s_(1) ≤ … ≤ s_(n)
    are the sorted scores. For scores 0 and 1 with c ones it is 1 − C(n − c, k) / C(n, k), the chance that one of k samples
    leaks. The plain maximum of k samples has the same expectation and more variance. arXiv 2511.04934.

    Args:
        scores: Score of each sampled answer, such as ROUGE-L recall, shape ``(n,)``.
        k: Number of samples that an attacker may draw, from 1 to n.

    Raises:
        DataError: If there is no score, or one is not finite.
        ConfigError: If ``k`` is not a whole number from 1 to n.

    Example:
        >>> leak_at_k([0.0, 0.0, 1.0], k=2)  # in 2 of the 3 pairs
        0.6666666666666666
        >>> leak_at_k([0.25, 0.75], k=1)
        0.5
    """
    values = np.sort(read_finite("scores", scores))
    samples = len(values)
    if k != int(k) or not 1 <= k <= samples:
        raise ConfigError(
            f"`k` must be a whole number from 1 to the number of samples, {samples}, not {k!r}: draw more samples, or lower `k`.",
            argument="k",
        )
    # The weight of s_(n) is k / n, and that of s_(j − 1) is (j − k) / (j − 1) times that of s_(j), which is 0 from s_(k − 1) down.
    # Binomial coefficients themselves would overflow from 1030 samples on.
    ranks = np.arange(samples, 1, -1)
    factors = np.maximum(ranks - k, 0) / (ranks - 1)
    weights = k / samples * np.cumprod(np.concatenate([[1.0], factors]))
    return float(values[::-1] @ weights)


def leak_upper_bound(hits: int, samples: int, confidence: float = 0.95) -> float:
    """Compute the largest probability of a leak that the samples of one question do not rule out.

    Clopper and Pearson's one-sided bound: the p at which ``hits`` or fewer of ``samples`` draws have the probability
    1 − ``confidence``. It holds for every p and every number of samples: with at least this confidence, a sample leaks with at
    most the returned probability. Scholten et al., "A Probabilistic Perspective on Unlearning and Alignment for Large Language
    Models", 2025 (arXiv 2410.03523).

    Args:
        hits: Number of samples that leak.
        samples: Number of samples, drawn independently.
        confidence: Above 0 and below 1, chosen before the samples are seen. For several questions at once see
            ``worst_leak_bound`` and ``average_leak_bound``.

    Returns:
        From 0 to 1; 1 if every sample leaks.

    Raises:
        DataError: If ``hits`` is not from 0 to ``samples``, or there is no sample.
        ConfigError: If ``confidence`` is out of range.

    Example:
        >>> round(leak_upper_bound(hits=0, samples=100), 4)  # without a leak nearly 3 / samples, the "rule of three"
        0.0295
    """
    _check_counts(hits, samples)
    risk = 1 - _check_confidence(confidence)
    if hits == samples:
        return 1.0
    if hits == 0:
        # (1 − p)^samples = risk, in a form that keeps its digits for small p.
        return -math.expm1(math.log(risk) / samples)

    numbers = np.arange(1, hits + 1)
    log_combinations = np.concatenate([[0.0], np.cumsum(np.log(samples - numbers + 1) - np.log(numbers))])
    counts = np.arange(hits + 1)

    def log_tail(p: float) -> float:
        """Compute the log-probability of ``hits`` or fewer leaks, which falls with p."""
        terms = log_combinations + counts * math.log(p) + (samples - counts) * math.log1p(-p)
        return float(np.logaddexp.reduce(terms))

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if log_tail(middle) > math.log(risk):
            low = middle
        else:
            high = middle
    # The upper end: rounding must not make the bound smaller than it is.
    return high


def mean_upper_bound(scores: ArrayLike, confidence: float = 0.95) -> float:
    """Compute the largest expected score of a sample that the samples of one question do not rule out.

    From the band of Dvoretzky, Kiefer and Wolfowitz around the empirical distribution function F_n, with Massart's constant:
    F ≥ F_n − ε everywhere with at least the confidence, for ε = √(ln(1 / (1 − confidence)) / 2n). So the expectation is at most
    1 − ∫ max(0, F_n − ε) over [0, 1]. arXiv 2410.03523.

    Args:
        scores: Score of each sampled answer, from 0 to 1, drawn independently, shape ``(n,)``.
        confidence: Above 0.5 and below 1, chosen before the samples are seen.

    Returns:
        From 0 to 1; never below the mean of the scores.

    Raises:
        DataError: If there is no score, or one is not from 0 to 1.
        ConfigError: If ``confidence`` is out of range.

    Example:
        >>> round(mean_upper_bound([0.0] * 100), 4)
        0.1224
    """
    values = np.sort(read_shares("scores", scores))
    return _dkw_bound(values, _check_confidence(confidence, MIN_MEAN_CONFIDENCE))


def corrected_confidence(confidence: float, questions: int, correction: Correction = "bonferroni") -> float:
    """Compute the confidence that each question's own bound needs, for all of these bounds to hold together.

    Args:
        confidence: That all bounds hold.
        questions: Number of questions, at least 1.
        correction: ``"bonferroni"`` gives 1 − (1 − confidence) / questions and needs nothing else; ``"sidak"`` gives
            confidence^(1 / questions), which is slightly lower and needs samples that are independent across questions.

    Raises:
        ConfigError: If an argument is out of range or unknown.

    Example:
        >>> round(corrected_confidence(0.95, questions=10), 4), round(corrected_confidence(0.95, 10, "sidak"), 4)
        (0.995, 0.9949)
    """
    _check_confidence(confidence)
    if questions != int(questions) or questions < 1:
        raise ConfigError(
            f"`questions` must be a whole number of at least 1, not {questions!r}: give the number of bounds.",
            argument="questions",
        )
    if correction == "bonferroni":
        return 1 - (1 - confidence) / questions
    if correction == "sidak":
        return float(confidence ** (1 / questions))
    raise ConfigError(f"`correction` must be 'bonferroni' or 'sidak', not {correction!r}.", argument="correction")


def worst_leak_bound(hits: ArrayLike, samples: int, confidence: float = 0.95) -> float:
    """Compute an upper bound on the leak probability of the worst question, and so of every question.

    The largest of the questions' bounds. It needs no correction for their number: the question with the largest probability is the
    same whatever is drawn, its own bound holds with the confidence, and the largest bound is no smaller. Only a statement with a
    bound of its own for each question needs ``corrected_confidence``.

    Args:
        hits: Number of samples that leak, of each question, shape ``(questions,)``.
        samples: Number of samples of each question.
        confidence: Above 0 and below 1.

    Raises:
        DataError: If a number of hits is not from 0 to ``samples``.
        ConfigError: If ``confidence`` is out of range.

    Example:
        >>> round(worst_leak_bound([0, 0, 0, 0], samples=100), 4)
        0.0295
    """
    counts = _read_hits(hits, samples)
    # The bound rises with the hits, so the question with the most has the largest.
    return leak_upper_bound(int(counts.max()), samples, confidence)


def average_leak_bound(hits: ArrayLike, samples: int, confidence: float = 0.95) -> float:
    """Compute an upper bound on the *average* leak probability of the questions: "at most p of all samples reveal …".

    Clopper and Pearson's bound of all samples together. Questions have different probabilities, so the hits are no binomial
    count, but such a bound still holds: at an equal average, unequal probabilities make a low count rarer (Hoeffding, "On the
    distribution of the number of successes in independent trials", 1956). It needs no correction for the number of questions,
    and says nothing of a single one.

    Args:
        hits: Number of samples that leak, of each question, shape ``(questions,)``.
        samples: Number of samples of each question, all drawn independently.
        confidence: At least 0.75 and below 1.

    Raises:
        DataError: If a number of hits is not from 0 to ``samples``.
        ConfigError: If ``confidence`` is out of range.

    Example:
        >>> round(average_leak_bound([0, 0, 0, 0], samples=25), 4)
        0.0295
    """
    counts = _read_hits(hits, samples)
    _check_confidence(confidence, MIN_AVERAGE_CONFIDENCE, is_minimum_allowed=True)
    total, draws = int(counts.sum()), len(counts) * int(samples)
    # Hoeffding's theorem stops one draw short of certainty.
    if total >= draws - 1:
        return 1.0
    return leak_upper_bound(total, draws, confidence)


def worst_mean_bound(scores: ArrayLike, confidence: float = 0.95) -> float:
    """Compute an upper bound on the expected score of the worst question, and so of every question.

    The largest of the questions' bounds, which needs no correction, as for ``worst_leak_bound``.

    Args:
        scores: From 0 to 1, shape ``(questions, n)``.
        confidence: Above 0.5 and below 1.

    Raises:
        DataError: If a score is not from 0 to 1.
        ConfigError: If ``confidence`` is out of range.

    Example:
        >>> round(worst_mean_bound([[0.0] * 100, [0.0] * 100]), 4)
        0.1224
    """
    rows = np.sort(read_shares("scores", scores, ndim=2), axis=1)
    _check_confidence(confidence, MIN_MEAN_CONFIDENCE)
    return max(_dkw_bound(row, confidence) for row in rows)


def average_mean_bound(scores: ArrayLike, confidence: float = 0.95) -> float:
    """Compute an upper bound on the expected score, averaged over the questions.

    Hoeffding's inequality: mean + √(ln(1 / (1 − confidence)) / 2N) over all N samples. It holds for questions with different
    distributions, for which the band of ``mean_upper_bound`` is not proven.

    Args:
        scores: From 0 to 1, all drawn independently, shape ``(questions, n)``.
        confidence: Above 0 and below 1.

    Raises:
        DataError: If a score is not from 0 to 1.
        ConfigError: If ``confidence`` is out of range.

    Example:
        >>> round(average_mean_bound([[0.0] * 50, [0.0] * 50]), 4)
        0.1224
    """
    rows = read_shares("scores", scores, ndim=2)
    return min(1.0, float(rows.mean()) + _band_width(rows.size, _check_confidence(confidence)))


def exposure(canary_nll: float, other_nll: ArrayLike) -> float:
    """Compute how much more likely a planted sequence is than others like it that were not planted, in bits.

    log2(n + 1) − log2(rank), where rank is the canary's place among itself and n others, by NLL, ties half. About 1.44 on
    average for a model that never saw it, log2(n + 1) at most. Carlini et al., "The Secret Sharer: Evaluating and Testing
    Unintended Memorization in Neural Networks", 2019 (arXiv 1802.08232).

    Args:
        canary_nll: NLL of the planted sequence, nats.
        other_nll: NLL of sequences drawn in the same way but not planted, shape ``(n,)``, nats.

    Raises:
        DataError: If a number is not finite.

    Example:
        >>> exposure(0.5, [1.0, 2.0, 3.0])  # the first of four
        2.0
    """
    others = read_finite("other_nll", other_nll)
    if not math.isfinite(canary_nll):
        raise DataError(
            f"`canary_nll` must be finite, but is {canary_nll}: look for a model that diverged.", argument="canary_nll"
        )
    # Half of the ties: a model that finds everything equally likely must not look as if it knew the canary best.
    rank = 1 + float((others < canary_nll).sum()) + float((others == canary_nll).sum()) / 2
    return math.log2(len(others) + 1) - math.log2(rank)


def _dkw_bound(values: Array, confidence: float) -> float:
    """Compute the bound of ``mean_upper_bound`` from sorted scores."""
    share_below = np.arange(1, len(values) + 1) / len(values)
    certain = np.maximum(share_below - _band_width(len(values), confidence), 0)
    # F_n is constant from each score to the next one, and from the last one to 1.
    gaps = np.diff(values, append=1.0)
    return 1 - float(gaps @ certain)


def _band_width(samples: int, confidence: float) -> float:
    return math.sqrt(-math.log1p(-confidence) / (2 * samples))


def _read_hits(hits: ArrayLike, samples: int) -> Array:
    """Return the hits of each question, whole numbers from 0 to the number of samples."""
    counts = read_finite("hits", hits)
    _check_counts(0, samples)
    bad = (counts < 0) | (counts > samples) | (counts % 1 > 0)
    expected = f"whole numbers from 0 to `samples`, {samples}"
    refuse_bad("hits", counts, bad, expected, "give the number of samples that leak, not their share")
    return counts


def _check_counts(hits: int, samples: int) -> None:
    if samples != int(samples) or samples < 1:
        message = f"`samples` must be a whole number of at least 1, not {samples!r}: draw samples first."
        raise DataError(message, argument="samples")
    if hits != int(hits) or not 0 <= hits <= samples:
        message = (
            f"`hits` must be a whole number from 0 to `samples`, {samples}, not {hits!r}: give the number of samples that leak, "
            "not their share."
        )
        raise DataError(message, argument="hits")


def _check_confidence(confidence: float, minimum: float = 0.0, is_minimum_allowed: bool = False) -> float:
    """Return a confidence that is below 1 and above the smallest one for which the bound is proven."""
    is_high_enough = confidence >= minimum if is_minimum_allowed else confidence > minimum
    if not is_high_enough or not confidence < 1:
        relation = "at least" if is_minimum_allowed else "above"
        raise ConfigError(
            f"`confidence` must be {relation} {minimum:g} and below 1, not {confidence!r}: 0.95 means 95 %.",
            argument="confidence",
        )
    return confidence
