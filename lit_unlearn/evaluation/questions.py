"""The benchmark that only asks questions, from which those of TOFU and of a user's own files derive."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lit_unlearn.data.chat_template import find_prompt_difference
from lit_unlearn.data.example import Example
from lit_unlearn.errors import DataError, arguments_of
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.question_rows import load_streams, read_file
from lit_unlearn.evaluation.question_sets import QuestionAttack, QuestionSets
from lit_unlearn.evaluation.question_values import add_attacks, add_fluency, measure_question
from lit_unlearn.evaluation.results import Results, Values
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.models import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QuestionBenchmark(Benchmark):
    """A benchmark that only asks questions: everything but the choice of sets, and of the values over them, is theirs."""

    compared_settings: ClassVar[tuple[str, ...]] = ("ratio", "k")
    questions: QuestionSets

    def settings(self) -> Values:
        """Return the settings that decide values, beside model and rows."""
        return {**super().settings(), **self.questions.settings()}

    def _check_retain_results(self, streams: Mapping[str, BenchmarkStream], retain: Results) -> None:
        try:
            super()._check_retain_results(streams, retain)
        except DataError as error:
            # Other tokens most often come from another prompt, of which a digest tells nothing.
            difference = find_prompt_difference(retain.settings.get("prompt"), self.questions.prompt)
            masks = bool(retain.settings.get("mask_padding_ids")), self.questions.encoding.mask_padding_ids
            if difference is None and masks[0] != masks[1]:
                difference = f"`mask_padding_ids` differs, {masks[0]} then and {masks[1]} now"
            if difference is not None:
                error.args = (f"{error} The reason is that {difference}.",)
            raise

    def with_questions(self, column: str, answer_column: str | None = None) -> QuestionBenchmark:
        """Return this benchmark with questions, and perhaps answers, from other columns."""
        # What was read has the questions of the other column.
        return self._with(self.questions.with_columns(column, answer_column))

    def with_sets(self, *names: str) -> QuestionBenchmark:
        """Return this benchmark with some of its sets only; names of sets that it does not have are passed over."""
        return self._with(self.questions.with_sets(names))

    def _with(self, questions: QuestionSets) -> QuestionBenchmark:
        """Return this benchmark with other sets, which are not read yet."""
        changed = copy.copy(self)
        changed.questions = questions
        changed._streams = None
        return changed

    def with_attack(self, attack: QuestionAttack, answers: Sequence[str] = ()) -> QuestionBenchmark:
        """Return this benchmark with the forget questions that an attack asks.

        Results of the retain-only model must be of the same questions: give them by `with_retain_results`.

        Args:
            attack: By the prompt, such as `FewShot`.
            answers: What the model answers to each forget question, if the attack needs that.
        """
        return self._with(self.questions.with_attack(attack, answers))

    def read_sequences(self, source: str, tokenizer: PreTrainedTokenizerBase | None) -> list[list[Example]]:
        """Return what a model can be fine-tuned on, of a set or of a file of questions or texts."""
        if source in self.questions.sets or tokenizer is None:
            return super().read_sequences(source, tokenizer)
        with arguments_of(self):
            return read_file(self.questions, source, tokenizer)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read and tokenise every set."""
        with arguments_of(self):
            return load_streams(self.questions, tokenizer)

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute likelihoods, memorisation, attacks and ROUGE of one question."""
        return measure_question(self.questions, stream, example, scored, generated)

    def add_values(self, examples: Mapping[str, list[Values]], lm: LanguageModel) -> None:
        """Add the fluency of generated forget answers, and the attacks that need another model or gradients."""
        add_fluency(self.questions, examples["forget"], lm, self.token_budget)
        add_attacks(self.questions, examples, self.prepare(lm.tokenizer), lm, self.token_budget)
