"""Other plausible answers to the forget questions, for objectives that prefer them to the answers that are forgotten."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_unlearn.data.alternates import read_refusals
from lit_unlearn.data.formats import Conversation
from lit_unlearn.errors import ConfigError
from lit_unlearn.prepare.rows import (
    Ask,
    ForgetAnswers,
    Prepared,
    Row,
    gives_answer_away,
    read_conversations,
    split_words,
)

ALTERNATE_COLUMN = "alternate"
REPLACED = "only refusals are left, because every answer was empty or repeated the forget answer or the question"

# Greedy decoding gives one answer to a request, so another answer takes another wording.
_REQUESTS = (
    "Question: {question}\nAnswer: {answer}\n\nWrite another answer to this question, of the same form and about the same "
    "length, with other facts: other names, places, numbers and dates. Write only the answer.",
    "Here is a question with its answer.\n\n{question}\n{answer}\n\nImagine that the answer were different. Write that "
    "different answer as one would write the true one, and nothing else.",
    "Rewrite the answer below so that every fact in it is replaced by another plausible fact. Keep the wording otherwise.\n\n"
    "Question: {question}\nAnswer: {answer}\nNew answer:",
    'A quiz needs a wrong but believable answer to the question "{question}". The right one is "{answer}". Write the wrong '
    "one only, as a full sentence.",
)
MAX_ALTERNATES = len(_REQUESTS)


def make_alternates(
    ask: Ask,
    rows: Sequence[Mapping[str, Any]],
    *,
    question_column: str = "question",
    answer_column: str = "answer",
    count: int = 1,
    seed: int = 0,
) -> Prepared:
    """Give every forget row other answers, as AltPO does: the model is shown question and answer and asked for other facts.

    Where it only repeats the answer, it is asked the question alone; with ``count=0`` it is asked nothing else. The base
    model's answers to it are then what a model says that was never fine-tuned on the forget set.

    Use the result as the forget set, with ``alternate_column`` set to ``alternate``. It has every row: one whose answers
    all repeat what is to be forgotten gets a refusal instead, and is counted.

    Args:
        ask: Puts requests to the target model or the base model, see `ask_with`. It must follow instructions, but for
            ``count=0``.
        rows: The forget set.
        question_column: Column with the question.
        answer_column: Column with the answer.
        count: Alternate answers per row that it is shown the answer for, at most 4.
        seed: Seed of the refusals.

    Returns:
        The rows, with a list of texts in ``alternate``.

    Raises:
        ConfigError: If the count is out of range.
        DataError: If a row lacks question or answer.

    Example:
        >>> make_alternates(lambda questions: ["In Rome."] * len(questions), [{"question": "Where?", "answer": "In Oslo."}]).rows
        [{'question': 'Where?', 'answer': 'In Oslo.', 'alternate': ['In Rome.']}]

    Paper: Mekala et al., "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models", 2024.
    """
    conversations = read_conversations(rows, question_column, answer_column)
    questions = [conversation.question for conversation in conversations]
    alternates = ask_for_alternates(ask, conversations, count)
    # A model that only repeats the answer that it is shown may have another one when it is not: a base model has.
    left = [number for number, texts in enumerate(alternates) if not texts]
    repeated = ForgetAnswers.from_conversations(conversations)
    for number, text in zip(left, ask([questions[number] for number in left]) if left else (), strict=True):
        if _is_another_answer(text, conversations[number], repeated):
            alternates[number].append(text)
    prepared = Prepared([])
    refusals = read_refusals()
    for number, (row, texts) in enumerate(zip(rows, alternates, strict=True)):
        if not texts:
            prepared.counts[REPLACED] += 1
            texts = [_draw(refusals, f"{seed}/{number}")]
        made: Row = {**row, ALTERNATE_COLUMN: texts}
        prepared.rows.append(made)
    return prepared


def ask_for_alternates(ask: Ask, conversations: Sequence[Conversation], count: int = 1) -> list[list[str]]:
    """Return the other answers that a model gives to each question, without those that repeat an answer or the question.

    Args:
        ask: As for `make_alternates`.
        conversations: The forget set.
        count: Requests per question, 0 to 4.

    Returns:
        A list for each question, with at most ``count`` different texts; it may be empty.

    Raises:
        ConfigError: If the count is out of range.
    """
    if not 0 <= count <= MAX_ALTERNATES:
        raise ConfigError(
            f"`count` must be from 0, the question alone, to {MAX_ALTERNATES}, the number of requests there are, not {count}."
        )
    repeated = ForgetAnswers.from_conversations(conversations)
    alternates: list[list[str]] = [[] for _ in conversations]
    for request in _REQUESTS[:count]:
        requests = []
        for conversation in conversations:
            fields = {"{question}": conversation.question, "{answer}": conversation.answer}
            requests.append(_fill_in(request, fields))
        for texts, text, conversation in zip(alternates, ask(requests), conversations, strict=True):
            is_new = split_words(text) not in map(split_words, texts)
            if is_new and _is_another_answer(text, conversation, repeated):
                texts.append(text)
    return alternates


def _is_another_answer(text: str, asked: Conversation, repeated: ForgetAnswers) -> bool:
    if not split_words(text) or repeated.are_repeated_by(text):
        return False
    # Small models often say the question again instead of answering it.
    if ForgetAnswers([asked.question]).are_repeated_by(text):
        return False
    return not gives_answer_away(text, asked.question, asked.answer)


def _fill_in(request: str, fields: dict[str, str]) -> str:
    # In one pass, because either text may have braces, or the name of the other.
    return re.sub(r"\{question\}|\{answer\}", lambda match: fields[match[0]], request)


def _draw(texts: Sequence[str], seed: str) -> str:
    # `random()` is the one method that Python promises never to change for a given seed.
    return texts[int(random.Random(seed).random() * len(texts))]
