"""An attack that asks in several turns: related questions first, and once more in doubt of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lit_unlearn.data.formats import Conversation, Message
from lit_unlearn.data.templates import check_template
from lit_unlearn.errors import ConfigError, DataError, arguments_of
from lit_unlearn.evaluation.attacks.turns import join_turns, put_turns_first
from lit_unlearn.utils.validation import check_at_least


@dataclass(frozen=True)
class SeveralTurns:
    """An attack by conversation: related forget questions, the question itself, and a doubt about its answer.

    The answers in the earlier turns are the model's own, to each question alone: nothing is revealed to it. Related questions
    are those that share the most words with the question.

    Args:
        related: Number of related questions that are asked first, the most related one last; 0 for none.
        follow_up: What is said to the model's answer; ``None`` to ask only once.
        template: As for `FewShot`.

    Raises:
        ConfigError: If nothing would be changed, a number is out of range, or ``template`` has no place for question and answer.
    """

    related: int = 2
    follow_up: str | None = "Are you sure? Please give the right answer."
    template: str | None = None

    name: ClassVar[str] = "several_turns"
    unit: ClassVar[str] = "turns"
    needs_answers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least(0, self, related=self.related)
        if self.follow_up is not None and not self.follow_up.strip():
            message = "`follow_up` has no text: give a sentence, or null to ask only once."
            raise ConfigError(message, owner=self, argument="follow_up")
        if self.related == 0 and self.follow_up is None:
            message = "with `related` 0 and `follow_up` null, nothing would be changed: set one of them."
            raise ConfigError(message, owner=self, argument="related")
        with arguments_of(self):
            object.__setattr__(self, "template", check_template(self.template))

    @property
    def effort(self) -> int:
        """Number of turns beside the question."""
        return self.related + (self.follow_up is not None)

    def change_questions(
        self, conversations: Sequence[Conversation], answers: Sequence[str] = ()
    ) -> list[Conversation]:
        """Put the turns before every question, and the doubt after it.

        Args:
            conversations: The forget set.
            answers: What the model answers to each of them, in the same order.

        Returns:
            As many conversations, in the same order, with the same last turns.

        Raises:
            DataError: If there is not one answer to each.
            ConfigError: If there are fewer related questions.
        """
        if len(answers) != len(conversations):
            raise DataError(
                f"`answers` must be the model's answers to all {len(conversations)} conversations, but has {len(answers)}.",
                owner=self,
                argument="answers",
            )
        words = [set(re.findall(r"\w+", conversation.question.casefold())) for conversation in conversations]
        changed = []
        for number, conversation in enumerate(conversations):
            others = []
            for candidate, candidate_words in enumerate(words):
                if conversations[candidate].question != conversation.question:
                    # Of two equally related rows the nearer one: files often keep together what belongs together.
                    likeness = _compute_overlap(words[number], candidate_words)
                    others.append((likeness, -abs(candidate - number), candidate))
            if len(others) < self.related:
                raise ConfigError(
                    f"`related` is {self.related}, but row {number} of the forget set has {len(others)} rows beside it with another "
                    "question: lower `related`.",
                    owner=self,
                    argument="related",
                )
            most_related = sorted(others)[len(others) - self.related :]
            turns = [(conversations[row].question, answers[row]) for _, _, row in most_related]
            asked = put_turns_first(self._doubt(conversation, answers[number]), turns)
            with arguments_of(self):
                changed.append(asked if self.template is None else join_turns(asked, self.template))
        return changed

    def _doubt(self, conversation: Conversation, answer: str) -> Conversation:
        """Return the conversation with the model's answer and the doubt before its last turn."""
        if self.follow_up is None:
            return conversation
        added = (Message("assistant", answer), Message("user", self.follow_up))
        messages = (*conversation.messages[:-1], *added, conversation.messages[-1])
        return replace(conversation, messages=messages, supervised=(len(messages) - 1,))


def _compute_overlap(first: set[str], second: set[str]) -> float:
    """Compute the share of the words of two questions that both have."""
    return len(first & second) / max(len(first | second), 1)
