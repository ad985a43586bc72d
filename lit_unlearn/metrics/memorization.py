"""Scores of verbatim memorization: token by token, from a prefix on, or in words."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_unlearn.errors import DataError
from lit_unlearn.metrics.validation import read_finite, refuse_bad


def exact_memorization(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of an answer's tokens that the model ranks first when it is given all tokens before.

    Tirumala et al., "Memorization Without Overfitting", 2022 (arXiv 2205.10770).

    Args:
        predictions: Most likely token at each position, teacher-forced, shape ``(n,)``.
        labels: Token there, shape ``(n,)``, ignored ones removed.

    Raises:
        DataError: If lengths differ, there is no token, or the numbers are no token ids.

    Example:
        >>> exact_memorization([5, 9, 7, 8], [5, 6, 7, 8])
        0.75
    """
    return float(_find_hits(predictions, labels).mean())


def extraction_strength(predictions: ArrayLike, labels: ArrayLike, floor: bool = False) -> float:
    """Compute the share of an answer that the model completes without an error, once it has the tokens before.

    1 − k / n, with k the first position from which on every prediction is right: greedy decoding from there reproduces
    the rest. 0 where the last one is wrong. Carlini et al., "Extracting Training Data from Large Language Models", 2021
    (arXiv 2012.07805).

    Args:
        predictions: Most likely token at each position, teacher-forced, shape ``(n,)``.
        labels: Token there, shape ``(n,)``, ignored ones and the end of sequence removed.
        floor: Whether the smallest value is 1 / n instead of 0, as in the tables of open-unlearning, whose search ends at the last
            token. Say so beside the number: an answer of one token has 1 then, whatever the model predicts.

    Raises:
        DataError: If lengths differ, there is no token, or the numbers are no token ids.

    Example:
        >>> extraction_strength([5, 9, 7, 8], [5, 6, 7, 8])
        0.5
        >>> extraction_strength([5, 6, 7, 9], [5, 6, 7, 8]), extraction_strength([5, 6, 7, 9], [5, 6, 7, 8], floor=True)
        (0.0, 0.25)
    """
    hits = _find_hits(predictions, labels)
    # Tokens up to the last error; empty, and so 0, without an error.
    needed = int((np.flatnonzero(~hits)[-1:] + 1).sum())
    if floor:
        needed = min(needed, len(hits) - 1)
    return 1 - needed / len(hits)


def rouge(prediction: str, reference: str, stemmer: bool = True) -> dict[str, float]:
    """Compute the overlap of words between a generated answer and the reference, by the ``rouge_score`` package.

    It knows only the letters a to z and digits: texts in other scripts score 0, see `can_rouge_read`. Lin, "ROUGE: A Package for Automatic
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
    result = {}
    for name in ("rouge1", "rougeL"):
        result[f"{name}_recall"] = float(scores[name].recall)
        result[f"{name}_f1"] = float(scores[name].fmeasure)
    return result


def can_rouge_read(reference: str) -> bool:
    """Return whether at least half of a text's letters and digits are those that ROUGE knows, a to z and 0 to 9.

    Of any other text it would compare remains, or nothing, and find no overlap with the very same text.

    Example:
        >>> can_rouge_read("He lives in Zürich."), can_rouge_read("Он живёт в Цюрихе с 1990 года.")
        (True, False)
    """
    characters = [character for character in reference.lower() if character.isalnum()]
    known = sum(character.isascii() for character in characters)
    return known > 0 and 2 * known >= len(characters)


@cache
def _rouge_scorer(stemmer: bool) -> Any:
    # Imports nltk, which is slow.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)


def _find_hits(predictions: ArrayLike, labels: ArrayLike) -> NDArray[np.bool_]:
    """Return whether the prediction is right, for each token of one sequence."""
    predicted, expected = read_finite("predictions", predictions), read_finite("labels", labels)
    for name, ids in {"predictions": predicted, "labels": expected}.items():
        remedy = "take the argmax of the logits, and remove ignored tokens such as -100"
        refuse_bad(name, ids, (ids < 0) | (ids % 1 > 0), "token ids, integers at or above 0", remedy)
    # Checked, because numpy would broadcast a single number over all of the others.
    if len(predicted) != len(expected):
        raise DataError(
            f"`predictions` and `labels` must be of the same tokens, but are {len(predicted)} and {len(expected)} long: "
            "the prediction of a token stands one position before it, and prompt and padding are left out."
        )
    hits: NDArray[np.bool_] = predicted == expected
    return hits
