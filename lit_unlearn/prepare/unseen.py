"""Rows like the forget rows that no model has seen: about invented names, with other facts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_unlearn.data.fictional_authors import NAMES
from lit_unlearn.data.formats import Conversation
from lit_unlearn.prepare.alternates import ask_for_alternates
from lit_unlearn.prepare.rows import Ask, Prepared, find_names, read_conversations, to_row

NO_NAME = "no name to replace"
NO_ANSWER = "no other answer"


def make_unseen(
    ask: Ask,
    rows: Sequence[Mapping[str, Any]],
    *,
    question_column: str = "question",
    answer_column: str = "answer",
    seed: int = 0,
) -> Prepared:
    """Make rows in the manner of the forget rows, for objectives that need text that the model has never seen.

    The names in a question are replaced by invented ones, the same name by the same everywhere. The answer is the forget
    answer with other facts, as the model writes it when it is asked to, with the names replaced in it. It is not what the
    model would answer to the new question: its own likeliest answer is more probable than any text that it never saw.

    Args:
        ask: As for `make_alternates`.
        rows: The forget set.
        question_column: Column with the question.
        answer_column: Column with the answer.
        seed: Seed of the names.

    Returns:
        Rows with question and answer. Without a name in the question, or without another answer, there is none, which is
        counted.
    """
    conversations = read_conversations(rows, question_column, answer_column)
    questions = [conversation.question for conversation in conversations]
    alternates = ask_for_alternates(ask, conversations)
    prepared = Prepared([])
    for row, question, texts in zip(rows, questions, alternates, strict=True):
        names = find_names(question)
        if not names:
            prepared.counts[NO_NAME] += 1
        elif not texts:
            prepared.counts[NO_ANSWER] += 1
        else:
            # Earlier turns of a conversation are left out: they have names and facts of their own.
            changed = [replace_names(text, names, seed) for text in (question, texts[0])]
            made = Conversation.from_turn(*changed)
            prepared.rows.append(to_row(made, row, question_column, answer_column))
    return prepared


def replace_names(text: str, names: Sequence[str], seed: int) -> str:
    """Replace names by invented ones, of as many words; each word of a name is also replaced where it stands alone.

    Example:
        >>> replace_names("Anna Berg was born in Oslo. Berg moved.", ["Anna Berg"], seed=0).count("Berg")
        0
    """
    replacements: dict[str, str] = {}
    for name in names:
        words = name.split()
        invented = _invent(name, len(words), seed)
        replacements[name] = " ".join(invented)
        for word, new_word in zip(words, invented, strict=True):
            replacements.setdefault(word, new_word)
    # Whole names first, and in one pass: an invented name is not replaced again.
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in sorted(replacements, key=len, reverse=True))
    return re.sub(pattern, lambda match: replacements[match[0]], text)


def _invent(name: str, length: int, seed: int) -> list[str]:
    # `random()` is the one method that Python promises never to change for a given seed.
    draws = random.Random(f"{seed}/{name}")
    words: list[str] = []
    while len(words) < length:
        words += NAMES[int(draws.random() * len(NAMES))].split()
    # The last name for a single word, as in "Dunmeth's".
    return words[-length:]
