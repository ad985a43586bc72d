"""Examples as people read them: the text of every token, and which tokens are supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.example import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def show_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """Return ``tokens``, the texts of an example's tokens, and which of them are ``supervised``."""
    return {
        "tokens": token_texts(example.input_ids, tokenizer),
        "supervised": [label != IGNORED for label in example.labels],
    }


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
