"""Encode rows as examples: each is tokenised once, as one text, and labelled by character offsets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.chat_template import describe_prompt
from lit_unlearn.data.conversations import render_conversation
from lit_unlearn.data.documents import encode_document
from lit_unlearn.data.encoding_settings import EncodingSettings, hide_padding_ids
from lit_unlearn.data.example import IGNORED, Example, has_supervised_token
from lit_unlearn.data.formats import Conversation, Document, Message, Row
from lit_unlearn.data.labels import find_span_ranges, find_supervised_ranges, label_ranges
from lit_unlearn.data.spans import Spans
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.data.templates import (
    PLAIN_TEMPLATE,
    RAW_TEMPLATE,
    Chat,
    Rendering,
    render_literal,
)
from lit_unlearn.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    question: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    chat: Chat | None = None,
    max_length: int = 512,
    allow_special_tokens: bool = False,
) -> Example:
    """Tokenise question and answer together, and supervise exactly the tokens that carry the answer and its end.

    Args:
        question: What the user says.
        answer: What the model is to say.
        tokenizer: A fast tokenizer with an end token.
        template: As for `EncodingSettings`.
        chat: As for `EncodingSettings`.
        max_length: Largest number of tokens; what is beyond is cut off.
        allow_special_tokens: As for `EncodingSettings`.

    Returns:
        The example; its labels are all −100 if nothing of the answer is left.

    Raises:
        ModelError: If the chat template leaves out the answer or changes it.
    """
    settings = EncodingSettings(template, chat, max_length, allow_special_tokens=allow_special_tokens)
    return encode_conversation(Conversation.from_turn(question, answer), tokenizer, settings)


def encode_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncodingSettings,
    spans: Spans | None = None,
    place: str = "the conversation",
) -> Example:
    """Tokenise a conversation as one text, and supervise exactly the tokens that carry its supervised turns and their ends.

    Tokenising the turns apart would give other tokens at the boundaries than the model sees in any text.

    Args:
        conversation: The messages, and which of them are supervised.
        tokenizer: A fast tokenizer with an end token.
        settings: What else decides the tokens.
        spans: The parts of the supervised turns that are; ``None`` for all of them and their ends.
        place: What messages call the conversation.

    Returns:
        The example; its labels are all −100 if nothing supervised is left.

    Raises:
        DataError: If a span is in a turn that the chat template does not mark as generated.
        ModelError: If the chat template leaves out a turn or changes it, or there is none that a conversation needs.
    """
    row_text = RowText(tokenizer, settings.allow_special_tokens)
    messages = [Message(message.role, row_text.protect(message.content)) for message in conversation.messages]
    if not any(messages[turn].content.strip() for turn in conversation.supervised):
        ids = row_text.encode("".join(message.content for message in messages)).ids
        return Example(ids, [IGNORED] * len(ids))

    rendering = _render(messages, conversation, tokenizer, settings, row_text)
    encoded = row_text.encode(
        *(piece.text for piece in rendering.pieces), add_special_tokens=not rendering.writes_start
    )
    if spans is None:
        ranges = find_supervised_ranges(rendering.pieces, encoded)
        if given := conversation.given_length:
            first_words = {len(messages) - 1: ((0, given),)}
            ((_, stop),) = find_span_ranges(rendering.pieces, encoded, conversation, first_words, row_text)
            # The end of the turn stays: the model has to say it as well.
            ranges[-1] = (stop, ranges[-1][1])
    else:
        marked = {piece.turn for piece in rendering.pieces}
        if not spans.keys() <= marked:
            # The row's other spans would be supervised without it, and what it names would stay in the model.
            raise DataError(
                f"{place} has a span in a turn that the chat template does not mark as generated (`{{% generation %}}`): leave the span "
                "out, or give `chat` another `template`.",
                argument="span_column",
            )
        ranges = find_span_ranges(rendering.pieces, encoded, conversation, spans, row_text)

    ids = encoded.ids
    labels = label_ranges(encoded, ranges)
    # The end token alone is no answer.
    if any(label != IGNORED for label in labels) and not rendering.has_end:
        # Some tokenizers add the end token themselves.
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(int(tokenizer.eos_token_id))
            labels.append(IGNORED)
        # The model has to learn to say what ends the assistant's turn.
        if spans is None:
            labels[-1] = ids[-1]
    return hide_padding_ids(Example(ids, labels).cut(settings.max_length), tokenizer, settings)


def _render(
    messages: Sequence[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncodingSettings,
    row_text: RowText,
) -> Rendering:
    template = find_literal_template(conversation, settings)
    if template is None and (tokenizer.chat_template is not None or _has_template(settings.chat)):
        # A turn without text has no place in the text that could be found.
        turns = [turn for turn in conversation.supervised if messages[turn].content.strip()]
        return render_conversation(messages, turns, tokenizer, settings.chat, row_text)
    if settings.chat is not None:
        raise ConfigError(
            "`chat` has settings of a chat template, but the tokenizer has none: give `chat` a `template`, or leave `chat` out.",
            argument="chat",
        )
    if not conversation.is_single_turn:
        place = "the tokenizer has no chat template" if template is None else "`template` is for one turn"
        raise ModelError(
            f"{place}, so a conversation of several messages has no place: give `chat` with a `template` in Jinja.",
            argument="template",
        )
    question, answer = messages
    return render_literal(question.content, answer.content, template or PLAIN_TEMPLATE, tokenizer, row_text)


def find_literal_template(conversation: Conversation, settings: EncodingSettings) -> str | None:
    """Return the literal template that a conversation is put in; ``None`` for the chat template."""
    if conversation.is_raw and settings.template is None and settings.chat is None:
        return RAW_TEMPLATE
    return settings.template


def describe_first_prompt(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings
) -> dict[str, Any] | None:
    """Return what decides the prompt of the first conversation, from `describe_prompt`; ``None`` if all rows are raw text."""
    for row in rows:
        if isinstance(row, Conversation):
            return describe_prompt(tokenizer, find_literal_template(row, settings), settings.chat)
    return None


def _has_template(chat: Chat | None) -> bool:
    return chat is not None and chat.template is not None


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings, place: str, spans: Spans | None = None
) -> list[Example]:
    """Tokenise a row.

    Args:
        row: A conversation, or a document.
        tokenizer: As for `encode_conversation`.
        settings: As for `encode_conversation`.
        place: What messages call the row, such as ``"row 3 of the forget set"``.
        spans: As for `encode_conversation`.

    Returns:
        One example; of a document as many as it has chunks.

    Raises:
        DataError: If the row is left without a supervised token, or as for `encode_conversation`; the message names it.
    """
    if isinstance(row, Document):
        examples = encode_document(row, tokenizer, settings, spans)
    else:
        examples = [encode_conversation(row, tokenizer, settings, spans, place)]
    if examples and all(map(has_supervised_token, examples)):
        return examples

    # Never the text itself: messages end up in logs, and a forget row is what no one should read again.
    is_cut = bool(examples) and examples[0].is_cut
    if is_cut:
        before = "its prompt alone fills" if spans is None else "what stands before its spans fills"
        reason = f"{before} `max_length` ({settings.max_length}); raise it"
    else:
        what = "text" if isinstance(row, Document) else "answer"
        reason = f"its {what} is empty or tokenises to nothing; remove the row"
    raise DataError(f"{place} has no supervised token: {reason}.", argument="max_length" if is_cut else None)


def encode_examples(
    rows: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    settings: EncodingSettings | None = None,
    number: int | None = None,
    **changes: Any,
) -> list[Example]:
    """Tokenise all questions and answers of a set.

    Args:
        rows: Pairs of question and answer.
        tokenizer: As for `encode`.
        name: Name of the set, for messages.
        settings: What else decides the tokens.
        number: Number of the row that all these belong to, for messages; ``None`` if they are rows 0, 1, ….
        **changes: Fields of ``settings``, in their place.

    Raises:
        DataError: If a row is left without a supervised token; the message names the row.
    """
    settings = replace(settings or EncodingSettings(), **changes)
    examples = []
    for position, (question, answer) in enumerate(rows):
        place = f"row {position if number is None else number} of the {name} set"
        examples += encode_row(Conversation.from_turn(question, answer), tokenizer, settings, place)
    return examples
