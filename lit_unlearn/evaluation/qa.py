"""Suites of questions and answers, and the one for a user's own forget and retain files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch

from lit_unlearn.data.encoding import Example, check_tokenizer, encode_examples, prompt_of
from lit_unlearn.data.source import Source
from lit_unlearn.data.templates import check_template
from lit_unlearn.errors import arguments_of
from lit_unlearn.evaluation.benchmark import Benchmark, BenchmarkExample, BenchmarkStream, Values
from lit_unlearn.evaluation.results import Results
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.metrics import (
    auc,
    exact_memorization,
    extraction_strength,
    forget_quality,
    min_k,
    min_k_plus_plus,
    normalized_probability,
    privleak,
    rouge,
    truth_ratio,
    truth_ratio_score,
    zlib_score,
)
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.loading import check_model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["geometric", "arithmetic"]
ATTACKS = ("min_k", "min_k_plus_plus", "loss", "zlib")


class Questions(NamedTuple):
    """A set of questions.

    Args:
        source: Where its rows are.
        right: Column whose text is compared with the wrong answers, for the truth ratio.
        choose: Whether the probability is that among the given options, p / (p + Σ p_wrong).
        generates: Whether the questions are answered, for ROUGE.
    """

    source: Source
    right: str = "paraphrased_answer"
    choose: bool = False
    generates: bool = True


class QuestionBenchmark(Benchmark):
    """Questions with right and, perhaps, wrong answers.

    Args:
        token_budget: As for `Benchmark`.
        retain_results: As for `Benchmark`.
        question_column: Column with the question.
        answer_column: Column with the answer.
        wrong_column: Column with a list of wrong answers; a set without it has no truth ratio.
        template: As for `ForgetRetain`.
        max_length: As for `ForgetRetain`.
        max_new_tokens: Longest generated answer.
        ratio: Mean of the wrong answers in the truth ratio: ``"geometric"``, as published code computes it, or
            ``"arithmetic"``, as the paper writes it.
        k: Fraction of the least likely tokens in the Min-K attacks.
        fluency_model: Hub name or directory of a model under whose NLL the generated forget answers are judged (low:
            fluent); ``None`` leaves that out. The target model is a natural choice.
    """

    decisive: ClassVar[tuple[str, ...]] = ("ratio", "k")

    def __init__(
        self,
        token_budget: int = 8192,
        retain_results: str | None = None,
        question_column: str = "question",
        answer_column: str = "answer",
        wrong_column: str = "perturbed_answer",
        template: str | None = None,
        max_length: int = 512,
        max_new_tokens: int = 200,
        ratio: Form = "geometric",
        k: float = 0.4,
        fluency_model: str | None = None,
    ) -> None:
        super().__init__(token_budget, retain_results)
        with arguments_of(self):
            check_template(template)
        if not 0 < k <= 1 or max_new_tokens < 1 or ratio not in get_args(Form):
            raise ValueError(
                f"{type(self).__name__}: `k` must be above 0 and at most 1, `max_new_tokens` at least 1 and `ratio` one of "
                f"{', '.join(get_args(Form))}; got {k!r}, {max_new_tokens!r} and {ratio!r}."
            )
        if fluency_model is not None:
            check_model_directory(fluency_model, use_safetensors=True)
        self.question_column, self.answer_column, self.wrong_column = question_column, answer_column, wrong_column
        self.template, self.max_length, self.max_new_tokens = template, max_length, max_new_tokens
        self.ratio: Form = ratio
        self.k, self.fluency_model = k, fluency_model
        self.sets: dict[str, Questions] = {}
        self.absent: dict[str, str] = {}  # sets that there are not, and why

    def settings(self) -> Values:
        """What decides the values beside model and rows."""
        own = {name: getattr(self, name) for name in ("max_new_tokens", "ratio", "k", "fluency_model")}
        return {**super().settings(), **own}

    # Rows -------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Reads every set.

        Raises:
            ValueError: If a column is missing or a row has no answer.
        """
        check_tokenizer(tokenizer)
        streams = {}
        for name, questions in self.sets.items():
            rows = questions.source.load(name).to_list()
            examples = [self._example(name, questions, row, number, tokenizer) for number, row in enumerate(rows)]
            streams[name] = BenchmarkStream(examples, questions.source.path, self.max_new_tokens)
        return streams

    def _example(
        self, name: str, questions: Questions, row: Values, number: int, tokenizer: PreTrainedTokenizerBase
    ) -> BenchmarkExample:
        wrong = row.get(self.wrong_column)
        right = questions.right if wrong is not None and questions.right != self.answer_column else None
        for column in filter(None, (self.question_column, self.answer_column, right)):
            if not isinstance(row.get(column), str):
                raise ValueError(
                    f"row {number} of the {name} set has no text in '{column}': expected a string, got {row.get(column)!r}; its "
                    f"columns are {sorted(row)}. Set `question_column`, `answer_column` and `wrong_column` of the suite."
                )
        question = row[self.question_column]

        def encoded(answers: Sequence[str]) -> list[Example]:
            pairs = [(question, answer) for answer in answers]
            settings: Any = {"template": self.template, "max_length": self.max_length}
            return encode_examples(pairs, tokenizer, name=name, number=number, **settings)

        texts = {"question": question, "answer": row[self.answer_column]}
        kinds = {"answer": encoded([texts["answer"]])}
        if right is not None:
            kinds["right"] = encoded([row[right]])
        if wrong is not None:
            kinds["wrong"] = encoded([wrong] if isinstance(wrong, str) else wrong)
        return BenchmarkExample(texts, kinds, prompt_of(kinds["answer"][0]) if questions.generates else None)

    # Values of a row --------------------------------------------------------------------------------------------------

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], said: str | None
    ) -> Values:
        """Likelihoods, memorisation, attacks and ROUGE of one question."""
        (answer,) = scored["answer"]
        ends = not example.rows["answer"][
            0
        ].is_cut  # then the last token is the end of the answer, which is no part of it
        recalled = slice(None, -1 if ends and len(answer.labels) > 1 else None)
        predictions, labels = answer.predictions[recalled], answer.labels[recalled]
        values: Values = {
            **example.texts,
            "nll": answer.nll,
            "probability": float(np.exp(-answer.nll)),
            "exact_memorization": exact_memorization(predictions, labels),
            "extraction_strength": extraction_strength(predictions, labels),
            "loss": answer.nll,
            "min_k": min_k(answer.logp, self.k),
            "min_k_plus_plus": min_k_plus_plus(answer.logp, answer.mean, answer.std, self.k),
            "zlib": zlib_score(float(-answer.logp.sum()), example.texts["answer"]),
        }
        if "wrong" in scored:
            right, wrong = (scored.get("right") or scored["answer"])[0].nll, [one.nll for one in scored["wrong"]]
            values["truth_ratio"] = float(truth_ratio([right], [wrong], self.ratio)[0])
            if self.sets[stream].choose:
                values["probability"] = float(normalized_probability([answer.nll], [wrong])[0])
        if said is not None:
            values |= {"generated": said, **rouge(said, example.texts["answer"])}
        return values

    # Values of the benchmark ------------------------------------------------------------------------------------------

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Values:
        """Means of every set, forget quality, and the attacks where there is a holdout set."""
        values: Values = {}
        for name, rows in examples.items():
            for key in (
                "probability",
                "rougeL_recall",
                "rougeL_f1",
                "nll",
                "exact_memorization",
                "extraction_strength",
            ):
                if all(key in row for row in rows):
                    values[f"{name}/{key}"] = float(np.mean([row[key] for row in rows]))
            if all("truth_ratio" in row for row in rows):
                kind: Literal["forget", "utility"] = "forget" if name == "forget" else "utility"
                values[f"{name}/truth_ratio"] = truth_ratio_score(_column(rows, "truth_ratio"), kind)
        if "holdout" in examples:
            values |= {f"auc/{name}": _attack(examples, name) for name in ATTACKS}
        without = f"the forget rows have no '{self.wrong_column}'"
        return {**values, "forget_quality": without, **against_retain(examples, retain)}

    def run(self, lm: LanguageModel, partial: Path | None = None) -> Results:
        """As the base class does; then judges the generated forget answers by another model, where one is given."""
        results = super().run(lm, partial)
        if self.fluency_model is not None:
            losses = self._fluency(results["examples"]["forget"], lm)
            for row, loss in zip(results["examples"]["forget"], losses, strict=True):
                row["fluency_nll"] = loss
            said = [loss for loss in losses if loss is not None]
            results["aggregate"]["forget/fluency_nll"] = float(np.mean(said)) if said else None
            results["aggregate"]["forget/empty"] = 1 - len(said) / len(losses)
        return results

    def _fluency(self, rows: Sequence[Values], lm: LanguageModel) -> list[float | None]:
        """NLL per token of what was said, given the question; ``None`` where nothing was."""
        judge = LanguageModel(self.fluency_model)
        judge.load(torch.float32)
        judge.to(next(lm.parameters()).device)
        said = [(i, (row["question"], row["generated"])) for i, row in enumerate(rows) if row["generated"].strip()]
        pairs = [pair for _, pair in said]
        if judge.tokenizer is None:
            raise ValueError(f"the fluency model '{self.fluency_model}' has no tokenizer.")
        encoded = encode_examples(
            pairs, judge.tokenizer, name="generated", template=self.template, max_length=self.max_length
        )
        losses = {
            i: score.nll for (i, _), score in zip(said, score_examples(judge, encoded, self.token_budget), strict=True)
        }
        return [losses.get(i) for i in range(len(rows))]


class QABenchmark(QuestionBenchmark):
    """Your own files of questions and answers, measured like TOFU's.

    Args:
        forget: Rows that were to be forgotten: a file or hub name, or a `Source`.
        retain: Rows that were to be kept, likewise.
        holdout: Rows like the forget rows that the model has never seen, likewise, for attacks and PrivLeak; ``None``
            leaves those out.
        **settings: As for `QuestionBenchmark`.
    """

    name: ClassVar[str] = "qa"

    def __init__(
        self, forget: str | Source, retain: str | Source, holdout: str | Source | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        for name, source in {"forget": forget, "retain": retain, "holdout": holdout}.items():
            if source is not None:
                where = Source(source) if isinstance(source, str) else source
                self.sets[name] = Questions(where, right=self.answer_column, generates=name != "holdout")


def against_retain(examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Values:
    """What only a comparison with the retain-only model tells: forget quality and, with a holdout set, PrivLeak.

    Args:
        examples: The values of every row, by stream, of the same rows as the retain-only model's.
        retain: Results of the retain-only model; ``None`` if there are none.

    Returns:
        ``forget_quality``, if the forget rows have truth ratios, and ``privleak``, if forget and holdout rows have Min-K:
        a number, or the reason why it is missing.
    """
    values: Values = {}
    if _all_have("truth_ratio", examples, "forget"):
        values["forget_quality"] = "no `retain_results` were given"
        if retain is not None:
            mine, theirs = (_column(one["forget"], "truth_ratio") for one in (examples, retain["examples"]))
            values["forget_quality"] = forget_quality(mine, theirs)
    if _all_have("min_k", examples, "forget", "holdout"):
        values["privleak"] = "no `retain_results` with a holdout set were given"
        if retain is not None and "holdout" in retain["examples"]:
            areas = [1 - _attack(one, "min_k") for one in (examples, retain["examples"])]
            values["privleak"] = (
                privleak(*areas) if areas[1] else "it divides by 1 − AUC of the retain-only model, 0 here"
            )
    return values


def _all_have(key: str, examples: Mapping[str, Sequence[Values]], *streams: str) -> bool:
    return all(key in row for stream in streams for row in examples.get(stream, [{}]))


def _column(rows: Sequence[Values], key: str) -> list[float]:
    return [row[key] for row in rows]


def _attack(examples: Mapping[str, Sequence[Values]], name: str) -> float:
    """Area under the curve of an attack that takes forget rows for members."""
    sign = -1 if name in ("loss", "zlib") else 1  # which are low for members
    forget, holdout = ([sign * row[name] for row in examples[stream]] for stream in ("forget", "holdout"))
    return auc(forget, holdout)
