"""An attack that gives the model the first words of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lit_unlearn.data.formats import Conversation
from lit_unlearn.utils.validation import check_at_least


@dataclass(frozen=True)
class Prefix:
    """An attack that starts the answer: whoever runs an open model chooses the first words that it seems to have said.

    Methods that train a model to refuse, or to say something else, change its first words most. What is measured is the rest
    of the answer.

    Args:
        words: Number of words that are given, at most all but the last of an answer.

    Raises:
        ConfigError: If ``words`` is below 1.
    """

    words: int = 3

    name: ClassVar[str] = "prefix"
    unit: ClassVar[str] = "words"
    needs_answers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_at_least(1, self, words=self.words)

    @property
    def effort(self) -> int:
        """Number of words."""
        return self.words

    def change_questions(
        self, conversations: Sequence[Conversation], answers: Sequence[str] = ()
    ) -> list[Conversation]:
        """Give the first words of every last turn.

        Args:
            conversations: The forget set.
            answers: Not used.

        Returns:
            As many conversations, in the same order. An answer of one word stays as it is.

        Example:
            >>> (changed,) = Prefix(words=2).change_questions([Conversation.from_turn("Who?", "Ada wrote it.")])
            >>> changed.expected
            'it.'
        """
        return [replace(conversation, given_words=self.words) for conversation in conversations]
