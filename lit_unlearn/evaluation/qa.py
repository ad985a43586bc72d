"""The benchmark for a user's own files of questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lit_unlearn.data.source import Rows, to_source
from lit_unlearn.errors import arguments_of
from lit_unlearn.evaluation.benchmark import Aggregate
from lit_unlearn.evaluation.question_scores import aggregate_questions
from lit_unlearn.evaluation.question_sets import QuestionSet, QuestionSets
from lit_unlearn.evaluation.questions import QuestionBenchmark
from lit_unlearn.evaluation.results import Results, Values, get_column
from lit_unlearn.metrics import exposure


class QABenchmark(QuestionBenchmark):
    """Measures your own rows, of any format, in the way of TOFU.

    Args:
        forget: Rows to be forgotten: a file, a hub name, a `Source`, a ``datasets.Dataset`` or a list of dicts.
        retain: Rows to be kept, likewise.
        holdout: Rows like the forget rows that the model has never seen, likewise, for attacks and PrivLeak; ``None``
            leaves those out.
        general: Rows that have nothing to do with the forget set, likewise, which are scored and not answered; ``None``
            leaves them out.
        canaries: Random sequences that were planted in the training data, likewise, see ``draw_canaries``; with
            ``canary_references``, for the value ``canary_exposure``. ``None`` leaves it out.
        canary_references: Sequences that were drawn in the same way and not planted, likewise.
        token_budget: As for `Benchmark`.
        retain_results: As for `Benchmark`.
        **settings: As for `QuestionSets`: columns, lengths, ``ratio``, ``k``, ``floor``, ``fluency_model`` and further attacks.

    Example:
        >>> benchmark = QABenchmark("forget.jsonl", "retain.jsonl", max_new_tokens=50)  # doctest: +SKIP
        >>> benchmark.run(lm).aggregate["forget/probability"]  # doctest: +SKIP
        0.93
    """

    name: ClassVar[str] = "qa"

    def __init__(
        self,
        forget: Rows,
        retain: Rows,
        holdout: Rows | None = None,
        token_budget: int = 8192,
        retain_results: str | Path | Results | dict[str, Any] | None = None,
        general: Rows | None = None,
        canaries: Rows | None = None,
        canary_references: Rows | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(token_budget, retain_results)
        self.questions = QuestionSets(self, **settings)
        sets = {"forget": forget, "retain": retain, "holdout": holdout, "general": general}
        sets |= {"canaries": canaries, "canary_references": canary_references}
        for name, source in sets.items():
            if source is not None:
                with arguments_of(self):
                    rows = to_source(source, name)
                self.questions.sets[name] = QuestionSet(
                    rows,
                    truth_column=self.questions.answer_column,
                    generates=name in ("forget", "retain"),
                )

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the means of every set, forget quality, the attacks and the canaries' exposure."""
        aggregate = aggregate_questions(self.questions, examples, retain)
        if {"canaries", "canary_references"} <= examples.keys():
            planted, others = (get_column(examples[name], "nll") for name in ("canaries", "canary_references"))
            aggregate.values["canary_exposure"] = float(np.mean([exposure(nll, others) for nll in planted]))
        return aggregate
