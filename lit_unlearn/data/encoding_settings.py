"""What decides the tokens of a row beside the row: settings, and what a tokenizer must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.example import Example
from lit_unlearn.data.templates import Chat, check_chat
from lit_unlearn.errors import ConfigError, ModelError
from lit_unlearn.utils.validation import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def find_hidden_id(tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> int | None:
    """Return the id of the tokens that ``mask_padding_ids`` hides from all others; ``None`` if it is false."""
    if not settings.mask_padding_ids:
        return None
    # Never `None`: `check_tokenizer` asks for an end token.
    pad_id: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(pad_id)


def hide_padding_ids(example: Example, tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> Example:
    """Return an example in which no other token sees those that ``mask_padding_ids`` hides."""
    hidden_id = find_hidden_id(tokenizer, settings)
    if hidden_id is None:
        return example
    return example._replace(attention_mask=[int(token != hidden_id) for token in example.input_ids])
