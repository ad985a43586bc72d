"""The Unlearning Depth Score: how much of what a target model knows about a text, layer by layer, unlearning has erased."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics.validation import Array, read_numbers, refuse_bad

KNOWLEDGE_THRESHOLD = 0.05
"""Drop above which a layer holds knowledge, nats per token, as published."""


def unlearning_depth(
    retain_drop: ArrayLike, unlearned_drop: ArrayLike, threshold: float = KNOWLEDGE_THRESHOLD
) -> Array:
    """Compute the share of a target model's knowledge that unlearning has erased, for each example.

    A drop is what the target model's mean log p of the example's tokens loses if its hidden states after one layer are replaced
    by another model's. Layers in which those of the retain-only model lose more than the threshold hold the knowledge. Over
    these: Σ Δ1 · clip(Δ2 / Δ1, 0, 1) / Σ Δ1, with Δ1 the drop by the retain-only model and Δ2 that by the unlearned one.
    Lee et al. 2026 (arXiv 2605.24614).

    Args:
        retain_drop: Δ1, shape ``(examples, layers)``, nats per token.
        unlearned_drop: Δ2, of the same shape.
        threshold: Drop above which a layer holds knowledge, at least 0, nats per token.

    Returns:
        Shape ``(examples,)``: 0 where nothing is erased, 1 where no more is left than in the retain-only model, NaN where no layer
        holds knowledge. Given the transposed arrays, the same for each layer over all examples.

    Raises:
        DataError: If shapes differ or a number is not finite.
        ConfigError: If the threshold is below 0.

    Example:
        >>> unlearning_depth([[0.0, 1.0, 2.0]], [[0.7, 0.25, 3.0]])  # (0.25 + 2) / (1 + 2)
        array([0.75])
        >>> unlearning_depth([[0.01, -0.2, 0.04]], [[1.0, 1.0, 1.0]])
        array([nan])
    """
    reference = _read_drops("retain_drop", retain_drop)
    drop = _read_drops("unlearned_drop", unlearned_drop)
    if reference.shape != drop.shape:
        raise DataError(
            f"`retain_drop` and `unlearned_drop` must have one number for each example and layer, but have the shapes "
            f"{reference.shape} and {drop.shape}: measure both on the same examples."
        )
    if not threshold >= 0:
        raise ConfigError(
            f"`threshold` must be at least 0, not {threshold!r}: below, a layer without knowledge would count."
        )

    knowledge = np.where(reference > threshold, reference, 0.0)
    # Δ1 · clip(Δ2 / Δ1, 0, 1) without the division, which Δ1 = 0 would spoil.
    erased = np.clip(drop, 0.0, knowledge)
    total = knowledge.sum(axis=1)
    scores = np.full(len(total), np.nan)
    np.divide(erased.sum(axis=1), total, out=scores, where=total > 0)
    return scores


def mean_unlearning_depth(
    retain_drop: ArrayLike, unlearned_drop: ArrayLike, threshold: float = KNOWLEDGE_THRESHOLD
) -> float:
    """Compute the Unlearning Depth Score: the mean of `unlearning_depth` over the examples with a layer that holds knowledge.

    Args:
        retain_drop: As for `unlearning_depth`.
        unlearned_drop: As for `unlearning_depth`.
        threshold: As for `unlearning_depth`.

    Returns:
        From 0, the target model, to 1, the retain-only model.

    Raises:
        DataError: As for `unlearning_depth`, or if there is no such example.
        ConfigError: If the threshold is below 0.

    Example:
        >>> mean_unlearning_depth([[1.0, 2.0], [0.5, 0.0], [0.0, 0.0]], [[1.0, 0.5], [0.0, 0.0], [1.0, 1.0]])
        0.25
    """
    scores = unlearning_depth(retain_drop, unlearned_drop, threshold)
    with_knowledge = scores[~np.isnan(scores)]
    if not with_knowledge.size:
        raise DataError(
            f"no layer of any of the {len(scores)} examples has a `retain_drop` above `threshold` ({threshold:g}): the target model "
            "knows no more about them than the retain-only model. Give examples that it was trained on, in the prompt of training."
        )
    return float(with_knowledge.mean())


def _read_drops(name: str, values: ArrayLike) -> Array:
    array = read_numbers(name, values, ndim=2)
    refuse_bad(name, array, ~np.isfinite(array), "finite", "look for a model that diverged, or one in float16")
    return array
