"""Prompt templates: where the question and the answer stand in the text that a model reads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lit_unlearn.errors import ConfigError, ModelError, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"

# A private character, which stands for the answer when a chat template is asked where it goes.
_MARK = "\ue000"


def render_chat(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Render one turn of question and answer by the tokenizer's chat template.

    Returns:
        The text before the answer, the answer as the template writes it (some strip it), and the text that ends the
        assistant's turn.

    Raises:
        ModelError: If the template fails, leaves out the answer or changes it.
    """
    # The mark finds the answer's place: the answer itself may occur elsewhere, such as "end" in "<|im_end|>".
    before, mark, after = _apply_chat_template(question, _MARK, tokenizer).rpartition(_MARK)
    text = _apply_chat_template(question, answer, tokenizer)
    for rendered in (answer, answer.strip()):
        if mark and text == before + rendered + after:
            return before, rendered, after.rstrip()
    raise ModelError(
        "the tokenizer's chat template does not render the answer of a row as it is: give `template`, a text with {question} "
        "and {answer}.",
        argument="template",
    )


def check_template(template: str | None) -> None:
    """Raise ConfigError unless a template has its question once and, after it, its answer once, and no backslash for a line.

    Raises:
        ConfigError: If it is unfit.
    """
    if template is None:
        return
    if re.findall(r"\{question\}|\{answer\}", template) != ["{question}", "{answer}"]:
        raise ConfigError(
            f"`template` must contain {{question}} and, after it, {{answer}}, once each; got {template!r}.",
            argument="template",
        )
    if re.search(r"\\[nrt]", template):
        # A shell hands over a backslash and an n: the model would read these two characters in every prompt.
        raise ConfigError(
            f"`template` contains a backslash and a letter where a line break or a tab is meant; got {template!r}. In a shell "
            "write $'…\\n…', in YAML \"…\\n…\" with double quotes.",
            argument="template",
        )


def _apply_chat_template(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    # A template is a program: it may raise anything, on purpose ("roles must alternate") or by mistake.
    remedy = "Give `template`, a text with {question} and {answer}."
    with reading("the chat template of the tokenizer", tokenizer.name_or_path, remedy, ModelError, argument="template"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
