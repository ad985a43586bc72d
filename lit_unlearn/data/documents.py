"""Encode raw text: it is cut into examples, with every token of it supervised once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_unlearn.data.encoding_settings import EncodingSettings, hide_padding_ids
from lit_unlearn.data.example import IGNORED, Example, has_supervised_token
from lit_unlearn.data.formats import Document
from lit_unlearn.data.labels import label_ranges
from lit_unlearn.data.spans import Spans
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_document(
    document: Document, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings, spans: Spans | None = None
) -> list[Example]:
    """Tokenise raw text and cut it into examples, with every token of the text supervised once.

    Every example begins with the start token, if the tokenizer begins texts with one; that token is not supervised. If it
    does not, nothing predicts the first token of the text, and every other example begins with the last token of the one
    before. The context, and tokens that an example repeats from the one before, are only read.

    Args:
        document: The text and its context; no template is used.
        tokenizer: A fast tokenizer.
        settings: ``max_length``, ``chunk_overlap`` and what is special.
        spans: The parts of the text that are supervised, under 0; ``None`` for all of it.

    Returns:
        The examples, without those that have no supervised token.

    Raises:
        ConfigError: If ``max_length`` has no room for a token and the one before it.
    """
    if settings.max_length < 2:
        message = f"`max_length` must be at least 2 for raw text, not {settings.max_length}: each token is predicted from another."
        raise ConfigError(message, argument="max_length")
    row_text = RowText(tokenizer, settings.allow_special_tokens)
    context, text = row_text.protect(document.context), row_text.protect(document.text)
    encoded = row_text.encode(context, text, add_special_tokens=False)
    start, stop = encoded.starts[1:]
    ranges = [(start, stop)]
    if spans is not None:
        ranges = [(start + begin, start + end) for begin, end in spans.get(0, ())]
    labels = label_ranges(encoded, ranges)
    overlap = settings.chunk_overlap
    if not _adds_start(tokenizer):
        # Nothing predicts the first token of an example: it is the last one of the example before, which has learned it.
        overlap = max(overlap, 1)
    chunks = _cut_into_chunks(encoded.ids, labels, tokenizer, settings.max_length, overlap)
    return [hide_padding_ids(chunk, tokenizer, settings) for chunk in chunks if has_supervised_token(chunk)]


def encode_chunks(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_length: int = 2048,
    allow_special_tokens: bool = False,
) -> list[Example]:
    """Join raw texts and cut them into examples of equal length, with every token supervised.

    As published baselines do it: texts are joined by empty lines and tokenised as one, so an example may continue over
    the end of a text. Every example begins with the start token, if the tokenizer begins texts with one; that token is not
    supervised. If it does not, nothing predicts an example's first token, which is then only read. The last example is the
    remainder, however short: no token is left out or counts twice.

    Args:
        texts: Raw texts, in order.
        tokenizer: A fast tokenizer; its chat template is not used.
        name: Name of the set, for messages.
        max_length: Tokens of an example, the start token among them; at least 2.
        allow_special_tokens: As for `encode`.

    Raises:
        DataError: If there is no token that another one predicts.
    """
    row_text = RowText(tokenizer, allow_special_tokens)
    ids = row_text.encode(row_text.protect("\n\n".join(texts)), add_special_tokens=False).ids
    examples = _cut_into_chunks(ids, ids, tokenizer, max_length)
    if not ids or len(examples[0].input_ids) < 2:
        raise DataError(f"the {name} set has no text to predict: it has {len(ids)} tokens in {len(texts)} texts.")
    return examples


def _cut_into_chunks(
    ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlap: int = 0,
) -> list[Example]:
    """Cut tokens into examples of at most ``max_length``, each after the start token; the last one is the remainder."""
    start = [int(tokenizer.bos_token_id)] if _adds_start(tokenizer) else []
    size = max_length - len(start)
    examples = []
    # An end within what the next example repeats would make one that has nothing else.
    for begin in range(0, max(len(ids) - overlap, 1), size - overlap):
        repeated = overlap if begin else 0
        stop = begin + size
        chunk_labels = [IGNORED] * (len(start) + repeated) + [*labels[begin + repeated : stop]]
        examples.append(Example([*start, *ids[begin:stop]], chunk_labels))
    return examples


def _adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer begins texts with the start token."""
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])
