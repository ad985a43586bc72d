"""Sets of questions and answers: reading, measuring and averaging them, shared by every benchmark that asks questions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.encoding import Example, check_tokenizer, encode_examples, prompt_of
from lit_unlearn.data.files import describe_kind
from lit_unlearn.data.source import Source
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.data.templates import check_template
from lit_unlearn.errors import ConfigError, DataError, ModelError, arguments_of
from lit_unlearn.evaluation.benchmark import Aggregate, Benchmark, BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.results import Results, Values, get_column
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
from lit_unlearn.utils.io import expand_home
from lit_unlearn.utils.validation import check_at_least, check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ratio = Literal["geometric", "arithmetic"]

# Membership inference attacks, and whether members have the higher value.
ATTACKS = {"min_k": True, "min_k_plus_plus": True, "loss": False, "zlib": False}

AVERAGED = ("probability", "rougeL_recall", "rougeL_f1", "nll", "exact_memorization", "extraction_strength")
"""Values of an example whose mean over a set is a value of the benchmark."""


class QuestionSet(NamedTuple):
    """One set of questions.

    Args:
        source: Where its rows are.
        truth_column: Column with the text that the truth ratio compares with the wrong answers.
        is_multiple_choice: Whether the probability is that among the given options, p / (p + Σ p_wrong).
        generates: Whether the questions are answered, for ROUGE.
    """

    source: Source
    truth_column: str = "paraphrased_answer"
    is_multiple_choice: bool = False
    generates: bool = True


class QuestionSets:
    """Questions with right and, perhaps, wrong answers, in named sets.

    Args:
        owner: The benchmark whose arguments all others are, for messages.
        question_column: Column with the question.
        answer_column: Column with the answer.
        wrong_column: Column with a list of wrong answers; a set without it has no truth ratio.
        template: As for `ForgetRetain`.
        max_length: As for `ForgetRetain`.
        max_new_tokens: Longest generated answer.
        ratio: Mean of the wrong answers in the truth ratio: ``"geometric"``, as published code computes it, or
            ``"arithmetic"``, as the paper writes it.
        k: Fraction of the least likely tokens in the Min-K attacks.
        fluency_model: Hub name or directory of a model whose NLL of the generated forget answers is measured (low:
            fluent); ``None`` leaves that out. The target model is a natural choice.
        allow_special_tokens: As for `ForgetRetain`.

    Raises:
        ConfigError: If a setting is out of range.
    """

    def __init__(
        self,
        owner: Benchmark,
        question_column: str = "question",
        answer_column: str = "answer",
        wrong_column: str = "perturbed_answer",
        template: str | None = None,
        max_length: int = 512,
        max_new_tokens: int = 200,
        ratio: Ratio = "geometric",
        k: float = 0.4,
        fluency_model: str | None = None,
        allow_special_tokens: bool = False,
    ) -> None:
        with arguments_of(owner):
            check_template(template)
        check_at_least(1, owner, max_new_tokens=max_new_tokens)
        check_choice(get_args(Ratio), owner, ratio=ratio)
        if not 0 < k <= 1:
            raise ConfigError(f"`k` must be above 0 and at most 1, not {k!r}.", owner=owner, argument="k")
        if fluency_model is not None:
            fluency_model = expand_home(fluency_model)
            check_model_directory(fluency_model, True, owner=self, argument="fluency_model")

        self.owner = owner
        self.question_column = question_column
        self.answer_column = answer_column
        self.wrong_column = wrong_column
        self.template = template
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens
        self.ratio: Ratio = ratio
        self.k = k
        self.fluency_model = fluency_model
        self.allow_special_tokens = allow_special_tokens
        self.sets: dict[str, QuestionSet] = {}

    def settings(self) -> Values:
        """Return the settings that decide values, beside the rows."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "ratio": self.ratio,
            "k": self.k,
            "fluency_model": self.fluency_model,
        }

    def with_column(self, column: str) -> QuestionSets:
        """Return the sets that have another column with questions, and read them from there.

        Raises:
            DataError: If the forget set has no such column.
        """
        changed = copy.copy(self)
        changed.question_column = column
        changed.sets = {}
        for name, question_set in self.sets.items():
            if column in question_set.source.load(name, argument=name).column_names:
                changed.sets[name] = question_set
        if "forget" not in changed.sets:
            raise DataError(f"the forget set has no column '{column}'.")
        return changed

    # Rows ------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read and tokenise every set.

        Raises:
            DataError: If a column is missing or a row has no answer.
        """
        check_tokenizer(tokenizer)
        streams = {}
        for name, question_set in self.sets.items():
            rows = question_set.source.load(name, argument=name).to_list()
            self._check_wrong_answers(name, rows)
            self._warn_of_special_tokens(name, rows, tokenizer)
            examples = [self._encode_row(name, number, row, tokenizer) for number, row in enumerate(rows)]
            streams[name] = BenchmarkStream(examples, question_set.source.path, self.max_new_tokens)
        return streams

    def _check_wrong_answers(self, name: str, rows: Sequence[Values]) -> None:
        """Refuse a set in which only some rows have wrong answers: a truth ratio over some rows would be that of another set."""
        lacking = [number for number, row in enumerate(rows) if row.get(self.wrong_column) in (None, "", [])]
        if len(lacking) == len(rows):
            for row in rows:
                row.pop(self.wrong_column, None)
            return
        for number, row in enumerate(rows):
            answers = row[self.wrong_column]
            texts = [answers] if isinstance(answers, str) else answers
            if number not in lacking and isinstance(texts, list):
                kinds = [describe_kind(text) for text in texts if not isinstance(text, str) or not text.strip()]
                problem = f"{kinds[0]} in" if kinds else ""
            else:
                problem = "no wrong answer in" if number in lacking else f"{describe_kind(answers)} in"
            if problem:
                raise DataError(
                    f"row {number} of the {name} set has {problem} '{self.wrong_column}': expected a text or a list of texts in every "
                    "row, or in none. Correct the row, or set `wrong_column` to another column.",
                    owner=self.owner,
                    argument="wrong_column",
                )

    def _warn_of_special_tokens(self, name: str, rows: Sequence[Values], tokenizer: PreTrainedTokenizerBase) -> None:
        row_text = RowText(tokenizer, self.allow_special_tokens)
        count = 0
        for row in rows:
            texts = [row.get(column) for column in (self.question_column, self.answer_column)]
            if row_text.count(text for text in texts if isinstance(text, str)):
                count += 1
        if count:
            rank_zero_warn(
                f"{count} of {len(rows)} {name} rows contain special tokens of the tokenizer, which are read as text. If they are "
                "meant as control tokens, set `allow_special_tokens` to true."
            )

    def _encode_row(self, name: str, number: int, row: Values, tokenizer: PreTrainedTokenizerBase) -> BenchmarkExample:
        question_set = self.sets[name]
        wrong = row.get(self.wrong_column)
        has_paraphrase = wrong is not None and question_set.truth_column != self.answer_column

        columns = [self.question_column, self.answer_column]
        if has_paraphrase:
            columns.append(question_set.truth_column)
        for column in columns:
            if not isinstance(row.get(column), str):
                found = describe_kind(row[column]) if column in row else "none"
                raise DataError(
                    f"row {number} of the {name} set has no text in '{column}': expected a string, got {found}; its columns are "
                    f"{sorted(row)}. Set `question_column`, `answer_column` and `wrong_column`.",
                    owner=self.owner,
                    argument="answer_column" if column == self.answer_column else "question_column",
                )

        # Without a paraphrase, the truth ratio compares with the answer itself.
        question, answer = row[self.question_column], row[self.answer_column]
        answers: dict[str, list[str]] = {"answer": [answer]}
        if has_paraphrase:
            answers["paraphrase"] = [row[question_set.truth_column]]
        if wrong is not None:
            # A CSV file has one wrong answer, as text.
            answers["wrong"] = [wrong] if isinstance(wrong, str) else wrong

        sequences: dict[str, list[Example]] = {}
        for kind, texts in answers.items():
            sequences[kind] = encode_examples(
                [(question, text) for text in texts],
                tokenizer,
                name=name,
                number=number,
                template=self.template,
                max_length=self.max_length,
                allow_special_tokens=self.allow_special_tokens,
            )
        prompt = prompt_of(sequences["answer"][0]) if question_set.generates else None
        return BenchmarkExample({"question": question, "answer": answer}, sequences, prompt)

    # Values of an example --------------------------------------------------------------------------------------------

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute likelihoods, memorisation, attacks and ROUGE of one question."""
        (answer,) = scored["answer"]
        # The end token is not a part of the answer that could be memorised. An answer that was cut has none.
        has_end = not example.sequences["answer"][0].is_cut and len(answer.labels) > 1
        recalled = slice(None, -1) if has_end else slice(None)
        predictions, labels = answer.predictions[recalled], answer.labels[recalled]
        values: Values = {
            **example.texts,
            "nll": answer.nll,
            "probability": float(np.exp(-answer.nll)),
            "exact_memorization": exact_memorization(predictions, labels),
            "extraction_strength": extraction_strength(predictions, labels),
            # The same number again, under the name that the attack has.
            "loss": answer.nll,
            "min_k": min_k(answer.logp, self.k),
            "min_k_plus_plus": min_k_plus_plus(answer.logp, answer.mean, answer.std, self.k),
            "zlib": zlib_score(float(-answer.logp.sum()), example.texts["answer"]),
        }
        if "wrong" in scored:
            (truth,) = scored.get("paraphrase", scored["answer"])
            wrong_losses = [score.nll for score in scored["wrong"]]
            values["truth_ratio"] = float(truth_ratio([truth.nll], [wrong_losses], self.ratio)[0])
            if self.sets[stream].is_multiple_choice:
                values["probability"] = float(normalized_probability([answer.nll], [wrong_losses])[0])
        if generated is not None:
            values |= {"generated": generated, **rouge(generated, example.texts["answer"])}
        return values

    def add_fluency(self, rows: Sequence[Values], lm: LanguageModel, token_budget: int) -> None:
        """Add to each row the NLL per token of the generated answer under the fluency model, given the question.

        Args:
            rows: With ``question`` and ``generated``; they get ``fluency_nll``, which is ``None`` for an empty answer.
            lm: The model that generated the answers, whose device is used.
            token_budget: Largest batch, in tokens.
        """
        if self.fluency_model is None:
            return
        # It is loaded only now, and not kept: during generation, the memory is the measured model's.
        judge = LanguageModel(self.fluency_model)
        judge.load(torch.float32)
        judge.to(next(lm.parameters()).device)
        if judge.tokenizer is None:
            message = f"the fluency model '{self.fluency_model}' has no tokenizer."
            raise ModelError(message, owner=self.owner, argument="fluency_model")

        with_text, pairs = [], []
        for row in rows:
            row["fluency_nll"] = None
            # An empty answer has no token whose NLL could be taken; the share of these is a value of its own, `empty`.
            if row["generated"].strip():
                with_text.append(row)
                pairs.append((row["question"], row["generated"]))
        settings: Any = {
            "template": self.template,
            "max_length": self.max_length,
            "allow_special_tokens": self.allow_special_tokens,
        }
        encoded = encode_examples(pairs, judge.tokenizer, name="generated", **settings)
        for row, score in zip(with_text, score_examples(judge, encoded, token_budget), strict=True):
            row["fluency_nll"] = score.nll

    # Values of the benchmark -----------------------------------------------------------------------------------------

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the means of every set, forget quality and, where there is a holdout set, the attacks."""
        values: dict[str, float] = {}
        missing = {"forget_quality": f"the forget rows have no '{self.wrong_column}'"}
        for name, rows in examples.items():
            for key in AVERAGED:
                if _all_have(key, rows):
                    values[f"{name}/{key}"] = float(np.mean(get_column(rows, key)))
            if _all_have("truth_ratio", rows):
                kind: Literal["forget", "utility"] = "forget" if name == "forget" else "utility"
                values[f"{name}/truth_ratio"] = truth_ratio_score(get_column(rows, "truth_ratio"), kind)
            if _all_have("fluency_nll", rows):
                losses = [row["fluency_nll"] for row in rows if row["fluency_nll"] is not None]
                values[f"{name}/empty"] = 1 - len(losses) / len(rows)
                if losses:
                    values[f"{name}/fluency_nll"] = float(np.mean(losses))
                else:
                    missing[f"{name}/fluency_nll"] = "all generated answers are empty"
        if "holdout" in examples:
            for attack in ATTACKS:
                values[f"auc/{attack}"] = _attack_auc(examples, attack)

        compared = compare_with_retain(examples, retain)
        values |= compared.values
        missing |= compared.missing
        return Aggregate(values, {name: reason for name, reason in missing.items() if name not in values})


class QuestionBenchmark(Benchmark):
    """A benchmark that only asks questions: everything but the choice of sets, and of the values over them, is theirs."""

    compared_settings: ClassVar[tuple[str, ...]] = ("ratio", "k")
    questions: QuestionSets

    def settings(self) -> Values:
        """Return the settings that decide values, beside model and rows."""
        return {**super().settings(), **self.questions.settings()}

    def with_questions(self, column: str) -> QuestionBenchmark:
        """Return this benchmark with questions from another column."""
        changed = copy.copy(self)
        changed.questions = self.questions.with_column(column)
        # What was read has the questions of the other column.
        changed._streams = None
        return changed

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read and tokenise every set."""
        with arguments_of(self):
            return self.questions.load(tokenizer)

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute likelihoods, memorisation, attacks and ROUGE of one question."""
        return self.questions.measure(stream, example, scored, generated)

    def add_values(self, examples: Mapping[str, list[Values]], lm: LanguageModel) -> None:
        """Add the fluency of generated forget answers."""
        self.questions.add_fluency(examples["forget"], lm, self.token_budget)


def compare_with_retain(examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
    """Compute the scores that compare with the retain-only model: forget quality and, with a holdout set, PrivLeak.

    Args:
        examples: The values of every example, by stream, of the same rows as the retain-only model's.
        retain: Results of the retain-only model; ``None`` if there are none.

    Returns:
        ``forget_quality``, if the forget rows have truth ratios, and ``privleak``, if forget and holdout rows have Min-K,
        each among the values or, with the reason, among the missing ones.
    """
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    # A distribution over some of the rows would be another one: all of them need a truth ratio.
    if _all_have("truth_ratio", examples.get("forget")):
        if retain is None:
            missing["forget_quality"] = "it needs `retain_results`, measured in the same way"
        else:
            retain_ratios = get_column(retain.examples["forget"], "truth_ratio")
            values["forget_quality"] = forget_quality(get_column(examples["forget"], "truth_ratio"), retain_ratios)

    if _all_have("min_k", examples.get("forget")) and _all_have("min_k", examples.get("holdout")):
        if retain is None or "holdout" not in retain.examples:
            missing["privleak"] = "it needs `retain_results` with a holdout set, measured in the same way"
        else:
            # MUSE's area is that of holdout against forget.
            retain_area = 1 - _attack_auc(retain.examples, "min_k")
            if retain_area:
                values["privleak"] = privleak(1 - _attack_auc(examples, "min_k"), retain_area)
            else:
                missing["privleak"] = "it divides by 1 − AUC of the retain-only model, which is 0"
    return Aggregate(values, missing)


def _all_have(key: str, rows: Sequence[Values] | None) -> bool:
    return rows is not None and all(key in row for row in rows)


def _attack_auc(examples: Mapping[str, Sequence[Values]], attack: str) -> float:
    """Compute the area under the curve of an attack that takes forget rows for members."""
    sign = 1 if ATTACKS[attack] else -1
    forget = np.array(get_column(examples["forget"], attack))
    holdout = np.array(get_column(examples["holdout"], attack))
    return auc((sign * forget).tolist(), (sign * holdout).tolist())
