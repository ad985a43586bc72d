"""Scores of robustness: does a value stay as it is when the model is fine-tuned a little, or rounded?

They judge a *value* by what it does to unlearned models: a good one is moved by an attack no more than by the same attack on the
retain-only model. The forms are those of published code for arXiv 2605.24614, where higher means that more is known; name them
beside the numbers, because other papers have others.
"""

from __future__ import annotations

import math

from lit_unlearn.errors import DataError
from lit_unlearn.metrics.aggregates import harmonic_mean
from lit_unlearn.metrics.validation import check_share


def relearning_robustness(
    retain_before: float, retain_after: float, unlearned_before: float, unlearned_after: float
) -> float:
    """Compute R = min(Δ_retain / Δ_unlearned, 1), with Δ = before − after relearning.

    1 if the unlearned model regains no more than the retain-only model gains by the same steps; below 1 if the knowledge was
    only hidden. An unlearned model that does not move gives 1, and one that moves against the retain-only model 0.

    Args:
        retain_before: Value of the retain-only model.
        retain_after: The same after relearning; published code takes one epoch at a learning rate of 2e-5.
        unlearned_before: Value of the unlearned model.
        unlearned_after: The same after relearning, with equal settings.

    Returns:
        From 0 to 1.

    Raises:
        DataError: If a number is not finite.

    Example:
        >>> relearning_robustness(0.25, 0.5, unlearned_before=0.0, unlearned_after=0.5)
        0.5
    """
    _check_finite(
        retain_before=retain_before,
        retain_after=retain_after,
        unlearned_before=unlearned_before,
        unlearned_after=unlearned_after,
    )
    change_retain = retain_before - retain_after
    change_unlearned = unlearned_before - unlearned_after
    if change_unlearned == 0:
        return 1.0
    # Published code lets a negative ratio through, of which there is no harmonic mean.
    return min(1.0, max(0.0, change_retain / change_unlearned))


def quantization_robustness(before: float, after: float) -> float:
    """Compute Q = min(after / before, 1): 1 if rounding the weights takes nothing from the value of the unlearned model.

    Args:
        before: Value of the unlearned model, at or above 0.
        after: The same with rounded weights; published code takes NF4, 4 bits.

    Returns:
        From 0 to 1; 1 if ``before`` is 0, from which nothing can be taken.

    Raises:
        DataError: If a number is negative or not finite.

    Example:
        >>> quantization_robustness(before=0.5, after=0.25)
        0.5
    """
    _check_finite(before=before, after=after)
    for name, value in {"before": before, "after": after}.items():
        if value < 0:
            message = (
                f"`{name}` must be at or above 0, but is {value}: give a value whose 0 means that nothing is left."
            )
            raise DataError(message, argument=name)
    return 1.0 if before == 0 else min(1.0, after / before)


def robustness_score(relearning: float, quantization: float) -> float:
    """Compute the harmonic mean of R and Q.

    Args:
        relearning: R, from ``relearning_robustness``.
        quantization: Q, from ``quantization_robustness``.

    Raises:
        DataError: If a number is not from 0 to 1.

    Example:
        >>> round(robustness_score(0.5, 1.0), 4)
        0.6667
    """
    return harmonic_mean([check_share("relearning", relearning), check_share("quantization", quantization)])


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            message = f"`{name}` must be finite, but is {value}: look for a model that diverged."
            raise DataError(message, argument=name)
