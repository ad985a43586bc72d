"""How much of a text a model gives back: token by token, from a prefix on, or in words."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_unlearn.metrics.validation import finite, refuse


def exact_memorization(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of an answer's tokens that the model ranks first when it is given all tokens before.

    Tirumala et al., "Memorization Without Overfitting", 2022 (arXiv 2205.10770).

    Args:
        predictions: Most likely token at each position, teacher-forced, shape ``(n,)``.
        labels: Token there, shape ``(n,)``, ignored ones removed.

    Raises:
        ValueError: If lengths differ, there is no token, or the numbers are no token ids.

    Example:
        >>> exact_memorization([5, 9, 7, 8], [5, 6, 7, 8])
        0.75
    """
    return float(_hits(predictions, labels).mean())


def extraction_strength(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of an answer that the model completes without an error, once it has the tokens before.

    1 − k / n, with k the first position from which on every prediction is right: greedy decoding from there reproduces
    the rest. 0 where the last one is wrong; open-unlearning gives 1 / n there. Carlini et al., "Extracting Training
    Data from Large Language Models", 2021 (arXiv 2012.07805).

    Args:
        predictions: Most likely token at each position, teacher-forced, shape ``(n,)``.
        labels: Token there, shape ``(n,)``, ignored ones and the end of sequence removed.

    Raises:
        ValueError: If lengths differ, there is no token, or the numbers are no token ids.

    Example:
        >>> extraction_strength([5, 9, 7, 8], [5, 6, 7, 8])
        0.5
    """
    hits = _hits(predictions, labels)
    needed = np.flatnonzero(~hits)[-1:] + 1  # tokens up to the last error, empty without one
    return 1 - int(needed.sum()) / len(hits)


def rouge(prediction: str, reference: str, stemmer: bool = True) -> dict[str, float]:
    """Overlap of words between a generated answer and the reference, by the ``rouge_score`` package.

    It knows only the letters a to z and digits: texts in other scripts score 0. Lin, "ROUGE: A Package for Automatic
    Evaluation of Summaries", 2004.

    Args:
        prediction: What the model wrote; an empty one scores 0.
        reference: What it should have written; an empty one scores 0.
        stemmer: Whether word endings are cut first: TOFU does, MUSE does not.

    Returns:
        ``rouge1_recall``, ``rouge1_f1``, ``rougeL_recall`` and ``rougeL_f1``, from 0 to 1. TOFU reports
        ``rougeL_recall``, MUSE ``rougeL_f1``.

    Example:
        >>> rouge("He writes many poems.", "She writes a poem")
        {'rouge1_recall': 0.5, 'rouge1_f1': 0.5, 'rougeL_recall': 0.5, 'rougeL_f1': 0.5}
    """
    scores = _rouge_scorer(stemmer).score(target=reference, prediction=prediction)
    return {
        f"{name}_{measure}": float(getattr(scores[name], field))
        for name in ("rouge1", "rougeL")
        for measure, field in (("recall", "recall"), ("f1", "fmeasure"))
    }


@cache
def _rouge_scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)


def _hits(predictions: ArrayLike, labels: ArrayLike) -> NDArray[np.bool_]:
    """Where the prediction is right, of one sequence."""
    predicted, wanted = finite("predictions", predictions), finite("labels", labels)
    for name, ids in {"predictions": predicted, "labels": wanted}.items():
        remedy = "take the argmax of the logits, and remove ignored tokens such as -100"
        refuse(name, ids, (ids < 0) | (ids % 1 > 0), "token ids, integers at or above 0", remedy)
    if len(predicted) != len(wanted):
        raise ValueError(
            f"`predictions` and `labels` must be of the same tokens, but are {len(predicted)} and {len(wanted)} long: "
            "the prediction of a token stands one position before it, and prompt and padding are left out."
        )
    hits: NDArray[np.bool_] = predicted == wanted
    return hits
