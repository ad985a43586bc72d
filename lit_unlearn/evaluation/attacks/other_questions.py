"""An attack that asks in other words or in another language, from a column of the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lit_unlearn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lit_unlearn.evaluation.benchmark import Benchmark

PARAPHRASED_COLUMN = "paraphrased_question"


@dataclass(frozen=True)
class OtherQuestions:
    """An attack that takes the questions from another column: paraphrases, or translations.

    Args:
        question_column: Column with the questions that are asked instead.
        answer_column: Column with the answers to them; ``None`` for the answers as they are.
    """

    question_column: str = PARAPHRASED_COLUMN
    answer_column: str | None = None

    name: ClassVar[str] = "other_questions"
    unit: ClassVar[str] = "question"
    effort: ClassVar[int] = 1

    def change_benchmark(self, benchmark: Benchmark) -> Benchmark:
        """Return the benchmark with these questions, on the sets that have them.

        Raises:
            ConfigError: If the forget set does not have them.
        """
        try:
            return benchmark.with_questions(self.question_column, self.answer_column)
        except DataError as error:
            raise ConfigError(str(error), owner=self, argument="question_column") from error
