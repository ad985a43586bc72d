"""Find forget rows that stand in another set as well: what is to be forgotten would be kept at the same time."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple


class Duplicates(NamedTuple):
    """Rows of a forget set and of another set with the same texts.

    Args:
        forget: Numbers of the forget rows.
        other: Numbers of the rows of the other set; not of the same length, since rows may be repeated.
    """

    forget: list[int]
    other: list[int]


def find_duplicates(forget: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> Duplicates:
    """Find the rows that two sets share, whatever their white space and case.

    Args:
        forget: The texts of every forget row.
        rows: The texts of every row of the other set.

    Example:
        >>> find_duplicates([("Who?", "Ann."), ("Where?", "Rome.")], [("WHERE? ", "in Oslo."), ("where?", " rome.")])
        Duplicates(forget=[1], other=[1])
    """
    numbers: dict[tuple[str, ...], list[int]] = {}
    for number, texts in enumerate(forget):
        numbers.setdefault(_normalize(texts), []).append(number)
    shared: set[int] = set()
    others = []
    for number, texts in enumerate(rows):
        same = numbers.get(_normalize(texts), ())
        if same:
            others.append(number)
            shared.update(same)
    return Duplicates(sorted(shared), others)


def list_rows(numbers: Sequence[int]) -> str:
    """Return the first few numbers of rows, for a message.

    Example:
        >>> list_rows([3]), list_rows(range(7))
        ('row 3', 'rows 0, 1, 2, 3, 4, …')
    """
    listed = ", ".join(map(str, numbers[:5]))
    return f"row{'s' if len(numbers) > 1 else ''} {listed}{', …' if len(numbers) > 5 else ''}"


def _normalize(texts: Sequence[str]) -> tuple[str, ...]:
    # Letters with accents are one character or two, as the program that wrote the file had it.
    return tuple(unicodedata.normalize("NFC", " ".join(text.split()).casefold()) for text in texts)
