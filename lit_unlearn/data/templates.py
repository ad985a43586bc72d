"""Prompt templates: where the question and the answer stand in the text that a model reads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"


_MARK = "\ue000"  # a private character: stands for the answer when a chat template is asked where it goes


def _render_chat(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What the chat template puts before the answer, the answer in its form, and what ends the assistant's turn.

    The answer's place is found with a mark, because the answer itself may occur elsewhere ("end" in ``<|im_end|>``).
    """

    def rendered(content: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    before, found, after = rendered(_MARK).rpartition(_MARK)
    text = rendered(answer)
    for said in (answer, answer.strip()):
        if found and text == before + said + after:
            return before, said, after.rstrip()
    raise ValueError(
        f"the tokenizer's chat template does not render the answer as it is ({answer[:60]!r}): give `data.template`, a "
        "text with {question} and {answer}."
    )


def check_template(template: str | None, where: str) -> None:
    """Raises ValueError unless a template has its question and, after it, its answer; ``where`` it is set."""
    if template is not None and re.findall(r"\{question\}|\{answer\}", template) != ["{question}", "{answer}"]:
        raise ValueError(f"{where} must contain {{question}} and, after it, {{answer}}, once each; got {template!r}.")
