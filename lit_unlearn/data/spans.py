"""Spans: the parts of a forget row that are sensitive, so that only their tokens are supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.files import describe_kind
from lit_unlearn.data.formats import Document, Row
from lit_unlearn.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Spans = Mapping[int, Sequence[tuple[int, int]]]
"""First and last character (exclusive) of every span, by the index of the message that it is in; 0 for a document."""


def read_spans(table: Dataset, rows: Sequence[Row], column: str, name: str) -> list[Spans]:
    """Find the spans of all rows of a set.

    Args:
        table: The set, with all its columns.
        rows: The same rows, as they were read.
        column: Column with the spans.
        name: Name of the set, for messages.

    Raises:
        DataError: If there is no such column, or as for `find_spans`.
    """
    if column not in table.column_names:
        message = f"the {name} set has no column '{column}' with spans; its columns are {table.column_names}: set "
        raise DataError(f"{message}`span_column`, or leave it out to supervise everything.", argument="span_column")
    spans = []
    for number, (row, value) in enumerate(zip(rows, table[column], strict=True)):
        spans.append(find_spans(row, value, column, f"row {number} of the {name} set"))
    return spans


def find_spans(row: Row, value: Any, column: str, place: str) -> Spans:
    """Find the spans that a row names.

    Args:
        row: The row.
        value: Texts, each of which counts wherever it occurs in the supervised text, or pairs of offsets ``[start, end]``, in
            characters, into the supervised text. Several supervised turns are joined by a line break for them.
        column: Column that the value is from, for messages.
        place: What messages call the row.

    Raises:
        DataError: If there is no span, or one that does not occur; the message does not show it.

    Example:
        >>> from lit_unlearn.data.formats import Conversation
        >>> row = Conversation.from_turn("Who?", "Ada, born in Bern.")
        >>> find_spans(row, ["Ada", [13, 17]], "spans", "row 0")
        {1: [(0, 3), (13, 17)]}
    """

    def refuse(problem: str) -> DataError:
        return DataError(f"{place} {problem}.", argument="span_column")

    texts = {0: row.text} if isinstance(row, Document) else {i: row.messages[i].content for i in row.supervised}
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, Sequence) or not named:
        kind = "an empty list" if value == [] else describe_kind(value)
        raise refuse(
            f"has {kind} in '{column}', where a list of spans must be: give one, or move the row to another set"
        )

    spans: dict[int, list[tuple[int, int]]] = {index: [] for index in texts}
    for number, span in enumerate(named):
        if isinstance(span, str) and span.strip():
            places = _find_text(span, texts)
        elif _is_pair(span):
            places = _find_offsets(span[0], span[1], texts)
        else:
            raise refuse(f"has {describe_kind(span)} as span {number}, where a text or a pair [start, end] must be")
        if not places:
            raise refuse(
                f"has a span ({number} in '{column}') that does not occur in its supervised text: correct it, or supervise the turn "
                "that has it"
            )
        for index, start, stop in places:
            spans[index].append((start, stop))
    return spans


def _is_pair(span: Any) -> bool:
    if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 2:
        return False
    return all(isinstance(offset, int) and not isinstance(offset, bool) for offset in span)


def _find_text(span: str, texts: Mapping[int, str]) -> list[tuple[int, int, int]]:
    """Return every place where a text occurs: index of the message, first and last character."""
    places = []
    for index, text in texts.items():
        start = text.find(span)
        while start >= 0:
            places.append((index, start, start + len(span)))
            start = text.find(span, start + 1)
    return places


def _find_offsets(start: int, stop: int, texts: Mapping[int, str]) -> list[tuple[int, int, int]]:
    """Return the parts of a range over all texts, which a line break joins, in each of them; none if it is out of range."""
    places = []
    begin = 0
    for index, text in texts.items():
        end = begin + len(text)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            places.append((index, first - begin, last - begin))
        begin = end + 1
    return places if 0 <= start < stop < begin else []
