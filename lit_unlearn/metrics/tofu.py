"""TOFU's scores of likelihoods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics.validation import Array, read_finite, read_numbers, read_ratios, refuse_bad


def truth_ratio(right: ArrayLike, wrong: ArrayLike, form: Literal["geometric", "arithmetic"] = "geometric") -> Array:
    """Compute the likelihood of wrong answers over the right one's: small where the model knows, about 1 elsewhere.

    Geometric, as the published code computes it: R = exp(right − mean_k wrong_k), the geometric mean of the wrong
    answers' probabilities over the right one's. Arithmetic, as the paper writes it:
    R = mean_k exp(−wrong_k) / exp(−right), which is never smaller. Maini et al., "TOFU: A Task of Fictitious
    Unlearning for LLMs", 2024 (arXiv 2401.06121).

    Args:
        right: Mean NLL of the right answer, shape ``(n,)``, nats per token; TOFU takes the paraphrased answer on the
            forget and retain sets.
        wrong: Mean NLL of each wrong answer, shape ``(n, k)``, nats per token. NaN fills up rows with fewer than k.
        form: Kind of mean of the wrong answers' probabilities.

    Returns:
        R of each row, shape ``(n,)``, from 0 to infinity.

    Raises:
        DataError: If shapes do not fit, a row has no wrong answer, or a number is infinite.
        ConfigError: If ``form`` is neither.

    Example:
        >>> from math import log, nan
        >>> wrong = [[log(8), log(2)], [log(8), nan]]
        >>> truth_ratio([log(2), log(4)], wrong).round(4)
        array([0.5, 0.5])
        >>> truth_ratio([log(2), log(4)], wrong, form="arithmetic").round(4)
        array([0.625, 0.5  ])
    """
    right_nll, wrong_nll = _read_losses(right, wrong)
    if form == "geometric":
        log_ratio = right_nll - np.nanmean(wrong_nll, axis=1)
    elif form == "arithmetic":
        log_ratio = right_nll + _log_sum(wrong_nll) - np.log((~np.isnan(wrong_nll)).sum(axis=1))
    else:
        raise ConfigError(f"`form` must be 'geometric' or 'arithmetic', not {form!r}.")
    # Infinity is the right end of the scale, and `truth_ratio_score` takes it.
    with np.errstate(over="ignore"):
        ratio: Array = np.exp(log_ratio)
    return ratio


def truth_ratio_score(ratios: ArrayLike, kind: Literal["forget", "utility", "memorization"]) -> float:
    """Compute TOFU's mean truth ratio, from 0 to 1, where 1 is best on that set; or that of ``memorization_score``, 1 is worst.

    Args:
        ratios: Truth ratios R, shape ``(n,)``, from 0 to infinity.
        kind: ``"forget"`` gives mean min(R, 1/R): does the model prefer neither side? ``"utility"``, for the retain
            set, real authors and world facts, gives mean max(0, 1 − R): does it prefer the right answer?
            ``"memorization"`` gives mean 1 / (1 + R), the share of the right answer: how sure is the model of it?

    Raises:
        DataError: If there is no ratio, or one is negative or NaN.

    Example:
        >>> truth_ratio_score([0.5, 4.0], kind="forget"), truth_ratio_score([0.5, 4.0], kind="utility")
        (0.375, 0.25)
    """
    ratio = read_ratios("ratios", ratios)
    if kind == "forget":
        # R = 0 makes 1/R infinite, and the minimum 0.
        with np.errstate(divide="ignore", over="ignore"):
            return float(np.minimum(ratio, 1 / ratio).mean())
    if kind == "utility":
        return float(np.maximum(0, 1 - ratio).mean())
    if kind == "memorization":
        return float((1 / (1 + ratio)).mean())
    raise ConfigError(f"`kind` must be 'forget', 'utility' or 'memorization', not {kind!r}.")


def normalized_probability(right: ArrayLike, wrong: ArrayLike) -> Array:
    """Compute the probability of the right answer among the given ones: TOFU's probability on real authors and world facts.

    p / (p + Σ_k p_k) with p = exp(−mean NLL), summed as logarithms, so that it holds where every p underflows.

    Args:
        right: Mean NLL of the right answer, shape ``(n,)``, nats per token.
        wrong: Mean NLL of each wrong answer, shape ``(n, k)``, nats per token. NaN fills up rows with fewer than k.

    Returns:
        Shape ``(n,)``, from 0 to 1.

    Raises:
        DataError: If shapes do not fit, a row has no wrong answer, or a number is infinite.

    Example:
        >>> normalized_probability([1000.0], [[1000.0, 1000.0, 1000.0]]).round(4)
        array([0.25])
    """
    right_nll, wrong_nll = _read_losses(right, wrong)
    share: Array = np.exp(-np.logaddexp(0, right_nll + _log_sum(wrong_nll)))
    return share


def model_utility(parts: Mapping[str, float]) -> float:
    """Compute the harmonic mean of what an unlearned model should still do: one part at 0 makes it 0.

    TOFU has nine parts: probability, ROUGE-L recall and truth ratio, each on the retain set, real authors and world
    facts.

    Args:
        parts: Each part's score, at or above 0.

    Raises:
        DataError: If there is no part, or one is missing (``None`` or NaN), infinite or negative.

    Example:
        >>> model_utility({"retain_probability": 0.5, "retain_rouge": 1.0})
        0.6666666666666666
    """
    unfit = {name: value for name, value in parts.items() if value is None or not 0 <= value < math.inf}
    if unfit or not parts:
        raise DataError(
            f"model utility is the harmonic mean of finite scores at or above 0, but got {unfit or 'none at all'}: "
            "measure these parts, or leave them out and say so beside the result."
        )
    return float(statistics.harmonic_mean([float(value) for value in parts.values()]))


def _read_losses(right: ArrayLike, wrong: ArrayLike) -> tuple[Array, Array]:
    """Return both as arrays with one row per question and at least one wrong answer in every row."""
    right_nll, wrong_nll = read_finite("right", right), read_numbers("wrong", wrong, ndim=2)
    if len(right_nll) != len(wrong_nll):
        raise DataError(
            f"`right` and `wrong` must have one row for each question, but have {len(right_nll)} and {len(wrong_nll)}: "
            "give both for the same questions, in the same order."
        )
    expected = "finite, or NaN where a row has fewer answers"
    refuse_bad("wrong", wrong_nll, np.isinf(wrong_nll), expected, "look for empty answers")
    empty = np.flatnonzero(np.isnan(wrong_nll).all(axis=1))
    if len(empty):
        raise DataError(
            f"row {empty[0]} of `wrong` must have at least one wrong answer, but all its {wrong_nll.shape[1]} numbers are "
            "NaN: leave the row out, or look for a model that diverged."
        )
    return right_nll, wrong_nll


def _log_sum(wrong: Array) -> Array:
    """Compute the logarithm of the sum of the wrong answers' probabilities, of each row."""
    # A missing answer has probability 0. Never summed as probabilities: those of long answers underflow.
    total: Array = np.logaddexp.reduce(np.where(np.isnan(wrong), -np.inf, -wrong), axis=1)
    return total
