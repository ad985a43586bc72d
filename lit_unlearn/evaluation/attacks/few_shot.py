"""An attack that shows the model other forgotten examples in the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lit_unlearn.data.formats import Conversation
from lit_unlearn.data.templates import check_template
from lit_unlearn.errors import ConfigError, arguments_of
from lit_unlearn.evaluation.attacks.turns import join_turns, put_turns_first
from lit_unlearn.utils.validation import check_at_least


@dataclass(frozen=True)
class FewShot:
    """An attack that puts other forget questions, with their right answers, before each forget question.

    It shows whether some of the forgotten answers, in the prompt, bring back the others: relearning without a step.

    Args:
        shots: Number of other examples in each prompt.
        template: ``None`` for turns of the chat template. For a model without one, the text with ``{question}`` and
            ``{answer}`` that the benchmark has: the examples then stand as text before the question.
        seed: Draws the examples.

    Raises:
        ConfigError: If ``shots`` is below 1, or ``template`` has no place for question and answer.
    """

    shots: int = 4
    template: str | None = None
    seed: int = 0

    name: ClassVar[str] = "few_shot"
    unit: ClassVar[str] = "shots"
    needs_answers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_at_least(1, self, shots=self.shots)
        with arguments_of(self):
            object.__setattr__(self, "template", check_template(self.template))

    @property
    def effort(self) -> int:
        """Number of examples."""
        return self.shots

    def change_questions(
        self, conversations: Sequence[Conversation], answers: Sequence[str] = ()
    ) -> list[Conversation]:
        """Put other examples before every question.

        Args:
            conversations: The forget set.
            answers: Not used.

        Returns:
            As many conversations, in the same order, with the same last turns.

        Raises:
            ConfigError: If there are too few others. Those with the same question or the same answer do not count: they would
                give the answer away.
        """
        changed = []
        for number, conversation in enumerate(conversations):
            others = []
            for candidate in conversations:
                is_same = candidate.question == conversation.question
                if not is_same and candidate.answer.strip() != conversation.answer.strip():
                    others.append((candidate.question, candidate.answer))
            if len(others) < self.shots:
                raise ConfigError(
                    f"`shots` is {self.shots}, but row {number} of the forget set has {len(others)} rows beside it with another "
                    "question and another answer: lower `shots`.",
                    owner=self,
                    argument="shots",
                )
            # A generator for each row, so that its draws do not depend on those of the rows before it.
            drawn = random.Random(f"{self.seed}/{number}").sample(others, self.shots)
            shown = put_turns_first(conversation, drawn)
            with arguments_of(self):
                changed.append(shown if self.template is None else join_turns(shown, self.template))
        return changed
