"""A retain set for those who have none: what the model itself answers, and the training rows that are nearest to the forget set."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lit_unlearn import data
from lit_unlearn.data.files import read_text_file
from lit_unlearn.data.formats import Conversation
from lit_unlearn.prepare.rows import (
    EMPTY,
    REPEATS,
    Ask,
    ForgetAnswers,
    Prepared,
    read_conversations,
    split_words,
    to_row,
)

GENERAL_PROMPTS = Path(data.__file__).with_name("general_prompts.txt")
FORGET_ROW = "is a forget row"


def read_general_prompts() -> list[str]:
    """Return this package's 120 prompts: everyday knowledge, language, arithmetic, advice."""
    text = read_text_file(GENERAL_PROMPTS, "prompts", "file of prompts")
    return [line for line in text.split("\n") if line]


def make_retain(
    ask: Ask,
    forget: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]] = (),
    *,
    question_column: str = "question",
    answer_column: str = "answer",
    prompts: Sequence[str] | None = None,
    max_prompts: int | None = None,
    max_neighbours: int = 200,
    seed: int = 0,
) -> Prepared:
    """Make a retain set from the model itself, and from what it was trained on where that is known.

    The model's own answers keep what it can do in general; rows near the forget set keep what is damaged first.

    Args:
        ask: Puts prompts to the target model, see `ask_with`.
        forget: The forget set.
        training: Rows that the model was trained on; the forget rows among them are left out.
        question_column: Column with the question, in both.
        answer_column: Column with the answer, in both.
        prompts: What the model is asked; ``None`` for this package's prompts.
        max_prompts: Number of prompts, drawn; ``None`` for all.
        max_neighbours: Number of training rows to take.
        seed: Seed of the draw.

    Returns:
        Rows in the format of the training rows: first the neighbours, then the model's own answers.
    """
    conversations = read_conversations(forget, question_column, answer_column)
    repeated = ForgetAnswers.from_conversations(conversations)
    prepared = Prepared([])

    forget_texts = [" ".join(conversation.texts) for conversation in conversations]
    forget_words = {split_words(text) for text in forget_texts}
    candidates, texts = [], []
    for conversation in read_conversations(training, question_column, answer_column, "training"):
        text = " ".join(conversation.texts)
        if split_words(text) in forget_words:
            prepared.counts[FORGET_ROW] += 1
        elif any(map(repeated.are_repeated_by, conversation.texts)):
            prepared.counts[REPEATS] += 1
        else:
            candidates.append(conversation)
            texts.append(text)
    # The format of the training rows, which are taken as they are.
    like = (training or forget)[0]
    for number in find_neighbours(forget_texts, texts, max_neighbours):
        prepared.rows.append(to_row(candidates[number], like, question_column, answer_column))

    chosen = _draw_prompts(read_general_prompts() if prompts is None else list(prompts), max_prompts, seed)
    for prompt, answer in zip(chosen, ask(chosen), strict=True):
        if not answer:
            prepared.counts[EMPTY] += 1
        elif repeated.are_repeated_by(answer):
            prepared.counts[REPEATS] += 1
        else:
            prepared.rows.append(to_row(Conversation.from_turn(prompt, answer), like, question_column, answer_column))
    return prepared


def find_neighbours(texts: Sequence[str], others: Sequence[str], count: int) -> list[int]:
    """Return which texts share most with a set of texts: by their words, rare ones count more.

    Args:
        texts: What the others are compared with.
        others: The candidates.
        count: How many to return.

    Returns:
        Positions in ``others``, ascending. The similarity is the largest cosine with any of ``texts``, of word counts
        weighted by the logarithm of the inverse share of texts that have the word.

    Example:
        >>> find_neighbours(["Who wrote the blue book?"], ["What is two plus two?", "Who wrote the red book?"], 1)
        [1]
    """
    documents = [Counter(split_words(text)) for text in (*texts, *others)]
    containing = Counter(chain.from_iterable(documents))
    vectors = []
    for document in documents:
        vector = {word: n * math.log(1 + len(documents) / containing[word]) for word, n in document.items()}
        norm = math.sqrt(sum(weight**2 for weight in vector.values())) or 1.0
        vectors.append({word: weight / norm for word, weight in vector.items()})

    # By word, so that only texts that share one are compared.
    weights_of: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number, vector in enumerate(vectors[: len(texts)]):
        for word, weight in vector.items():
            weights_of[word].append((number, weight))
    similarities = []
    for vector in vectors[len(texts) :]:
        products: dict[int, float] = defaultdict(float)
        for word, weight in vector.items():
            for number, other_weight in weights_of.get(word, ()):
                products[number] += weight * other_weight
        similarities.append(max(products.values(), default=0.0))
    nearest = sorted(range(len(others)), key=lambda number: (-similarities[number], number))[:count]
    return sorted(nearest)


def _draw_prompts(prompts: list[str], count: int | None, seed: int) -> list[str]:
    if count is None or count >= len(prompts):
        return prompts
    draws = random.Random(seed)
    # `random()` is the one method that Python promises never to change for a given seed.
    order = sorted(range(len(prompts)), key=lambda _: draws.random())
    return [prompts[number] for number in sorted(order[:count])]
