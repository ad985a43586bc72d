"""Formats of rows: a row of any of them is read as a conversation or as a document.

Everything after this module knows these two only. A question with its answer and a prompt with its completion are
conversations of one turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lit_unlearn.data.files import describe_kind
from lit_unlearn.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["auto", "question_answer", "prompt_completion", "messages", "text"]
Supervise = Literal["all", "last"]

ROLES = ("system", "developer", "user", "assistant", "tool")

# As trl names them; nothing else is called so.
_PROMPT, _COMPLETION = "prompt", "completion"
_SHAREGPT = 'map({role: ({human: "user", gpt: "assistant"}[.from] // .from), content: .value})'  # of a list of `from` and `value`

# What a message may say outside of its content. Left out without a word, it would be neither learned nor forgotten.
_UNREAD = {
    "tool_calls": "calls of tools",
    "function_call": "calls of tools",
    "reasoning_content": "thoughts",
    "reasoning": "thoughts",
    "thinking": "thoughts",
}


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: One of `ROLES`.
        content: Its text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages up to an assistant's turn, some of whose assistant turns are learned or forgotten.

    What follows the last of these turns is no part of it: no supervised token is predicted from there.

    Args:
        messages: In order.
        supervised: Indices of the assistant turns that are supervised, ascending; the last message is one of them.
        is_raw: Whether question and answer are two halves of a raw text, which has no template unless one is asked for.
        given_words: Number of words that the last turn starts with and that are only read, as if the model had begun to say them.
            The last word of the turn never is.
    """

    messages: tuple[Message, ...]
    supervised: tuple[int, ...]
    is_raw: bool = False
    given_words: int = 0

    @classmethod
    def from_turn(cls, question: str, answer: str) -> Conversation:
        """Return the conversation of a question and its answer.

        Example:
            >>> Conversation.from_turn("Who?", "Ada.").supervised
            (1,)
        """
        return cls((Message("user", question), Message("assistant", answer)), (1,))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of all messages."""
        return tuple(message.content for message in self.messages)

    @property
    def is_single_turn(self) -> bool:
        """True for a question with its answer and nothing else."""
        return [message.role for message in self.messages] == ["user", "assistant"]

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.messages[-1].content

    @property
    def given_length(self) -> int:
        """Number of characters that the last turn starts with and that are given.

        Example:
            >>> from dataclasses import replace
            >>> replace(Conversation.from_turn("Who?", "Ada wrote it."), given_words=2).given_length
            9
        """
        words = list(re.finditer(r"\S+", self.answer))
        given = words[:-1][: self.given_words]
        return given[-1].end() if given else 0

    @property
    def expected(self) -> str:
        """The text that is left to say in the last turn: all of it, unless its first words are given."""
        given = self.given_length
        return self.answer[given:].lstrip() if given else self.answer

    @property
    def question(self) -> str:
        """What the last turn answers: the text of the last message of the user's, or nothing."""
        index = self._question_index
        return "" if index is None else self.messages[index].content

    def with_answer(self, answer: str) -> Conversation:
        """Return the same conversation with another text in its last turn, the only one that is supervised."""
        messages = (*self.messages[:-1], Message("assistant", answer))
        return replace(self, messages=messages, supervised=(len(messages) - 1,))

    def with_question(self, question: str) -> Conversation:
        """Return the same conversation with another text in the user's last message."""
        index = self._question_index
        if index is None:
            return self
        messages = [*self.messages]
        messages[index] = Message("user", question)
        return replace(self, messages=tuple(messages))

    @property
    def _question_index(self) -> int | None:
        for index in reversed(range(len(self.messages))):
            if self.messages[index].role == "user":
                return index
        return None


@dataclass(frozen=True)
class Document:
    """Raw text, every token of which is supervised.

    Args:
        text: The text.
        context: What stands before it and is only read.
    """

    text: str
    context: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, and what stands before it if there is anything."""
        return (self.context, self.text) if self.context else (self.text,)


Row = Conversation | Document
"""A row, whatever the format of its file."""


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of a set in the format that its columns have.

    Args:
        format: The format of all sets; ``"auto"`` to recognise that of each set by its columns.
        supervise: For conversations, whether every assistant turn is supervised or the last one only.
        question_column: Column with the question.
        answer_column: Column with the answer.
        messages_column: Column with a list of messages, each with ``role`` and ``content``.
        text_column: Column with raw text.
        context_column: Column with text before it that is only read; ``None`` for none.
    """

    format: Format = "auto"
    supervise: Supervise = "all"
    question_column: str = "question"
    answer_column: str = "answer"
    messages_column: str = "messages"
    text_column: str = "text"
    context_column: str | None = None

    def recognize(self, columns: Sequence[str]) -> Format:
        """Return the format of a set with these columns.

        Example:
            >>> RowReader().recognize(["prompt", "completion", "id"])
            'prompt_completion'
        """
        if self.format != "auto":
            return self.format
        questions = {self.question_column, self.answer_column}
        # Who names the columns of questions means questions.
        if questions <= {*columns} or questions != {"question", "answer"}:
            return "question_answer"
        if self.messages_column in columns:
            return "messages"
        if {_PROMPT, _COMPLETION} <= {*columns}:
            return "prompt_completion"
        # A file with one of the two columns most likely has the other one under another name, which is then reported.
        if self.text_column in columns and not questions & {*columns}:
            return "text"
        return "question_answer"

    def read(self, rows: Dataset, name: str, argument: str | None = None) -> list[Row]:
        """Read all rows of a set.

        Args:
            rows: The rows, with all their columns.
            name: Name of the set, for messages.
            argument: The argument that the set was given as, for errors.

        Raises:
            DataError: If a column is missing or a row is not what the format says; the message names the row and shows no
                text of it.
        """
        kind = self.recognize(rows.column_names)
        used = self.find_columns(rows.column_names, kind, name)
        if kind in ("messages", "prompt_completion") and "tools" in rows.column_names:
            used.append("tools")
        read = []
        for number, cells in enumerate(zip(*(rows[column] for column in used), strict=True)):
            row = dict(zip(used, cells, strict=True))
            read.append(self.read_row(row, kind, f"row {number} of the {name} set", argument))
        return read

    def find_columns(self, columns: Sequence[str], kind: Format, name: str) -> list[str]:
        """Return the columns that are read of a set.

        Args:
            columns: Those that it has.
            kind: The format, from `recognize`.
            name: Name of the set, for messages.

        Raises:
            DataError: If one is missing.
        """
        used = []
        for setting, column in self._columns_of(kind):
            if column not in columns:
                raise DataError(self._describe_missing_column(columns, name, setting, column), argument=setting)
            used.append(column)
        return used

    def read_row(self, row: Mapping[str, Any], kind: Format, place: str, argument: str | None = None) -> Row:
        """Read one row.

        Args:
            row: Its cells by column.
            kind: The format, from `recognize`.
            place: What messages call the row.
            argument: As for `read`.
        """
        cells = _Cells(row, place, argument)
        if kind == "question_answer":
            return Conversation.from_turn(cells.text(self.question_column), cells.text(self.answer_column))
        if kind == "text":
            context = "" if self.context_column is None else cells.text(self.context_column)
            return Document(cells.text(self.text_column), context)
        cells.refuse_tools()
        if kind == "messages":
            return self._converse((), cells.messages(self.messages_column), cells)
        prompt, completion = cells.side(_PROMPT, "user"), cells.side(_COMPLETION, "assistant")
        conversation = self._converse(prompt, completion, cells)
        # As in trl: two texts are one raw text, two lists of messages have the chat template.
        is_raw = isinstance(row[_PROMPT], str) and isinstance(row[_COMPLETION], str)
        return replace(conversation, is_raw=is_raw)

    def _converse(self, prompt: Sequence[Message], messages: Sequence[Message], cells: _Cells) -> Conversation:
        """Return a conversation of which the assistant's turns after the prompt are supervised."""
        together = (*prompt, *messages)
        turns = []
        for index in range(len(prompt), len(together)):
            if together[index].role == "assistant":
                turns.append(index)
        if not turns:
            raise cells.error(
                "has no message of the assistant's, so there is nothing to learn or to forget: remove the row"
            )
        if self.supervise == "last":
            turns = turns[-1:]
        # An empty turn, as of a call that went elsewhere, has nothing to supervise; a row of nothing else is refused later.
        with_text = [index for index in turns if together[index].content.strip()] or turns[-1:]
        return Conversation(together[: with_text[-1] + 1], tuple(with_text))

    def _columns_of(self, kind: Format) -> list[tuple[str, str]]:
        """Return the columns that a format needs, each after the argument that it depends on."""
        if kind == "messages":
            return [("messages_column", self.messages_column)]
        if kind == "prompt_completion":
            return [("format", _PROMPT), ("format", _COMPLETION)]
        if kind == "text":
            context = [] if self.context_column is None else [("context_column", self.context_column)]
            return [("text_column", self.text_column), *context]
        return [("question_column", self.question_column), ("answer_column", self.answer_column)]

    def _describe_missing_column(self, columns: Sequence[str], name: str, setting: str, column: str) -> str:
        message = f"the {name} set has no column '{column}'; its columns are {[*columns]}. "
        if self.format == "auto" and "conversations" in columns:
            return f"{message}'conversations' may be a chat: then set `messages_column` to it."
        if setting == "format":
            return f"{message}Rows of this `format` have '{_PROMPT}' and '{_COMPLETION}'."
        known = "'messages', 'prompt' with 'completion', or 'text'"
        return f"{message}Set `{setting}`" + (f", or give rows with {known}." if self.format == "auto" else ".")


@dataclass(frozen=True)
class _Cells:
    """The cells of one row, each read as what it must be."""

    row: Mapping[str, Any]
    place: str
    argument: str | None

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.place} {problem}.", argument=self.argument)

    def text(self, column: str) -> str:
        value = self.row.get(column)
        if not isinstance(value, str):
            raise self.error(
                f"has {describe_kind(value)} in '{column}', where a text must be: correct the row, or remove it"
            )
        return value

    def side(self, column: str, role: str) -> list[Message]:
        """Return a prompt or a completion, which is a text or a list of messages."""
        if isinstance(self.row.get(column), str):
            return [Message(role, self.text(column))]
        return self.messages(column)

    def messages(self, column: str) -> list[Message]:
        value = self.row.get(column)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            kind = "an empty list" if value == [] else describe_kind(value)
            raise self.error(
                f"has {kind} in '{column}', where a list of messages must be, each with 'role' and 'content'"
            )
        messages = []
        for position, entry in enumerate(value):
            if not isinstance(entry, Mapping):
                raise self.error(
                    f"has {describe_kind(entry)} as message {position} of '{column}', where an object must be"
                )
            messages.append(self._message(entry, position, column))
        return messages

    def _message(self, entry: Mapping[str, Any], position: int, column: str) -> Message:
        if entry.get("role") is None and entry.get("from") is not None:
            raise self.error(
                f"has 'from' and 'value' in the messages of '{column}', where 'role' and 'content' must be: convert the file, for "
                f"example with `jq -c '.{column} |= {_SHAREGPT}' OLD > NEW`"
            )
        if entry.get("role") not in ROLES:
            raise self.error(
                f"has no known role in message {position} of '{column}': it must be one of {', '.join(ROLES)}"
            )
        for key, what in _UNREAD.items():
            if entry.get(key):
                raise self.error(
                    f"has {what} in message {position} of '{column}' ('{key}'), which are not read: write them into its 'content', "
                    "as the model is to say them"
                )
        return Message(str(entry["role"]), self._content(entry.get("content"), position, column))

    def _content(self, content: Any, position: int, column: str) -> str:
        if isinstance(content, str):
            return content
        # A list of parts, as models of several modalities have it.
        parts = content if isinstance(content, list) and content else [None]
        texts = []
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                kind = "parts that are no text" if isinstance(content, list) else describe_kind(content)
                raise self.error(
                    f"has {kind} in the 'content' of message {position} of '{column}', where a text must be"
                )
            texts.append(text)
        return "".join(texts)

    def refuse_tools(self) -> None:
        if self.row.get("tools"):
            raise self.error(
                "has descriptions of tools in 'tools', which are not read: write them into the system message, or remove the column"
            )
