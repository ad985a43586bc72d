"""A tokenizer's chat template with its settings, and what it decides about the prompts of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.formats import Message
from lit_unlearn.data.templates import CLOCK, PLAIN_TEMPLATE, Chat
from lit_unlearn.errors import ModelError, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED_DATE = date(2025, 1, 1)
"""What a chat template that prints today's date is told, so that a run has the same prompts on any day."""

_CLOCK_CALL = re.compile(rf"\b{CLOCK}\s*\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
# A macro goes before transformers' function of the same name, which cannot be exchanged. The line break ends the tag.
_PINNED_CLOCK = (
    f"{{% macro {CLOCK}(format) %}}{{{{ pinned_dates[format] if format in pinned_dates else pinned_dates['any'] if 'any' in "
    f"pinned_dates else raise_exception('the date is asked for in a computed format: give {CLOCK} in the args of chat') }}}}"
    "{% endmacro %}\n"
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


CharacterSpan = tuple[int, int]
"""First and last character (exclusive) of what a turn says."""


class ChatTemplate:
    """A tokenizer's chat template with its settings, in which time stands still."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        with self._reading():
            self.text = str(tokenizer.get_chat_template(chat.template_text))
        self._settings = dict(chat.args)
        clock_text = self._settings.pop(CLOCK, None)
        formats = _find_clock_formats(self.text)
        self.dates = {} if formats is None else _pin_dates(formats, clock_text)
        self._pinned_text = self.text
        if formats is not None:
            self._pinned_text = _PINNED_CLOCK + self.text
            self._settings["pinned_dates"] = self.dates

    def add_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages after the system message of the settings, unless they have one of their own."""
        return add_system(messages, self._chat)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of messages."""
        with self._reading():
            return str(
                self._tokenizer.apply_chat_template(
                    _as_dicts(messages),
                    chat_template=self._pinned_text,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self._settings,
                )
            )

    def find_generated(self, messages: Sequence[Message], full: str) -> list[CharacterSpan] | None:
        """Return which parts of the text are marked as generated; ``None`` for a template that marks nothing."""
        if not _GENERATION_TAG.search(self.text):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._reading():
            render: Any = render_jinja_template
            rendered, places = render(
                [_as_dicts(messages)],
                chat_template=self._pinned_text,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._settings},
            )
        if rendered != [full] or not places[0]:
            raise ModelError(
                "the marks `{% generation %}` of the chat template enclose nothing that can be found: give `chat` another "
                "`template`, without them.",
                argument="chat",
            )
        return list(places[0])

    def _reading(self) -> Any:
        # A template is a program: it may raise anything, on purpose ("roles must alternate") or by mistake.
        if self._chat.system is None:
            remedy = "Give `template`, a text with {question} and {answer}, or `chat` with another `template`."
        else:
            remedy = "If it has no place for a system message, leave `system` out of `chat`; or give another `template` there."
        name = self._tokenizer.name_or_path
        return reading("the chat template of the tokenizer", name, remedy, ModelError, argument="template")


def add_system(messages: Sequence[Message], chat: Chat) -> list[Message]:
    """Return the messages after the system message of the settings, unless they have one of their own."""
    if chat.system is None or messages[0].role in ("system", "developer"):
        return [*messages]
    return [Message("system", chat.system), *messages]


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@lru_cache(maxsize=32)
def _find_clock_formats(template: str) -> tuple[str, ...] | None:
    """Return the formats in which a template asks for the date; ``None`` if it does not ask."""
    # Called, or handed on under another name.
    if not re.search(rf"\b{CLOCK}\b", template):
        return None
    return tuple(dict.fromkeys(single or double for single, double in _CLOCK_CALL.findall(template)))


def _pin_dates(formats: Sequence[str], clock_text: str | None) -> dict[str, str]:
    """Return by format what a template is told that asks for today's date."""
    if clock_text is not None:
        return {"any": clock_text}
    moment = datetime(PINNED_DATE.year, PINNED_DATE.month, PINNED_DATE.day)
    return {form: moment.strftime(form) for form in formats}


# What a prompt is, for comparisons -------------------------------------------------------------------------------------


def describe_prompt(tokenizer: PreTrainedTokenizerBase, template: str | None, chat: Chat | None) -> dict[str, Any]:
    """Return what decides the prompts of a run, in plain types and without any text of rows.

    Args:
        tokenizer: Of the model.
        template: A literal template.
        chat: Settings of the chat template.

    Returns:
        ``text``, one turn with ``{question}`` and ``{answer}`` in their places; ``system`` and ``args`` of the settings;
        ``chat_template``, the text of the template in the settings; and ``dates``, what a template that asks for today's date is
        told, by format.
    """
    if template is not None or (tokenizer.chat_template is None and chat is None):
        text = template or PLAIN_TEMPLATE
        return {"text": text, "system": None, "args": {}, "chat_template": None, "dates": {}}
    chat = chat or Chat()
    chat_template = ChatTemplate(tokenizer, chat)
    turn = [Message("user", "{question}"), Message("assistant", "{answer}")]
    text = chat_template.render(chat_template.add_system(turn))
    return {
        "text": text,
        "system": chat.system,
        "args": chat.args,
        "chat_template": chat.template_text,
        "dates": chat_template.dates,
    }


def find_prompt_difference(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    """Return the first difference of two prompts, as `describe_prompt` gives them, in words; ``None`` if there is none.

    Example:
        >>> prompts = [{"text": text} for text in ("Q: {question}", "Question: {question}")]
        >>> find_prompt_difference(*prompts)
        "the prompt differs from character 1 on, ': {question}' then and 'uestion: {question}' now"
    """
    if not before or not now:
        return None
    for key in ("system", "args", "dates"):
        if before.get(key) != now.get(key):
            return f"the prompt differs in `{key}`, {before.get(key)!r} then and {now.get(key)!r} now"
    then, here = str(before["text"]), str(now["text"])
    if then == here:
        return None
    position = 0
    while then[position : position + 1] == here[position : position + 1]:
        position += 1
    shown = [text[position : position + 60] for text in (then, here)]
    return f"the prompt differs from character {position} on, {shown[0]!r} then and {shown[1]!r} now"
