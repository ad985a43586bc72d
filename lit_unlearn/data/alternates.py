"""Alternate answers to the questions of the forget set: from a column, or refusals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.files import describe_kind, read_text_file
from lit_unlearn.data.formats import Conversation, Row
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.utils.io import expand_path

if TYPE_CHECKING:
    from datasets import Dataset

REFUSALS = Path(__file__).with_name("refusals.txt")


def alternate_rows(
    table: Dataset, rows: Sequence[Row], column: str | None, refusals: str | None, seed: int, kind: type
) -> list[Row]:
    """Return the forget rows with other answers.

    Args:
        table: The forget set.
        rows: Its rows, as they are read.
        column: As for `alternate_answers`.
        refusals: As for `alternate_answers`.
        seed: As for `alternate_answers`.
        kind: Class of the data module, for errors.

    Raises:
        ConfigError: If a row is raw text.
    """
    conversations = [row for row in rows if isinstance(row, Conversation)]
    if len(conversations) < len(rows):
        remedy = "choose a method that needs none (`lit-unlearn methods` lists what each needs)"
        raise ConfigError(f"{kind.__name__}: raw texts are no answers, so there are no alternate ones: {remedy}.")
    answers = alternate_answers(table, column, refusals, seed)
    return [row.with_answer(answer) for row, answer in zip(conversations, answers, strict=True)]


def alternate_answers(rows: Dataset, column: str | None, refusals: str | None, seed: int) -> list[str]:
    """Draw an alternate answer to every question.

    Args:
        rows: The forget set.
        column: Column with another answer, or a list of them of which one is drawn; ``None`` for refusals.
        refusals: Text file with a refusal per line; ``None`` for this package's.
        seed: Seed of the draws; the draw for one row does not depend on the others.

    Returns:
        One text per row, the same at every call.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If the column is missing, a row has no answer in it, or the file has no line.
    """
    if column is not None and column not in rows.column_names:
        message = f"the forget set has no column '{column}' with alternate answers; its columns are {rows.column_names}"
        remedy = "set `alternate_column`, or leave it out for refusals"
        raise DataError(f"{message}: {remedy}.", argument="alternate_column")
    choices = [read_refusals(refusals)] * len(rows) if column is None else rows[column]
    answers = []
    for number, choice in enumerate(choices):
        texts = _check_answers(choice, number, column)
        # A generator per row, so that rows keep their answers when others are added. `random()` is the one method that
        # Python promises never to change for a given seed.
        draw = random.Random(f"{seed}/{number}").random()
        answers.append(texts[int(draw * len(texts))])
    return answers


def read_refusals(file: str | None = None) -> list[str]:
    """Read the lines of a text file that are not blank; by default this package's 120 refusals.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it has no such line.
    """
    path = REFUSALS if file is None else expand_path(file)
    text = read_text_file(path, "refusals", "file of refusals")
    # Not `splitlines`, which also splits at form feeds and U+2028 within a sentence.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"the file of refusals '{path}' is empty: give it one refusal per line.", argument="refusals")
    return lines


def _check_answers(value: Any, number: int, column: str | None) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"row {number} of the forget set has no alternate answer in '{column}': expected a text or a list of texts, got "
            f"{'an empty list' if value == [] else describe_kind(value)}.",
            argument="alternate_column",
        )
    return list(texts)
