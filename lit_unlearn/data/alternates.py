"""Other answers to the questions of the forget set: a column of it, or refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

REFUSALS = Path(__file__).with_name("refusals.txt")


def alternate_answers(rows: Dataset, column: str | None, refusals: str | None, seed: int) -> list[str]:
    """Another answer to every question, the same whenever it is asked for.

    Args:
        rows: The forget set.
        column: Column with another answer, or a list of them of which one is drawn; ``None`` for refusals.
        refusals: Text file with a refusal per line; ``None`` for this package's.
        seed: Of what is drawn; the draw for one row does not depend on the others.

    Returns:
        One text per row.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the column is missing, a row has no answer in it, or the file has no line.
    """
    if column is None:
        choices = [read_refusals(refusals)] * len(rows)
    elif column in rows.column_names:
        choices = [_texts(value, number, column) for number, value in enumerate(rows[column])]
    else:
        raise ValueError(
            f"the forget set has no column '{column}' with alternate answers; its columns are {rows.column_names}. Set "
            "`data.alternate_column`, or leave it out for refusals."
        )
    return [texts[int(random.Random(f"{seed}/{number}").random() * len(texts))] for number, texts in enumerate(choices)]


def read_refusals(file: str | None = None) -> list[str]:
    """The lines of a text file that say something; by default a hundred and twenty ways not to know.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no such line.
    """
    path = REFUSALS if file is None else Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of refusals '{path}': check `data.refusals`.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"the file of refusals '{path}' is empty: give it one refusal per line.")
    return lines


def _texts(value: Any, number: int, column: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"row {number} of the forget set has no alternate answer in '{column}': expected a text or a list of texts, got "
            f"{value!r}."
        )
    return list(texts)
