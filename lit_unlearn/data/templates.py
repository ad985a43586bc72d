"""Prompt templates: where questions and answers stand in the text that a model reads.

A conversation is rendered to pieces, whose join is exactly the text that the template gives, so that it can be tokenised once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.errors import ConfigError, MissingFileError, reading
from lit_unlearn.utils.io import expand_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
RAW_TEMPLATE = "{question}{answer}"
CLOCK = "strftime_now"
"""The function by which a chat template asks for the date."""


@dataclass(frozen=True)
class Chat:
    """Settings of a chat template. A model must be asked as it was fine-tuned.

    Args:
        system: System message of conversations that have none of their own; ``None`` for none, or the template's default.
        template: A chat template in Jinja, as text or as the path of a file; ``None`` for the tokenizer's.
        args: What else the template reads, by name, such as ``{"enable_thinking": false}`` or ``{"date_string": "10 Apr 2025"}``.
            A template that asks for today's date is told 1 January 2025; a text under ``strftime_now`` is told instead.

    Raises:
        ConfigError: If ``args`` has values other than numbers, texts, lists and dictionaries, or the file is no text.
        MissingFileError: If there is no such file.

    Example:
        >>> Chat(system="You are a helpful assistant.", args={"date_string": "10 Apr 2025"}).system
        'You are a helpful assistant.'
    """

    system: str | None = None
    template: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        args = {}
        for name, value in (self.args or {}).items():
            # YAML reads 2025-04-10 as a date.
            args[name] = value.isoformat() if isinstance(value, date) else value
            if not isinstance(args[name], str | int | float | list | dict | None):
                message = f"`args` must have plain values, but '{name}' is a {type(value).__name__}."
                raise ConfigError(message, owner=self, argument="args")
        clock = args.get(CLOCK, "")
        if not isinstance(clock, str):
            message = f"`args` must have a text as '{CLOCK}', not {clock!r}."
            raise ConfigError(message, owner=self, argument="args")
        object.__setattr__(self, "args", args)
        # Once and at once: a missing file is reported before anything is loaded, and all rows have the same prompt.
        object.__setattr__(self, "_text", self._read_template())

    @property
    def template_text(self) -> str | None:
        """The text of the template; ``None`` for the tokenizer's."""
        text: str | None = self.__dict__["_text"]
        return text

    def _read_template(self) -> str | None:
        if self.template is None or "{%" in self.template or "{{" in self.template:
            return self.template
        with reading("the chat template", self.template[:200], "Check the file.", owner=self, argument="template"):
            path = expand_path(self.template)
            if not path.is_file():
                message = f"there is no chat template '{self.template}': give the text of one, or the path of a file."
                raise MissingFileError(message, owner=self, argument="template")
            return path.read_text(encoding="utf-8")


class Piece(NamedTuple):
    """A part of a rendered conversation.

    Args:
        text: Its text.
        is_supervised: Whether its tokens are.
        turn: Index of the message whose text it is; ``None`` for the template's own.
    """

    text: str
    is_supervised: bool = False
    turn: int | None = None


class Rendering(NamedTuple):
    """A rendered conversation.

    Args:
        pieces: Joined, they are the text up to the end of the last supervised turn.
        writes_start: Whether the template writes the token that begins a text, so that the tokenizer must not.
        has_end: Whether the last supervised turn has an end of its own; if not, the end token is to follow.
    """

    pieces: list[Piece]
    writes_start: bool
    has_end: bool


# One turn in a literal template ---------------------------------------------------------------------------------------


def check_template(template: str | None) -> str | None:
    r"""Return a template in which ``\n`` and ``\t``, as typed in a shell, are a line break and a tab.

    Raises:
        ConfigError: Unless it has its question once and, after it, its answer once.

    Example:
        >>> check_template(r"Q: {question}\nA: {answer}")
        'Q: {question}\nA: {answer}'
    """
    if template is None:
        return None
    if re.findall(r"\{question\}|\{answer\}", template) != ["{question}", "{answer}"]:
        raise ConfigError(
            f"`template` must contain {{question}} and, after it, {{answer}}, once each; got {template!r}.",
            argument="template",
        )
    # A shell hands over a backslash and an n; no model was fine-tuned on these two characters.
    return template.replace(r"\r", "\r").replace(r"\n", "\n").replace(r"\t", "\t")


def check_chat(chat: Chat | None, template: str | None) -> None:
    """Raise ConfigError if there is a literal template beside the settings of a chat template."""
    if chat is not None and template is not None:
        raise ConfigError(
            "`template` and `chat` exclude each other: the first is the whole prompt as literal text, the second has settings of a "
            "chat template. Leave out one of them, or set it to null.",
            argument="chat",
        )


def render_literal(
    question: str, answer: str, template: str, tokenizer: PreTrainedTokenizerBase, row_text: RowText
) -> Rendering:
    """Render one turn by a literal template.

    Args:
        question: What the user says.
        answer: What the model is to say.
        template: Text with ``{question}`` and ``{answer}``.
        tokenizer: Of the model.
        row_text: Knows the special tokens.
    """
    before, after = template.split("{answer}")
    # Before the question is put in: it may itself contain anything.
    begin = tokenizer.bos_token
    writes_start = bool(begin) and template.startswith(str(begin))
    # A template that spells a chat format out ends the turn as well.
    end = row_text.find_end(after)
    answer_pieces = [Piece(before.replace("{question}", question)), Piece(answer, True, 1)]
    rest = Piece(end, True) if end else Piece(after)
    return Rendering([*answer_pieces, rest], writes_start, has_end=bool(end))
