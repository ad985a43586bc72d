"""Labels by character offsets: which characters of a text are supervised, and which tokens carry them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_unlearn.data.example import IGNORED
from lit_unlearn.data.formats import Conversation
from lit_unlearn.data.spans import Spans
from lit_unlearn.data.special_tokens import Encoded, RowText
from lit_unlearn.data.templates import Piece
from lit_unlearn.errors import ModelError

Range = tuple[int, int]
"""First and last character (exclusive) of a part of the text whose tokens are supervised."""


def find_supervised_ranges(pieces: Sequence[Piece], encoded: Encoded) -> list[Range]:
    """Return the parts of the text that are supervised; pieces that follow each other are one part."""
    ranges: list[Range] = []
    for number, piece in enumerate(pieces):
        start, stop = encoded.starts[number : number + 2]
        if not piece.is_supervised:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


def find_span_ranges(
    pieces: Sequence[Piece], encoded: Encoded, conversation: Conversation, spans: Spans, row_text: RowText
) -> list[Range]:
    """Return the places of spans in the text, which has no more of a turn than the template takes over."""
    ranges = []
    for number, piece in enumerate(pieces):
        if piece.turn is None:
            continue
        content = conversation.messages[piece.turn].content
        # Many templates strip the space around what a turn says; some put a thought before it.
        core = content.strip()
        place = row_text.reveal(piece.text).find(core)
        if place < 0:
            raise ModelError(
                "the chat template changes the text of an answer, so the places of its spans are lost: give `template`, a text with "
                "{question} and {answer}, or `chat` with another `template`.",
                argument="template",
            )
        offset = encoded.starts[number] + place - content.index(core)
        for start, stop in spans.get(piece.turn, ()):
            ranges.append((max(offset + start, encoded.starts[number]), min(offset + stop, encoded.starts[number + 1])))
    return ranges


def label_ranges(encoded: Encoded, ranges: Iterable[Range]) -> list[int]:
    """Return the labels of all tokens: their ids where they carry a character of a range."""
    labels = [IGNORED] * len(encoded.ids)
    for start, stop in ranges:
        carriers = []
        for i, (begin, token_stop) in enumerate(encoded.offsets):
            # A token across the boundary counts: saying the answer's first letter is saying this token.
            if begin < token_stop and token_stop > start and begin < stop:
                carriers.append(i)
        if carriers:
            # From the first to the last, because some tokenizers give no characters to a space in between.
            span = slice(carriers[0], carriers[-1] + 1)
            labels[span] = encoded.ids[span]
    return labels
