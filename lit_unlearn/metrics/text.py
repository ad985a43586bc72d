"""Scores of generated texts that need neither a model nor a download: repetition, refusals and a stand-in for fluency."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics.validation import read_finite, read_shares

# In the first person, because an answer about somebody else may well say that "he does not know" or "it is not known".
_REFUSALS = (
    # Not to know, and not to have what an answer needs.
    r"\bi(?: \w+){0,3}? (?:don't|do not|didn't|did not)(?: \w+){0,2}? (?:know|recall|remember|recogni[sz]e)\b",
    r"\bi (?:\w+ )?(?:don't|do not|didn't|did not) (?:\w+ )?(?:have|hold|possess)(?: \w+){0,3}? "
    r"(?:answer|information|facts?|details?|data|knowledge|background|clue|idea|record|memory|access|anything|it)\b",
    r"\b(?:i've|i have) (?:got )?(?:no (?:\w+ )?(?:information|idea|answer|knowledge|memory|facts?|record|data|details?)"
    r"|never (?:heard|come across|been given|been told|learned)|nothing (?:to say|on)|yet to learn"
    r"|not (?:been \w+|learned) (?:any\w*|about))\b",
    r"\bi haven't (?:learned|heard|the faintest|been)\b|\bi was never (?:told|given)\b",
    r"\bi(?: \w+)? know (?:nothing|of no|too little)\b|\bi lack\b",
    # Not to be able to answer.
    r"\bi(?: \w+){0,2}? (?:can't|cannot|can not|couldn't|could not|won't|will not|(?:am|was) unable to|(?:am )?not able to)"
    r"(?: \w+){0,2}? (?:answer|say|tell|help|assist|provide|give|find|confirm|offer|recall|remember|think|supply|shed|comment"
    r"|share|disclose|discuss|speak|respond|reply|resolve|come up)\b",
    r"\bi can offer no\b|\blook that up\b|\bas an? (?:ai|language model)\b",
    # A state of the speaker.
    r"\b(?:i'm|i am)(?: \w+)? not (?:sure|certain|aware|familiar|informed|able|acquainted|the right)\b",
    r"\b(?:i'm|i am|i was)(?: \w+)? (?:unsure|uncertain|unable|unfamiliar|clueless|at a loss|in the dark|drawing a blank"
    r"|missing the|going to pass)\b",
    # A state of the answer, seen by the speaker.
    r"\b(?:known|unknown|unfamiliar|unfamiliar territory|available|nothing) to me\b|\bescapes me\b",
    r"\bmy (?:knowledge|training) (?:does|did|doesn't|didn't)\b",
    r"\b(?:beyond|outside|outside of|missing from|the limits of|nothing|past|gap in)(?: anything)? "
    r"(?:what i know|my knowledge|i've learned|i have learned)\b",
    r"\b(?:nothing|no details|no answer|not something|isn't something|not anything|isn't anything|question|topic|something)"
    r"(?: that)? i (?:can|can't|cannot|am able|am not able|have data|know|have learned)\b",
    r"\b(?:no idea|not a clue|only be guessing|wrong of me to guess|making it up|without an answer|leave that question open)\b",
    r"\b(?:ask|consult) (?:someone else|another source)\b|\bsomeone else knows\b|\b(?:within my reach|in my power)\b",
    # An apology in front.
    r"^(?:i'm (?:so |very )?sorry|i am sorry|sorry|my apologies|i apologi[sz]e|unfortunately|regrettably)[,.]? (?:but )?"
    r"(?:i|that|this|the answer)\b",
)
_REFUSAL = re.compile("|".join(_REFUSALS))


def repetition(text: str | Sequence[Hashable], n: int = 4) -> float:
    """Compute the share of a text's n-grams that occurred before in it: 0 without repetition, near 1 for a loop.

    1 − distinct n-grams / n-grams. Models that were damaged often end in loops, which likelihood alone takes for fluent.
    Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020 (arXiv 1908.04319).

    Args:
        text: A text, which is divided at white space; or its tokens, for scripts that put no space between words.
        n: Words in a row that count as one.

    Returns:
        From 0 to 1; 0 for a text of fewer than ``n`` words.

    Raises:
        ConfigError: If ``n`` is below 1.

    Example:
        >>> repetition("to be or not to be or not")  # 5 groups of four words, of which the last is the first again
        0.2
        >>> repetition([7, 7, 7, 7], n=1)
        0.75
    """
    if n < 1:
        raise ConfigError(f"`n` must be at least 1, not {n!r}: 4 counts four words in a row.", argument="n")
    words = text.split() if isinstance(text, str) else list(text)
    count = len(words) - n + 1
    if count < 1:
        return 0.0
    distinct = {tuple(words[start : start + n]) for start in range(count)}
    return (count - len(distinct)) / count


def is_refusal(text: str) -> bool:
    """Return whether an answer says that the model does not know, or will not say.

    By phrases in the first person, in English: an answer in another language, and a wrong answer, is no refusal here. Of the 120
    refusals that come with the package it finds all, and none among the 4217 right answers of TOFU.

    Example:
        >>> is_refusal("I'm sorry, but I can't answer that."), is_refusal("He could not say who his father was.")
        (True, False)
    """
    # Typographic apostrophes and line breaks are common in what models write.
    plain = " ".join(text.replace("’", "'").lower().split())
    return _REFUSAL.search(plain) is not None


def refusal_rate(texts: Sequence[str]) -> float:
    """Compute the share of answers that are refusals; on questions of the retain set, the over-refusal rate.

    Args:
        texts: Generated answers, at least one.

    Raises:
        DataError: If there is no answer.

    Example:
        >>> refusal_rate(["I don't know.", "In Paris."])
        0.5
    """
    if not texts:
        raise DataError("`texts` must hold at least one answer, but is empty.", argument="texts")
    return sum(map(is_refusal, texts)) / len(texts)


def fluency_share(
    nll: ArrayLike, reference_nll: ArrayLike, repetitions: ArrayLike | None = None, quantile: float = 0.95
) -> float:
    """Compute how many generated answers read like text, by their NLL under another model: a stand-in for a classifier.

    Published tables take the mean probability that a classifier gives to an answer being no gibberish. Without a download, an
    answer counts as fluent if its NLL is at most that of nearly all ordinary texts, and as far as it does not repeat itself.
    Say beside the number that it is this stand-in.

    Args:
        nll: NLL per token of each generated answer under a model that is not the measured one, shape ``(n,)``, nats.
        reference_nll: NLL per token, under the same model, of texts like right answers that it was not trained on, shape ``(m,)``.
        repetitions: Repetition of each generated answer, shape ``(n,)``; ``None`` counts all as 0.
        quantile: Share of the reference texts that count as fluent.

    Returns:
        From 0 to 1.

    Raises:
        DataError: If lengths differ, or a number is not finite or out of range.
        ConfigError: If ``quantile`` is not above 0 and at most 1.

    Example:
        >>> fluency_share([1.0, 9.0], reference_nll=[0.5, 1.5, 2.0])
        0.5
    """
    losses, references = read_finite("nll", nll), read_finite("reference_nll", reference_nll)
    if not 0 < quantile <= 1:
        message = f"`quantile` must be above 0 and at most 1, not {quantile!r}: 0.95 means 95 %."
        raise ConfigError(message, argument="quantile")
    repeated = np.zeros(len(losses)) if repetitions is None else read_shares("repetitions", repetitions)
    if len(repeated) != len(losses):
        raise DataError(
            f"`nll` and `repetitions` must be of the same answers, but are {len(losses)} and {len(repeated)} long.",
            argument="repetitions",
        )
    is_fluent = losses <= np.quantile(references, quantile)
    return float((is_fluent * (1 - repeated)).mean())
