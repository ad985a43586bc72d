"""The forget questions in other words, to measure whether another wording brings the answer back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lit_unlearn.data.formats import Conversation
from lit_unlearn.prepare.rows import (
    EMPTY,
    REPEATS,
    Ask,
    ForgetAnswers,
    Prepared,
    find_names,
    read_conversations,
    split_words,
)

PARAPHRASE_COLUMN = "paraphrased_question"
NO_PARAPHRASE = "no question in other words"
Kind = Literal["model", "frame"]

_REQUESTS = (
    "Write this question in other words, with the same meaning and the same names. Write only the question.\n\n{question}",
    "How else could somebody ask the following? Keep every name. Write one question and nothing else.\n\n{question}",
)
# What people write around a question. They need no model, and change no word of it.
_FRAMES = (
    "I would like to know the following: {question}",
    "Please answer this question. {question}",
    "Somebody asked me this, and I do not know the answer: {question}",
    "{question} Please answer in a full sentence.",
    "Quick question: {question}",
    "Can you help me with this? {question}",
)


def make_paraphrases(
    ask: Ask | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    question_column: str = "question",
    answer_column: str = "answer",
    kinds: Sequence[Kind] = ("model", "frame"),
    seed: int = 0,
) -> Prepared:
    """Put every forget question in other words: by a model, and in a frame that is drawn.

    ``StressBenchmark`` asks the questions in ``paraphrased_question``.

    Args:
        ask: Puts requests to a model that follows instructions, see `ask_with`; ``None`` for frames alone.
        rows: The forget set.
        question_column: Column with the question.
        answer_column: Column with the answer.
        kinds: Which of the two; each gives one row per forget row.
        seed: Seed of the frames.

    Returns:
        The rows, with ``paraphrased_question``. Without a model's paraphrase that differs from the question and does not give
        the answer away, there is none of that kind, which is counted.
    """
    conversations = read_conversations(rows, question_column, answer_column)
    questions = [conversation.question for conversation in conversations]
    paraphrases = {kind: [""] * len(rows) for kind in kinds}
    prepared = Prepared([])
    if "model" in kinds and ask is not None:
        paraphrases["model"] = _ask_for_paraphrases(ask, conversations, prepared)
    if "frame" in kinds:
        for number, question in enumerate(questions):
            # `random()` is the one method that Python promises never to change for a given seed.
            draw = random.Random(f"{seed}/{number}").random()
            frame = _FRAMES[int(draw * len(_FRAMES))]
            paraphrases["frame"][number] = frame.replace("{question}", question)
    for number, row in enumerate(rows):
        for kind in kinds:
            if paraphrases[kind][number]:
                prepared.rows.append({**row, PARAPHRASE_COLUMN: paraphrases[kind][number]})
    return prepared


def _asks_for_the_same(question: str, text: str) -> bool:
    """Return whether a text is a question where the other is one, and has its names: small models answer instead."""
    is_question = "?" in text or "?" not in question
    return is_question and all(name in text for name in find_names(question))


def _ask_for_paraphrases(ask: Ask, conversations: Sequence[Conversation], prepared: Prepared) -> list[str]:
    """Return a paraphrase of each question, by the first request that gives one; count the questions without one."""
    questions = [conversation.question for conversation in conversations]
    repeated = ForgetAnswers.from_conversations(conversations)
    paraphrases = [""] * len(questions)
    reasons = [""] * len(questions)
    for request in _REQUESTS:
        left = [number for number, paraphrase in enumerate(paraphrases) if not paraphrase]
        if not left:
            break
        replies = ask([request.replace("{question}", questions[number]) for number in left])
        for number, reply in zip(left, replies, strict=True):
            # Some models go on after the question.
            text = reply.split("\n")[0].strip()
            words = split_words(text)
            if not words:
                reasons[number] = EMPTY
            elif words == split_words(questions[number]) or not _asks_for_the_same(questions[number], text):
                reasons[number] = NO_PARAPHRASE
            elif repeated.are_repeated_by(text):
                reasons[number] = REPEATS
            else:
                paraphrases[number] = text
    for paraphrase, reason in zip(paraphrases, reasons, strict=True):
        if not paraphrase:
            prepared.counts[reason] += 1
    return paraphrases
