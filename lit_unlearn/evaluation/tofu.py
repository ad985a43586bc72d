"""TOFU's benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.source import Source
from lit_unlearn.data.tofu import RETAIN, tofu_source
from lit_unlearn.errors import arguments_of
from lit_unlearn.evaluation.benchmark import Aggregate
from lit_unlearn.evaluation.question_scores import aggregate_questions
from lit_unlearn.evaluation.question_sets import QuestionSet, QuestionSets
from lit_unlearn.evaluation.questions import QuestionBenchmark
from lit_unlearn.evaluation.results import Results, Values
from lit_unlearn.metrics import model_utility
from lit_unlearn.utils.validation import check_choice

UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_VALUES = ("probability", "rougeL_recall", "truth_ratio")


class TOFUBenchmark(QuestionBenchmark):
    """TOFU as its published code measures it: forget quality, model utility, and the values behind them.

    Sets: ``forget`` and ``retain`` (400 rows), with paraphrased and wrong answers; ``real_authors`` and ``world_facts``, where
    the probability is that among the options. Utility is the harmonic mean of probability, ROUGE-L recall and truth ratio of
    the latter three. Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).

    Args:
        forget_split: ``"forget01"``, ``"forget05"`` or ``"forget10"``.
        source: Hub name, or a local folder with the files (``forget10_perturbed.json``, …). A set other than the forget
            set that a folder lacks is left out, with the values that depend on it.
        max_rows: Number of rows read of every set but ``forget``; ``None`` for all, as published.
        holdout: Rows that the model has never seen, for attacks and PrivLeak; ``None`` leaves those out.
        token_budget: As for `Benchmark`.
        retain_results: As for `Benchmark`.
        **settings: As for `QuestionSets`: columns, lengths, ``ratio``, ``k``, ``floor``, ``fluency_model`` and further attacks.

    Raises:
        MissingFileError: If a local folder lacks the forget set.
        ConfigError: If ``forget_split`` is unknown.
    """

    name: ClassVar[str] = "tofu"

    def __init__(
        self,
        forget_split: Literal["forget01", "forget05", "forget10"] = "forget10",
        source: str = "locuslab/TOFU",
        max_rows: int | None = None,
        holdout: Source | None = None,
        token_budget: int = 8192,
        retain_results: str | Path | Results | dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(token_budget, retain_results)
        check_choice(tuple(RETAIN), self, forget_split=forget_split)
        self.questions = QuestionSets(self, **settings)
        with arguments_of(self):
            rows = tofu_source(source, f"{forget_split}_perturbed")
        self.questions.sets["forget"] = QuestionSet(rows, argument="source")
        for name in UTILITY_SETS:
            try:
                rows = tofu_source(source, f"{name}_perturbed", max_rows)
            except FileNotFoundError as error:
                # Small copies of TOFU often hold the forget set alone, which is enough for forget quality.
                rank_zero_warn(f"{error} All values of '{name}' and the model utility are left out.")
            else:
                # Only the sets about fictitious authors have paraphrased answers; the others offer options.
                is_fictitious = name == "retain"
                truth_column = "paraphrased_answer" if is_fictitious else self.questions.answer_column
                self.questions.sets[name] = QuestionSet(
                    rows, truth_column, is_multiple_choice=not is_fictitious, argument="source"
                )
        if holdout is not None:
            self.questions.sets["holdout"] = QuestionSet(holdout, generates=False)

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the means of every set, forget quality, the attacks and the model utility."""
        values, missing = aggregate_questions(self.questions, examples, retain)
        # A mean of fewer than nine values would look like a utility, and compare with none that is published.
        names = list(map("/".join, product(UTILITY_SETS, UTILITY_VALUES)))
        lacking = [name for name in names if name not in values]
        if lacking:
            missing["model_utility"] = f"{', '.join(lacking)} could not be measured"
        else:
            values["model_utility"] = model_utility({name: values[name] for name in names})
        return Aggregate(values, missing)
