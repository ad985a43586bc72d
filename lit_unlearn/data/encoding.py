"""Encode text as examples: each is tokenised once and labelled by character offsets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lit_unlearn.data.formats import Conversation, Document, Message, Row
from lit_unlearn.data.spans import Spans
from lit_unlearn.data.special_tokens import Encoded, RowText
from lit_unlearn.data.templates import (
    PLAIN_TEMPLATE,
    RAW_TEMPLATE,
    Chat,
    Piece,
    Rendering,
    check_chat,
    describe_prompt,
    render_conversation,
    render_literal,
)
from lit_unlearn.errors import ConfigError, DataError, ModelError
from lit_unlearn.utils.validation import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The label of a token that is not supervised, as in transformers.
IGNORED = -100


class Example(NamedTuple):
    """One training item: the tokens of a row, unpadded.

    Args:
        input_ids: Token ids of prompt and answer, shape ``(T,)``.
        labels: The same ids where supervised (the answer and its end), −100 elsewhere, shape ``(T,)``.
        id: ``"<stream>/<row number>"``, which `ForgetRetain` gives; an alternate answer's ends with ``"/alternate"``.
        is_cut: Whether tokens beyond ``max_length`` were cut off.
        alternate: The same question with another answer, for objectives that read one.
        attention_mask: 0 for tokens that no other one sees, shape ``(T,)``; ``None`` if every token is seen.
    """

    input_ids: list[int]
    labels: list[int]
    id: str = ""
    is_cut: bool = False
    alternate: Example | None = None
    attention_mask: list[int] | None = None

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify tokens and labels.

        The id alone does not: under the same id, another tokenizer or template makes another example.
        """
        content = self[:2] if self.attention_mask is None else (*self[:2], self.attention_mask)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]

    def without_labels(self) -> Example:
        """Return the example with nothing supervised and no id, to fill up a batch without weighing anything."""
        alternate = None if self.alternate is None else self.alternate.without_labels()
        return self._replace(labels=[IGNORED] * len(self.labels), id="", is_cut=False, alternate=alternate)

    def cut(self, length: int) -> Example:
        """Return the example with its first tokens only."""
        mask = None if self.attention_mask is None else self.attention_mask[:length]
        is_cut = self.is_cut or len(self.input_ids) > length
        return self._replace(
            input_ids=self.input_ids[:length], labels=self.labels[:length], is_cut=is_cut, attention_mask=mask
        )


@dataclass(frozen=True)
class EncodingSettings:
    """What decides the tokens of a row, beside the row and the tokenizer.

    Args:
        template: Text with ``{question}`` and ``{answer}``, the answer last; ``None`` for the tokenizer's chat template where
            it has one, else ``PLAIN_TEMPLATE``. A prompt and a completion that are two texts then have no template.
        chat: Settings of the chat template.
        max_length: Largest number of tokens of an example. Conversations are cut there; documents continue in another one.
        chunk_overlap: Of a document, tokens of an example that the next one begins with, to read them only.
        allow_special_tokens: Whether special tokens in rows, such as ``<|im_end|>``, are control tokens, and not text like any
            other.
        mask_padding_ids: Whether tokens with the id of the padding are hidden from all others, as by ``ids != pad``.
    """

    template: str | None = None
    chat: Chat | None = None
    max_length: int = 512
    chunk_overlap: int = 0
    allow_special_tokens: bool = False
    mask_padding_ids: bool = False

    def __post_init__(self) -> None:
        check_chat(self.chat, self.template)


def check_chunk_overlap(chunk_overlap: int, max_length: int, owner: object) -> None:
    """Raise ConfigError unless every example of a document adds a token to those that it repeats."""
    check_at_least(0, owner, chunk_overlap=chunk_overlap)
    # Beside the start token.
    if chunk_overlap > max(max_length - 2, 0):
        message = f"`chunk_overlap` must be below `max_length` by 2 or more, not {chunk_overlap} with {max_length}."
        raise ConfigError(message, owner=owner, argument="chunk_overlap")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if a tokenizer cannot end an answer, or cannot say which characters a token covers.

    A missing pad token is no problem: masks are made from lengths, so the end token pads.
    """
    name = tokenizer.name_or_path
    if tokenizer.eos_token_id is None:
        pad = "no" if tokenizer.pad_token_id is None else "a"
        raise ModelError(
            f"the tokenizer '{name}' has no end-of-sequence token (and {pad} pad token), so answers cannot end: set "
            "`eos_token` in its tokenizer_config.json, or choose another tokenizer.",
            argument="tokenizer",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer '{name}' is a slow one, which gives no character offsets: convert it to a fast tokenizer (a "
            "tokenizer.json), or choose another.",
            argument="tokenizer",
        )


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
        ranges = _find_supervised_ranges(rendering.pieces, encoded)
        if given := conversation.given_length:
            first_words = {len(messages) - 1: ((0, given),)}
            ((_, stop),) = _find_span_ranges(rendering.pieces, encoded, conversation, first_words, row_text)
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
        ranges = _find_span_ranges(rendering.pieces, encoded, conversation, spans, row_text)

    ids = encoded.ids
    labels = _label_ranges(encoded, ranges)
    # The end token alone is no answer.
    if any(label != IGNORED for label in labels) and not rendering.has_end:
        # Some tokenizers add the end token themselves.
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(int(tokenizer.eos_token_id))
            labels.append(IGNORED)
        # The model has to learn to say what ends the assistant's turn.
        if spans is None:
            labels[-1] = ids[-1]
    return _mask(Example(ids, labels).cut(settings.max_length), tokenizer, settings)


def _render(
    messages: Sequence[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncodingSettings,
    row_text: RowText,
) -> Rendering:
    template = _find_literal_template(conversation, settings)
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


def _find_literal_template(conversation: Conversation, settings: EncodingSettings) -> str | None:
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
            return describe_prompt(tokenizer, _find_literal_template(row, settings), settings.chat)
    return None


def _has_template(chat: Chat | None) -> bool:
    return chat is not None and chat.template is not None


_Range = tuple[int, int]
"""First and last character (exclusive) of a part of the text whose tokens are supervised."""


def _find_supervised_ranges(pieces: Sequence[Piece], encoded: Encoded) -> list[_Range]:
    """Return the parts of the text that are supervised; pieces that follow each other are one part."""
    ranges: list[_Range] = []
    for number, piece in enumerate(pieces):
        start, stop = encoded.starts[number : number + 2]
        if not piece.is_supervised:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


def _find_span_ranges(
    pieces: Sequence[Piece], encoded: Encoded, conversation: Conversation, spans: Spans, row_text: RowText
) -> list[_Range]:
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


def _label_ranges(encoded: Encoded, ranges: Iterable[_Range]) -> list[int]:
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


def find_hidden_id(tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> int | None:
    """Return the id of the tokens that ``mask_padding_ids`` hides from all others; ``None`` if it is false."""
    if not settings.mask_padding_ids:
        return None
    # Never `None`: `check_tokenizer` asks for an end token.
    pad_id: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(pad_id)


def _mask(example: Example, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> Example:
    hidden_id = find_hidden_id(tokenizer, settings)
    if hidden_id is None:
        return example
    return example._replace(attention_mask=[int(token != hidden_id) for token in example.input_ids])


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
    if examples and all(map(_is_supervised, examples)):
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


def _is_supervised(example: Example) -> bool:
    # Nothing predicts the first token, so a label there supervises nothing.
    return any(label != IGNORED for label in example.labels[1:])


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


# Documents ------------------------------------------------------------------------------------------------------------


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
    labels = _label_ranges(encoded, ranges)
    overlap = settings.chunk_overlap
    if not _adds_start(tokenizer):
        # Nothing predicts the first token of an example: it is the last one of the example before, which has learned it.
        overlap = max(overlap, 1)
    chunks = _cut_into_chunks(encoded.ids, labels, tokenizer, settings.max_length, overlap)
    return [_mask(chunk, tokenizer, settings) for chunk in chunks if _is_supervised(chunk)]


def _adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer begins texts with the start token."""
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])


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


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Pad examples to a Hugging Face batch, with the mask made from the lengths.

    Args:
        examples: ``B`` examples.
        pad_id: Fills the tail; any id will do. The mask does not depend on it: with the end token as padding,
            ``ids != pad_id`` would hide the end of every answer.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64, shape ``(B, T)``; and under ``alternate`` a batch of the
        alternate answers, if there are any.
    """
    width = max(len(example.input_ids) for example in examples)
    shape = (len(examples), width)
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        ids[i, :length] = torch.tensor(example.input_ids)
        mask[i, :length] = 1 if example.attention_mask is None else torch.tensor(example.attention_mask)
        labels[i, :length] = torch.tensor(example.labels)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    alternates = [example.alternate for example in examples if example.alternate is not None]
    if alternates:
        batch["alternate"] = collate(alternates, pad_id)
    return batch


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the first supervised one: exactly what the answer is predicted from."""
    is_supervised = [label != IGNORED for label in example.labels]
    return example.input_ids[: is_supervised.index(True)]


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds to those before it: joined, they are the text of all."""
    texts, before = [], ""
    for stop in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
        if stop < len(ids):
            # A replacement character stands for the first bytes of a character that the next tokens complete.
            text = text.rstrip("\ufffd")
        texts.append(text[len(before) :])
        before = text
    return texts


def show_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """Return ``tokens``, the texts of an example's tokens, and which of them are ``supervised``."""
    return {
        "tokens": token_texts(example.input_ids, tokenizer),
        "supervised": [label != IGNORED for label in example.labels],
    }


def format_example(example: Mapping[str, Sequence[Any]]) -> str:
    """Return the text of an example with a bar between tokens and brackets around every supervised one.

    Args:
        example: From `show_tokens`.

    Example:
        >>> format_example({"tokens": ["Who?", " Ada", "</s>"], "supervised": [False, True, True]})
        'Who?[ Ada][</s>]'
    """
    text = ""
    was_supervised = True
    for token, is_supervised in zip(example["tokens"], example["supervised"], strict=True):
        bar = "" if is_supervised or was_supervised else "|"
        text += f"[{token}]" if is_supervised else f"{bar}{token}"
        was_supervised = is_supervised
    return text
