"""Prompt templates: where questions and answers stand in the text that a model reads.

A conversation is rendered to pieces, whose join is exactly the text that the template gives, so that it can be tokenised once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_unlearn.data.formats import Message
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.errors import ConfigError, MissingFileError, ModelError, reading
from lit_unlearn.utils.io import expand_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
RAW_TEMPLATE = "{question}{answer}"

PINNED_DATE = date(2025, 1, 1)
"""What a chat template that prints today's date is told, so that a run has the same prompts on any day."""

_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(rf"\b{_CLOCK}\s*\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
# A macro goes before transformers' function of the same name, which cannot be exchanged. The line break ends the tag.
_PINNED_CLOCK = (
    f"{{% macro {_CLOCK}(format) %}}{{{{ pinned_dates[format] if format in pinned_dates else pinned_dates['any'] if 'any' in "
    f"pinned_dates else raise_exception('the date is asked for in a computed format: give {_CLOCK} in the args of chat') }}}}"
    "{% endmacro %}\n"
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What models that think write before their answer ends with it, and some templates leave that out of earlier turns.
_END_OF_THOUGHT = "</think>"


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
        clock = args.get(_CLOCK, "")
        if not isinstance(clock, str):
            message = f"`args` must have a text as '{_CLOCK}', not {clock!r}."
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


# Conversations in a chat template --------------------------------------------------------------------------------------


def render_conversation(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat | None,
    row_text: RowText,
) -> Rendering:
    """Render a conversation by a chat template, and find the texts of the assistant in it.

    Args:
        messages: Texts of rows are protected; see `RowText`.
        turns: Indices of the assistant's turns that are supervised; the last message is one of them.
        tokenizer: Of the model.
        chat: Settings of the template.
        row_text: Knows the special tokens.

    Raises:
        ModelError: If the template fails, leaves out or changes what a turn says, or leaves out the system message.
    """
    template = _ChatTemplate(tokenizer, chat or Chat())
    # Everywhere below, indices count a system message of the settings as well.
    added = template.add_system(messages)
    shift = len(added) - len(messages)
    shifted = [turn + shift for turn in turns]

    full = template.render(added)
    _check_all_read(template, added, full, has_system_of_chat=shift > 0)
    generated = template.find_generated(added, full)
    places = _find_places(template, added, shifted, full, generated, row_text)
    if places is None:
        raise ModelError(
            "the tokenizer's chat template does not render the answer of a row as it is, so its place cannot be found: give "
            "`template`, a text with {question} and {answer}, or `chat` with another `template`.",
            argument="template",
        )
    if generated is not None:
        shifted, places = _keep_generated(shifted, places, generated)
    pieces = _cut_into_pieces(full, places, [turn - shift for turn in shifted], row_text)
    return Rendering(pieces, writes_start=True, has_end=pieces[-1].turn is None)


def _check_all_read(template: _ChatTemplate, messages: Sequence[Message], full: str, has_system_of_chat: bool) -> None:
    """Raise ModelError if a template leaves out a message that has no turn of its own in many templates, without a word."""
    mark = _choose_mark(full)
    for index, message in enumerate(messages):
        if message.role in ("user", "assistant") or not message.content.strip():
            continue
        # By a mark, since a short text may also stand elsewhere, and results of tools may be written as JSON.
        marked = [*messages[:index], Message(message.role, mark), *messages[index + 1 :]]
        if mark in template.render(marked):
            continue
        if has_system_of_chat and index == 0:
            raise ModelError(
                "the chat template leaves out the system message of `chat`: it has no place for one. Leave out `system`, or give "
                "another `template` there.",
                argument="chat",
            )
        raise ModelError(
            f"the chat template leaves out a message of the role '{message.role}' that a row has: it has no place for one. Give "
            "`chat` with another `template`, or write the message into that of the user.",
            argument="chat",
        )


_Place = tuple[int, int]
"""First and last character (exclusive) of what a turn says."""


class _ChatTemplate:
    """A tokenizer's chat template with its settings, in which time stands still."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        with self._reading():
            self.text = str(tokenizer.get_chat_template(chat.template_text))
        self._settings = dict(chat.args)
        clock_text = self._settings.pop(_CLOCK, None)
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

    def find_generated(self, messages: Sequence[Message], full: str) -> list[_Place] | None:
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
    if not re.search(rf"\b{_CLOCK}\b", template):
        return None
    return tuple(dict.fromkeys(single or double for single, double in _CLOCK_CALL.findall(template)))


def _pin_dates(formats: Sequence[str], clock_text: str | None) -> dict[str, str]:
    """Return by format what a template is told that asks for today's date."""
    if clock_text is not None:
        return {"any": clock_text}
    moment = datetime(PINNED_DATE.year, PINNED_DATE.month, PINNED_DATE.day)
    return {form: moment.strftime(form) for form in formats}


def _variants(content: str) -> list[str]:
    """Return the forms in which templates write what a turn says: many strip the space around it."""
    return list(
        dict.fromkeys(
            [content, content.strip(), content.lstrip("\n"), content.strip("\n"), content.lstrip(), content.rstrip()]
        )
    )


def _find_places(
    template: _ChatTemplate,
    messages: Sequence[Message],
    turns: Sequence[int],
    full: str,
    generated: Sequence[_Place] | None,
    row_text: RowText,
) -> list[_Place] | None:
    """Return where each turn's text is; ``None`` if that of one is not to be found."""
    places = _find_by_marks(template, messages, turns, full)
    if places is not None:
        return places
    # Templates that rewrite a turn, such as those that move the thought in it, render a mark in another way.
    places = []
    for turn in turns:
        alone = _find_by_marks(template, messages, [turn], full)
        place = alone[0] if alone else _find_by_prefix(template, messages, turn, full, row_text)
        if place is None and generated is not None:
            place = _find_by_generation(messages, turn, full, generated, row_text)
        if place is None:
            return None
        places.append(place)
    return places


def _find_by_marks(
    template: _ChatTemplate, messages: Sequence[Message], turns: Sequence[int], full: str
) -> list[_Place] | None:
    """Find what turns say by rendering a mark in the place of each; ``None`` if that is not what the template then renders."""
    # What a turn says may occur elsewhere, such as "end" in "<|im_end|>"; the mark occurs in no text.
    mark = _choose_mark(full)
    marked = [*messages]
    for turn in turns:
        marked[turn] = Message(marked[turn].role, mark)
    parts = template.render(marked).split(mark)
    if len(parts) != len(turns) + 1 or not full.startswith(parts[0]):
        return None

    places = []
    position = len(parts[0])
    for turn, following in zip(turns, parts[1:], strict=True):
        is_last = turn == turns[-1]
        for variant in _variants(messages[turn].content):
            stop = position + len(variant)
            if full.startswith(variant + following, position) and (not is_last or stop + len(following) == len(full)):
                places.append((position, stop))
                position = stop + len(following)
                break
        else:
            return None
    return places


def _choose_mark(text: str) -> str:
    """Return a private character that does not occur in a text."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _find_by_prefix(
    template: _ChatTemplate, messages: Sequence[Message], turn: int, full: str, row_text: RowText
) -> _Place | None:
    """Find what a turn says by rendering the conversation up to it; ``None`` if the whole does not begin like that."""
    before = template.render(messages[:turn], add_generation_prompt=True) if turn else ""
    until = template.render(messages[: turn + 1]).rstrip()
    if not full.startswith(before):
        return None
    if full.startswith(until) and len(until) > len(before):
        content = row_text.cut_end(until[len(before) :])
    else:
        # A later turn changes how this one is rendered, but not that a special token ends it.
        content = row_text.cut_at_token(full[len(before) :])
    if not _contains_answer(messages[turn].content, content):
        return None
    return len(before), len(before) + len(content)


def _find_by_generation(
    messages: Sequence[Message], turn: int, full: str, generated: Sequence[_Place], row_text: RowText
) -> _Place | None:
    """Find what a turn says by the template's own marks, if there are as many of them as turns of the assistant's."""
    of_assistant = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(of_assistant) != len(generated):
        return None
    start, stop = generated[of_assistant.index(turn)]
    content = row_text.cut_end(full[start:stop])
    return (start, start + len(content)) if _contains_answer(messages[turn].content, content) else None


def _contains_answer(content: str, rendered: str) -> bool:
    """Return whether what a turn says, or what it says after a thought, is in the text that was found for it."""
    answer = content.rpartition(_END_OF_THOUGHT)[2].strip()
    return bool(answer) and answer in rendered


def _keep_generated(
    turns: Sequence[int], places: Sequence[_Place], generated: Sequence[_Place]
) -> tuple[list[int], list[_Place]]:
    """Return the turns that the template marks as generated."""
    marked_turns, marked_places = [], []
    for turn, place in zip(turns, places, strict=True):
        if any(begin < place[1] and place[0] < stop for begin, stop in generated):
            marked_turns.append(turn)
            marked_places.append(place)
    if not marked_turns or marked_turns[-1] != turns[-1]:
        raise ModelError(
            "the chat template does not mark the last turn of the assistant's as generated (`{% generation %}`), so nothing of it "
            "may be supervised: give `chat` another `template`.",
            argument="chat",
        )
    return marked_turns, marked_places


def _cut_into_pieces(full: str, places: Sequence[_Place], turns: Sequence[int], row_text: RowText) -> list[Piece]:
    """Return the text in pieces, up to the end of the last turn; a turn's end is supervised like what it says."""
    last_end = full[places[-1][1] :].rstrip()
    pieces = []
    position = 0
    for turn, (start, stop) in zip(turns, places, strict=True):
        end = last_end
        if not full.startswith(last_end, stop):
            # Some templates write more at the end of a conversation than at that of a turn.
            end = row_text.find_end(full[stop:])
            end = end if last_end.startswith(end) else ""
        pieces += [Piece(full[position:start]), Piece(full[start:stop], True, turn)]
        position = stop + len(end)
        if end:
            pieces.append(Piece(end, True))
    return pieces


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
    chat_template = _ChatTemplate(tokenizer, chat)
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
