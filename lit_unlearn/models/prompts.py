"""Questions as prompts of token ids, cut where the answer begins in the text that training puts both in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_unlearn.data.encoding import encode
from lit_unlearn.data.encoding_settings import check_tokenizer
from lit_unlearn.data.example import prompt_of
from lit_unlearn.data.templates import Chat, check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompts(
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    chat: Chat | None = None,
    allow_special_tokens: bool = False,
) -> list[list[int]]:
    """Return the tokens of every question up to its answer.

    Args:
        questions: Plain text.
        tokenizer: The model's.
        template: As for `LanguageModel.generate`.
        chat: As for `LanguageModel.generate`.
        allow_special_tokens: As for `LanguageModel.generate`.

    Raises:
        ModelError: If the tokenizer cannot end an answer.
    """
    check_tokenizer(tokenizer)
    template = check_template(template)
    prompts = []
    for question in questions:
        # A token may carry the last space of the prompt and the first letters of the answer, so an answer is needed to
        # find where the prompt ends, and which answers are joined to the space depends on the tokenizer.
        candidates = []
        for answer in ("A", "The", "Answer"):
            example = encode(
                question,
                answer,
                tokenizer,
                template=template,
                chat=chat,
                max_length=sys.maxsize,
                allow_special_tokens=allow_special_tokens,
            )
            candidates.append(prompt_of(example))
        prompts.append(min(candidates, key=len))
    return prompts
