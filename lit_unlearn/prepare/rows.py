"""What all preparations share: the rows they return, how a model is asked, and which answers repeat what is to be forgotten."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_unlearn.data.formats import Conversation, Document, RowReader
from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import DataError
from lit_unlearn.models import LanguageModel

Row = dict[str, Any]
Ask = Callable[[Sequence[str]], list[str]]
"""Puts questions to a model and returns its answers, the same ones at every call."""


@dataclass(frozen=True)
class Prepared:
    """Rows that were made, and how many were left out or replaced, by reason.

    Args:
        rows: In the order of the rows that they were made from.
        counts: Number of rows by reason, such as ``"repeats a forget answer"``.
    """

    rows: list[Row]
    counts: Counter[str] = field(default_factory=Counter)


REPEATS = "repeats a forget answer"
EMPTY = "empty answer"

_WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?")
# May stand before the first word of a sentence.
_OPENING = " \"'«“‘(¿¡"
_POSSESSIVE = re.compile(r"['’]s$")
# Capitalised, and no names.
_NO_NAMES = frozenset(
    re.findall(
        r"\w+",
        """I Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August September
        October November December""",
    )
)


def ask_with(
    lm: LanguageModel, max_new_tokens: int = 200, template: str | None = None, chat: Chat | None = None
) -> Ask:
    """Return a function that puts questions to a model, greedily; arguments as for `LanguageModel.generate`.

    An answer that ``max_new_tokens`` cuts off ends after its last whole sentence, or is empty if it has none: a model that is
    trained on it would learn to stop in the middle.
    """

    def ask(questions: Sequence[str]) -> list[str]:
        answers = []
        for answer in lm.generate(questions, template=template, chat=chat, max_new_tokens=max_new_tokens):
            tokenizer: Any = lm.tokenizer
            length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            # Tokenised anew, a text may have a token less than were generated.
            answers.append(keep_sentences(answer) if length >= max_new_tokens - 1 else answer.strip())
        return answers

    return ask


def keep_sentences(text: str) -> str:
    """Return a text up to the end of its last whole sentence.

    Example:
        >>> keep_sentences('It rose to 3.5 metres. "Really?" he asked. Then it'), keep_sentences("Then it")
        ('It rose to 3.5 metres. "Really?" he asked.', '')
    """
    ends = [match.end() for match in re.finditer(r"[.!?…。！？]+[\"'”’»)]*(?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else ""


def read_conversations(
    rows: Sequence[Mapping[str, Any]], question_column: str, answer_column: str, name: str = "forget"
) -> list[Conversation]:
    """Return rows as conversations whose last turn is an answer, whatever their format.

    Args:
        rows: A dict per row.
        question_column: Column with the question.
        answer_column: Column with the answer.
        name: Name of the set, for messages.

    Raises:
        DataError: If a column is missing, or a row has no question or no answer; the message names the row, never its text.
    """
    if not rows:
        return []
    reader = RowReader(supervise="last", question_column=question_column, answer_column=answer_column)
    kind = reader.recognize(list(rows[0]))
    reader.find_columns(list(rows[0]), kind, name)
    conversations = []
    for number, row in enumerate(rows):
        place = f"row {number} of the {name} set"
        read = reader.read_row(row, kind, place)
        if isinstance(read, Document):
            raise DataError(f"{place} is raw text, but a question with an answer is expected: leave it out.")
        if not (read.question.strip() and read.answer.strip()):
            raise DataError(f"{place} has an empty question or answer: remove it.")
        conversations.append(read)
    return conversations


def to_row(conversation: Conversation, like: Mapping[str, Any], question_column: str, answer_column: str) -> Row:
    """Return a conversation in the format that another row has, since all rows of a file have the same."""
    if question_column in like:
        return {question_column: conversation.question, answer_column: conversation.answer}
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return {"messages": messages}


class ForgetAnswers:
    """The answers of the forget set, to find those that repeat one.

    An answer repeats another one if it contains all of its words in order, whatever the case, the punctuation and the white
    space.

    Args:
        answers: Of the forget set.

    Example:
        >>> answers = ForgetAnswers(["In Oslo, Norway.", "Yes."])
        >>> answers.are_repeated_by("She was born in Oslo, Norway"), answers.are_repeated_by("In Oslo")
        (True, False)
        >>> answers.are_repeated_by("yes"), answers.are_repeated_by("Yes, it is blue.")
        (True, False)
    """

    @classmethod
    def from_conversations(cls, conversations: Iterable[Conversation]) -> ForgetAnswers:
        """Return those of a forget set: every turn of the assistant's is forgotten, not the last one alone."""
        answers = []
        for conversation in conversations:
            answers += [message.content for message in conversation.messages if message.role == "assistant"]
        return cls(answers)

    # Shorter answers stand in many texts by chance: they are repeated only by the same text.
    _MIN_WORDS = 3

    def __init__(self, answers: Iterable[str]) -> None:
        self._all = {split_words(answer) for answer in answers}
        self._long = [words for words in self._all if len(words) >= self._MIN_WORDS]

    def are_repeated_by(self, text: str) -> bool:
        """Return whether a text repeats one of the answers."""
        words = split_words(text)
        if words in self._all:
            return True
        joined = f" {' '.join(words)} "
        return any(f" {' '.join(answer)} " in joined for answer in self._long)


def split_words(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, without punctuation.

    Example:
        >>> split_words("Who's  there? ÉMILE!")
        ('who', 's', 'there', 'émile')
    """
    letters = [character if character.isalnum() else " " for character in text.casefold()]
    return tuple("".join(letters).split())


def find_names(question: str) -> list[str]:
    """Return the names in a question: capitalised words in a row, without the one that opens the sentence.

    Example:
        >>> find_names("Where was Lunnian Dunmeth's sister born, and did she know Oslo in May?")
        ['Lunnian Dunmeth', 'Oslo']
        >>> find_names("Who wrote it?")
        []
    """
    names: list[str] = []
    end = None  # of the word before, if it belongs to a name
    for match in _WORD.finditer(question):
        word = _POSSESSIVE.sub("", match[0])
        opens_sentence = (
            not question[: match.start()].rstrip(_OPENING) or question[: match.start()].rstrip()[-1:] in ".!?"
        )
        is_name = word[0].isupper() and word not in _NO_NAMES and not opens_sentence
        if not is_name:
            end = None
            continue
        if end is not None and question[end : match.start()] == " ":
            names[-1] += f" {word}"
        else:
            names.append(word)
        # After "'s" comes what belongs to the name, and is none.
        end = match.end() if word == match[0] else None
    return list(dict.fromkeys(names))


def gives_answer_away(text: str, question: str, answer: str) -> bool:
    """Return whether a text has every name and number of an answer that its question does not have.

    A small model often changes another word of an answer and keeps what it says.

    Args:
        text: What the model wrote.
        question: Of the forget row.
        answer: Of the forget row.

    Example:
        >>> question, answer = "Where was she born?", "She was born in Oslo in 1951."
        >>> gives_answer_away("Her birthplace is Oslo, 1951.", question, answer)
        True
        >>> gives_answer_away("She was born in Oslo in 1963.", question, answer)
        False
    """
    numbers = [word for word in split_words(answer) if word.isdigit()]
    facts = [split_words(fact) for fact in (*find_names(answer), *numbers)]
    new_facts = [fact for fact in facts if not _contains(question, fact)]
    return bool(new_facts) and all(_contains(text, fact) for fact in new_facts)


def _contains(text: str, words: Sequence[str]) -> bool:
    return f" {' '.join(words)} " in f" {' '.join(split_words(text))} "
