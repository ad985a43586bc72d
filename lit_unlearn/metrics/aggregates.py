"""Scores over scores: Memorization, Privacy, Utility and Overall, as the tables of open-unlearning have them.

Each is a harmonic mean, so that one bad part cannot be made up for by the others. Dorna et al., "OpenUnlearning: Accelerating
LLM Unlearning via Unified Benchmarking of Methods and Metrics", 2025 (arXiv 2506.12618).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lit_unlearn.errors import DataError
from lit_unlearn.metrics.validation import check_share, read_finite, read_shares, refuse_bad

HARMONIC_FLOOR = 1e-12
"""Smallest part of a harmonic mean, as in published code: a part at 0 gives a tiny mean, and no division by zero."""


def harmonic_mean(scores: ArrayLike) -> float:
    """Compute the harmonic mean of scores, those below 1e-12 counted as 1e-12.

    Args:
        scores: Numbers at or above 0, shape ``(n,)``.

    Raises:
        DataError: If there is no score, or one is negative or not finite.

    Example:
        >>> round(harmonic_mean([0.5, 1.0]), 4)
        0.6667
        >>> round(harmonic_mean([0.0, 1.0]), 14)
        2e-12
    """
    parts = read_finite("scores", scores)
    refuse_bad("scores", parts, parts < 0, "at or above 0", "give shares or ratios, not differences")
    return float(len(parts) / (1 / np.maximum(parts, HARMONIC_FLOOR)).sum())


def memorization_score(
    extraction_strength: float, exact_memorization: float, paraphrase_probability: float, truth_ratio: float
) -> float:
    """Compute how little of the forget set a model still knows: 1 means that no part shows any knowledge.

    The harmonic mean of 1 − extraction strength, 1 − exact memorization, 1 − paraphrase probability and 1 − truth ratio.

    Args:
        extraction_strength: Mean over the forget set, from 0 to 1.
        exact_memorization: Likewise.
        paraphrase_probability: Likewise: mean of exp(−NLL per token) of the paraphrased answer.
        truth_ratio: Mean share of the right answer, p / (p + p_wrong), which ``truth_ratio_score(ratios, "memorization")``
            gives. Not TOFU's mean min(R, 1/R), which is *high* for a model that knows nothing.

    Raises:
        DataError: If a number is not from 0 to 1.

    Example:
        >>> round(memorization_score(0.0, 0.5, 0.0, 0.5), 4)
        0.6667
    """
    shares = {
        "extraction_strength": extraction_strength,
        "exact_memorization": exact_memorization,
        "paraphrase_probability": paraphrase_probability,
        "truth_ratio": truth_ratio,
    }
    return harmonic_mean([1 - check_share(name, share) for name, share in shares.items()])


def attack_score(auc: float, auc_retain: float) -> float:
    """Compute how near a membership attack's AUC is to that against the retain-only model: 1 means that they are equal.

    clip(1 − abs(AUC − AUC_retain) / AUC_retain, 0, 1), called s_mia in tables.

    Args:
        auc: Of the unlearned model, from 0 to 1.
        auc_retain: Of the retain-only model, above 0 and at most 1, by the same attack on the same rows.

    Raises:
        DataError: If an AUC is out of range.

    Example:
        >>> attack_score(auc=0.25, auc_retain=0.5)
        0.5
    """
    check_share("auc", auc)
    if check_share("auc_retain", auc_retain) == 0:
        raise DataError(
            "`auc_retain` must be above 0, because it divides, but is 0: an attack that never ranks a member first has its "
            "sign the wrong way round.",
            argument="auc_retain",
        )
    return min(1.0, max(0.0, 1 - abs(auc - auc_retain) / auc_retain))


def privacy_score(attack_scores: ArrayLike, uds: float | None = None) -> float:
    """Compute how hard it is to tell the unlearned model from the retain-only model: the harmonic mean of attack scores.

    Args:
        attack_scores: From ``attack_score``, shape ``(n,)``; published tables have those of the attacks loss, zlib, Min-K and
            Min-K++.
        uds: Unlearning Depth Score, from 0 to 1, for the variant HM(HM(attack scores), UDS) of arXiv 2605.24614; ``None`` for
            the one without. Say beside the number which of both it is.

    Raises:
        DataError: If there is no score, or one is not from 0 to 1.

    Example:
        >>> round(privacy_score([0.5, 1.0]), 4), round(privacy_score([0.5, 1.0], uds=1.0), 4)
        (0.6667, 0.8)
    """
    attacks = harmonic_mean(read_shares("attack_scores", attack_scores))
    return attacks if uds is None else harmonic_mean([attacks, check_share("uds", uds)])


def utility_score(model_utility: float, fluency: float) -> float:
    """Compute the harmonic mean of model utility and the fluency of answers to forget questions.

    Published tables divide it by the target model's: see ``relative_utility``.

    Args:
        model_utility: TOFU's, from 0 to 1.
        fluency: Mean probability, from 0 to 1, that a generated forget answer is no gibberish. Published code takes it from a
            classifier; ``fluency_share`` is a stand-in without a download, and is to be named beside the number.

    Raises:
        DataError: If a number is not from 0 to 1.

    Example:
        >>> round(utility_score(0.6, 0.9), 4)
        0.72
    """
    return harmonic_mean([check_share("model_utility", model_utility), check_share("fluency", fluency)])


def relative_utility(utility: float, utility_target: float) -> float:
    """Compute the utility of an unlearned model as a multiple of the target model's; above 1 where it is the better one.

    Args:
        utility: From ``utility_score``, from 0 to 1.
        utility_target: The same of the target model, above 0.

    Raises:
        DataError: If a number is out of range.

    Example:
        >>> relative_utility(0.3, utility_target=0.6)
        0.5
    """
    check_share("utility", utility)
    if check_share("utility_target", utility_target) == 0:
        raise DataError(
            "`utility_target` must be above 0, because it divides, but is 0: a target model without utility has none to lose.",
            argument="utility_target",
        )
    return utility / utility_target


def overall_score(memorization: float, privacy: float, relative_utility: float) -> float:
    """Compute the harmonic mean of Memorization, Privacy and the relative Utility.

    Args:
        memorization: From ``memorization_score``.
        privacy: From ``privacy_score``, with or without UDS: say which beside the number.
        relative_utility: From ``relative_utility``, at or above 0.

    Raises:
        DataError: If a number is out of range.

    Example:
        >>> round(overall_score(0.5, 1.0, 1.0), 4)
        0.75
    """
    if not 0 <= relative_utility < math.inf:
        raise DataError(
            f"`relative_utility` must be finite and at or above 0, but is {relative_utility}: give the unlearned model's utility "
            "over the target model's.",
            argument="relative_utility",
        )
    parts: Sequence[float] = (
        check_share("memorization", memorization),
        check_share("privacy", privacy),
        relative_utility,
    )
    return harmonic_mean(parts)
