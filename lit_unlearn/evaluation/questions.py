"""Sets of questions and answers: reading, measuring and averaging them, shared by every benchmark that asks questions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.encoding import describe_first_prompt, encode_examples, encode_row
from lit_unlearn.data.encoding_settings import EncodingSettings, check_chunk_overlap, check_tokenizer, find_hidden_id
from lit_unlearn.data.example import IGNORED, Example, prompt_of
from lit_unlearn.data.files import describe_kind
from lit_unlearn.data.formats import Conversation, Document, Format, Row, RowReader
from lit_unlearn.data.source import Source
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.data.templates import Chat, check_chat, check_template, find_prompt_difference
from lit_unlearn.errors import ConfigError, DataError, ModelError, arguments_of
from lit_unlearn.evaluation.benchmark import Aggregate, Benchmark, BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.question_scores import (
    ATTACKS,
    all_have,
    compare_with_retain,
    compute_attack_auc,
    compute_memorization,
)
from lit_unlearn.evaluation.results import Results, Values, get_column
from lit_unlearn.evaluation.scoring import Scored, measure_gradient_norms, score_examples
from lit_unlearn.metrics import (
    exact_memorization,
    extraction_strength,
    is_refusal,
    min_k,
    min_k_plus_plus,
    normalized_probability,
    repetition,
    rouge,
    truth_ratio,
    truth_ratio_score,
    zlib_score,
)
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.loading import check_model_directory
from lit_unlearn.utils.distributed import measure_shares
from lit_unlearn.utils.io import expand_home
from lit_unlearn.utils.validation import check_at_least, check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ratio = Literal["geometric", "arithmetic"]

AVERAGED = (
    "probability",
    "paraphrase_probability",
    "rougeL_recall",
    "rougeL_f1",
    "nll",
    "exact_memorization",
    "extraction_strength",
    "extraction_strength_floored",
    "repetition",
    "refusal",
)
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


class QuestionAttack(Protocol):
    """An attack by the prompt: a frozen dataclass of settings, such as `FewShot`, that changes the questions of the forget set.

    ``name`` tells attacks apart; ``needs_answers`` says whether the model's own answers have to be given.
    """

    name: ClassVar[str]
    needs_answers: ClassVar[bool]

    def change_questions(
        self, conversations: Sequence[Conversation], answers: Sequence[str] = ()
    ) -> list[Conversation]:
        """Return the conversations that are asked instead, one for each, in the same order.

        Args:
            conversations: The forget set.
            answers: What the model answers to each of them, if ``needs_answers``.
        """


class QuestionSets:
    """Questions with right and, perhaps, wrong answers, in named sets.

    Args:
        owner: The benchmark whose arguments all others are, for messages.
        question_column: Column with the question.
        answer_column: Column with the answer.
        wrong_column: Column with a list of wrong answers; a set without it has no truth ratio.
        paraphrase_column: Column with the answer in other words; a set without it has no paraphrase probability.
        template: As for `ForgetRetain`.
        max_length: As for `ForgetRetain`.
        max_new_tokens: Longest generated answer.
        ratio: Mean of the wrong answers in the truth ratio: ``"geometric"``, as published code computes it, or
            ``"arithmetic"``, as the paper writes it.
        k: Fraction of the least likely tokens in the Min-K attacks.
        fluency_model: Hub name or directory of a model whose NLL of the generated forget answers is measured (low:
            fluent); ``None`` leaves that out. The target model is a natural choice.
        floor: Whether extraction strength is also given with the floor of published tables, as ``extraction_strength_floored``,
            which ``memorization`` takes then.
        reference_model: Hub name or directory of a model with the same tokenizer, such as the base model: a membership attack
            compares its NLL; ``None`` leaves the attack ``auc/reference`` out.
        gradient_norm: Whether to measure the membership attack ``auc/gradient_norm``, by a backward pass for every forget and
            holdout row, which needs memory for the gradients of all weights.
        allow_special_tokens: As for `ForgetRetain`.
        format: As for `ForgetRetain`. Of a conversation the last turn is the answer, and what stands before it is the prompt;
            raw text is scored, chunk by chunk, and continued only where there is a context.
        messages_column: As for `ForgetRetain`.
        text_column: As for `ForgetRetain`.
        context_column: As for `ForgetRetain`.
        chunk_overlap: As for `ForgetRetain`.
        chat: As for `ForgetRetain`.
        mask_padding_ids: As for `ForgetRetain`.

    Raises:
        ConfigError: If a setting is out of range.
    """

    def __init__(
        self,
        owner: Benchmark,
        question_column: str = "question",
        answer_column: str = "answer",
        wrong_column: str = "perturbed_answer",
        paraphrase_column: str = "paraphrased_answer",
        template: str | None = None,
        max_length: int = 512,
        max_new_tokens: int = 200,
        ratio: Ratio = "geometric",
        k: float = 0.4,
        fluency_model: str | None = None,
        floor: bool = False,
        reference_model: str | None = None,
        gradient_norm: bool = False,
        allow_special_tokens: bool = False,
        format: Format = "auto",
        messages_column: str = "messages",
        text_column: str = "text",
        context_column: str | None = None,
        chunk_overlap: int = 0,
        chat: Chat | None = None,
        mask_padding_ids: bool = False,
    ) -> None:
        with arguments_of(owner):
            template = check_template(template)
            check_chat(chat, template)
        check_at_least(1, owner, max_new_tokens=max_new_tokens)
        check_choice(get_args(Format), owner, format=format)
        check_chunk_overlap(chunk_overlap, max_length, owner)
        check_choice(get_args(Ratio), owner, ratio=ratio)
        if not 0 < k <= 1:
            raise ConfigError(f"`k` must be above 0 and at most 1, not {k!r}.", owner=owner, argument="k")
        if fluency_model is not None:
            fluency_model = expand_home(fluency_model)
            check_model_directory(fluency_model, True, owner=owner, argument="fluency_model")
        if reference_model is not None:
            reference_model = expand_home(reference_model)
            check_model_directory(reference_model, True, owner=owner, argument="reference_model")

        self.owner = owner
        self.reader = RowReader(
            format, "last", question_column, answer_column, messages_column, text_column, context_column
        )
        self.question_column = question_column
        self.answer_column = answer_column
        self.wrong_column = wrong_column
        self.paraphrase_column = paraphrase_column
        self.encoding = EncodingSettings(
            template, chat, max_length, chunk_overlap, allow_special_tokens, mask_padding_ids
        )
        self.max_new_tokens = max_new_tokens
        self.ratio: Ratio = ratio
        self.k = k
        self.fluency_model = fluency_model
        self.floor = floor
        self.reference_model = reference_model
        self.gradient_norm = gradient_norm
        self.sets: dict[str, QuestionSet] = {}
        self.attack: QuestionAttack | None = None
        self.attack_answers: Sequence[str] = ()
        self.prompt: dict[str, Any] | None = None
        """What decides the prompts, from `describe_first_prompt`, once the rows are read; ``None`` if all are raw text."""

    def settings(self) -> Values:
        """Return the settings that decide values, beside the rows."""
        # Only where there is one, so that plain results of earlier versions can be compared with.
        attack = {} if self.attack is None else {"attack": describe_attack(self.attack)}
        return {
            **attack,
            "max_new_tokens": self.max_new_tokens,
            "ratio": self.ratio,
            "k": self.k,
            "fluency_model": self.fluency_model,
            "floor": self.floor,
            "reference_model": self.reference_model,
            "gradient_norm": self.gradient_norm,
            "mask_padding_ids": self.encoding.mask_padding_ids,
            "prompt": self.prompt,
        }

    def with_columns(self, question_column: str, answer_column: str | None = None) -> QuestionSets:
        """Return the sets that have other columns with questions and answers, and read them from there.

        Args:
            question_column: Column with the questions.
            answer_column: Column with the answers; ``None`` for the answers as they are.

        Raises:
            DataError: If the forget set has no such column.
        """
        changed = copy.copy(self)
        changed.question_column = question_column
        columns = [question_column]
        if answer_column is not None:
            changed.answer_column = answer_column
            columns.append(answer_column)
            # They are in the words of the other answers, and nothing is compared with them.
            changed.wrong_column = changed.paraphrase_column = ""
        changed.sets = {}
        for name, question_set in self.sets.items():
            lacking = set(columns) - set(question_set.source.load(name, argument=name).column_names)
            if not lacking:
                changed.sets[name] = question_set
            elif name == "forget":
                raise DataError(f"the forget set has no column '{sorted(lacking)[0]}'.")
        return changed

    def with_sets(self, names: Sequence[str]) -> QuestionSets:
        """Return these of the sets, without the others."""
        changed = copy.copy(self)
        changed.sets = {name: question_set for name, question_set in self.sets.items() if name in names}
        return changed

    def with_attack(self, attack: QuestionAttack, answers: Sequence[str] = ()) -> QuestionSets:
        """Return the sets with the forget questions that an attack asks."""
        changed = copy.copy(self)
        changed.attack, changed.attack_answers = attack, answers
        return changed

    # Rows ------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read and tokenise every set.

        Raises:
            DataError: If a column is missing or a row has no answer.
            ModelError: If the reference model has another tokenizer.
        """
        check_tokenizer(tokenizer)
        if self.reference_model is not None:
            self._check_reference_tokenizer(tokenizer)
        streams = {}
        for name, question_set in self.sets.items():
            table = question_set.source.load(name, argument=name)
            kind = self.reader.recognize(table.column_names)
            cells = table.to_list()
            self._check_wrong_answers(name, cells)
            rows = [self._read_row(name, number, row, kind) for number, row in enumerate(cells)]
            self._warn_of_special_tokens(name, rows, tokenizer)
            if name == "forget" and self.attack is not None:
                rows = self._ask_as_attack(rows, self.attack)
            self.prompt = self.prompt or describe_first_prompt(rows, tokenizer, self.encoding)
            examples: list[BenchmarkExample] = []
            for number, row in enumerate(rows):
                if isinstance(row, Document):
                    examples += self._encode_document(row, name, number, tokenizer)
                else:
                    examples.append(self._encode_conversation(row, cells[number], name, number, tokenizer))
            streams[name] = BenchmarkStream(
                examples,
                question_set.source.path,
                self.max_new_tokens,
                hidden_id=find_hidden_id(tokenizer, self.encoding),
            )
        return streams

    def read_file(self, path: str, tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        """Return the tokens of every row of a file, put as the sets' rows are.

        Args:
            path: A file of questions, conversations or texts, or a hub name.
            tokenizer: The model's.

        Raises:
            MissingFileError: If there is no such file.
            DataError: If its rows cannot be read.
        """
        name = "source"
        table = Source(path).load(name, argument=name)
        reader = self.reader
        if reader.question_column not in table.column_names:
            # Not a file like those of the sets, of which columns and format may be set.
            reader = replace(reader, format="auto", question_column="question", answer_column="answer")
        encoded = []
        for number, row in enumerate(reader.read(table, name, argument=name)):
            encoded.append(encode_row(row, tokenizer, self.encoding, f"row {number} of the {name} set"))
        return encoded

    def _check_reference_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # NLLs of other tokens would not compare; told now, and not after all rows are measured.
        other = LanguageModel(self.reference_model).tokenizer
        if other is None or other.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"`reference_model` '{self.reference_model}' must have the measured model's tokenizer, but has "
                f"{'none' if other is None else 'another one'}: give the base model, or set it to null.",
                owner=self.owner,
                argument="reference_model",
            )

    def _ask_as_attack(self, rows: Sequence[Row], attack: QuestionAttack) -> list[Row]:
        """Return the forget rows with the questions that an attack asks."""
        conversations = [row for row in rows if isinstance(row, Conversation)]
        if len(conversations) < len(rows):
            raise ConfigError(
                f"the attack '{attack.name}' changes questions, but the forget set has raw text: leave it out.",
                owner=self.owner,
                argument="forget",
            )
        return [*attack.change_questions(conversations, self.attack_answers)]

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

    def _warn_of_special_tokens(self, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        row_text = RowText(tokenizer, self.encoding.allow_special_tokens)
        count = 0
        for row in rows:
            # Of an earlier turn, and of what stands before a text, as well: all of it is in the prompt.
            if row_text.count(row.texts):
                count += 1
        if count:
            rank_zero_warn(
                f"{count} of {len(rows)} {name} rows contain special tokens of the tokenizer, which are read as text. If they are "
                "meant as control tokens, set `allow_special_tokens` to true."
            )

    def _read_row(self, name: str, number: int, row: Values, kind: Format) -> Row:
        """Return a row with the question that is asked of it."""
        place = f"row {number} of the {name} set"
        # Of conversations, too, the question may be asked in other words.
        is_changed = self.question_column != self.reader.question_column
        if is_changed or kind == "question_answer":
            self._check_text(row, self.question_column, place)
        if kind == "question_answer":
            self._check_text(row, self.answer_column, place)
            return Conversation.from_turn(row[self.question_column], row[self.answer_column])
        with arguments_of(self.owner):
            read = self.reader.read_row(row, kind, place, argument=name)
        if isinstance(read, Conversation) and is_changed:
            read = read.with_question(row[self.question_column])
        if isinstance(read, Conversation) and self.answer_column != self.reader.answer_column:
            self._check_text(row, self.answer_column, place)
            read = read.with_answer(row[self.answer_column])
        return read

    def _check_text(self, row: Values, column: str, place: str) -> None:
        text = row.get(column)
        # An empty answer has a message of its own, where its tokens are counted.
        is_empty = column == self.question_column and isinstance(text, str) and not text.strip()
        if not isinstance(text, str) or is_empty:
            kind = "none"
            if column in row:
                kind = "an empty one" if is_empty else describe_kind(text)
            raise DataError(
                f"{place} has no text in '{column}': expected a string, got {kind}; its columns are {sorted(row)}. Set "
                "`question_column`, `answer_column` and `wrong_column`.",
                owner=self.owner,
                argument="answer_column" if column == self.answer_column else "question_column",
            )

    def _encode_conversation(
        self, row: Conversation, cells: Values, name: str, number: int, tokenizer: PreTrainedTokenizerBase
    ) -> BenchmarkExample:
        question_set = self.sets[name]
        place = f"row {number} of the {name} set"
        wrong = cells.get(self.wrong_column)

        answers: dict[str, list[str]] = {"answer": [row.answer]}
        paraphrase_column = self.paraphrase_column
        if wrong is not None and self._compares_paraphrase(name):
            paraphrase_column = question_set.truth_column
            self._check_text(cells, paraphrase_column, place)
        # Elsewhere a paraphrase may be missing, and is no part of the truth ratio.
        paraphrase = cells.get(paraphrase_column)
        if isinstance(paraphrase, str) and paraphrase.strip():
            answers["paraphrase"] = [paraphrase]
        if wrong is not None:
            # A CSV file has one wrong answer, as text.
            answers["wrong"] = [wrong] if isinstance(wrong, str) else wrong

        sequences: dict[str, list[Example]] = {}
        for kind, texts in answers.items():
            sequences[kind] = []
            for text in texts:
                sequences[kind] += encode_row(row.with_answer(text), tokenizer, self.encoding, place)
        prompt = prompt_of(sequences["answer"][0]) if question_set.generates else None
        return BenchmarkExample({"question": row.question, "answer": row.expected}, sequences, prompt)

    def _compares_paraphrase(self, name: str) -> bool:
        """Return whether a set's truth ratio takes the paraphrased answer for the right one."""
        return self.sets[name].truth_column != self.answer_column

    def _encode_document(
        self, row: Document, name: str, number: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[BenchmarkExample]:
        """Return an example for every chunk of raw text, the first of which is continued if there is a context."""
        examples: list[BenchmarkExample] = []
        for chunk in encode_row(row, tokenizer, self.encoding, f"row {number} of the {name} set"):
            text = str(tokenizer.decode([label for label in chunk.labels if label != IGNORED]))
            context = "" if examples else row.context
            is_continued = self.sets[name].generates and bool(context) and chunk.labels[0] == IGNORED
            prompt = prompt_of(chunk) if is_continued else None
            examples.append(BenchmarkExample({"question": context, "answer": text}, {"text": [chunk]}, prompt))
        return examples

    # Values of an example --------------------------------------------------------------------------------------------

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute likelihoods, memorisation, attacks and ROUGE of one question."""
        kind, _ = _get_measured(example)
        (answer,) = scored[kind]
        # The end token is not a part of the answer that could be memorised, and published Min-K does not count it either.
        recalled = slice(None, -1) if _has_end(example) else slice(None)
        predictions, labels = answer.predictions[recalled], answer.labels[recalled]
        logp = answer.logp[recalled]
        values: Values = {
            **example.texts,
            "nll": answer.nll,
            "probability": float(np.exp(-answer.nll)),
            "exact_memorization": exact_memorization(predictions, labels),
            "extraction_strength": extraction_strength(predictions, labels),
            # The same number again, under the name that the attack has.
            "loss": answer.nll,
            "min_k": min_k(logp, self.k),
            "min_k_plus_plus": min_k_plus_plus(logp, answer.mean[recalled], answer.std[recalled], self.k),
            "zlib": zlib_score(answer.nll, example.texts["answer"]),
        }
        if self.floor:
            values["extraction_strength_floored"] = extraction_strength(predictions, labels, floor=True)
        if "paraphrase" in scored:
            values["paraphrase_probability"] = float(np.exp(-scored["paraphrase"][0].nll))
        if "wrong" in scored:
            (truth,) = scored["paraphrase" if self._compares_paraphrase(stream) else "answer"]
            wrong_losses = [score.nll for score in scored["wrong"]]
            values["truth_ratio"] = float(truth_ratio([truth.nll], [wrong_losses], self.ratio)[0])
            if self.sets[stream].is_multiple_choice:
                values["probability"] = float(normalized_probability([answer.nll], [wrong_losses])[0])
        if generated is not None:
            values |= {"generated": generated, **rouge(generated, example.texts["answer"])}
            values |= {"repetition": repetition(generated), "refusal": float(is_refusal(generated))}
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
        judge = _load_beside(self.fluency_model, lm)
        if judge.tokenizer is None:
            message = f"the fluency model '{self.fluency_model}' has no tokenizer."
            raise ModelError(message, owner=self.owner, argument="fluency_model")

        with_text, pairs = [], []
        for row in rows:
            # Raw text without a context has none.
            if "generated" not in row:
                continue
            row["fluency_nll"] = None
            # An empty answer has no token whose NLL could be taken; the share of these is a value of its own, `empty`.
            if row["generated"].strip():
                with_text.append(row)
                pairs.append((row["question"], row["generated"]))
        encoded = encode_examples(pairs, judge.tokenizer, name="generated", settings=self.encoding)
        for row, score in zip(with_text, score_examples(judge, encoded, token_budget), strict=True):
            row["fluency_nll"] = score.nll

    def add_attacks(
        self,
        rows: Mapping[str, Sequence[Values]],
        streams: Mapping[str, BenchmarkStream],
        lm: LanguageModel,
        token_budget: int,
    ) -> None:
        """Add the values of the attacks that settings switch on to the forget and the holdout rows; a collective call.

        Args:
            rows: By stream; they get ``reference``, the NLL minus the reference model's, and ``gradient_norm``.
            streams: The examples of these rows.
            lm: The measured model; it is left as it was.
            token_budget: Largest batch, in tokens.
        """
        # Without rows that the model never saw there is no attack.
        if "holdout" not in rows:
            return
        sets = ("forget", "holdout")
        if self.reference_model is not None:
            reference = _load_beside(self.reference_model, lm)
            for name in sets:
                examples = [_get_measured(example)[1] for example in streams[name].examples]
                scores = measure_shares(examples, lambda share: score_examples(reference, share, token_budget))
                for row, score in zip(rows[name], scores, strict=True):
                    row["reference"] = row["nll"] - score.nll
        if self.gradient_norm:
            for name in sets:
                examples = [_leave_out_end(example) for example in streams[name].examples]
                norms = measure_shares(examples, lambda share: measure_gradient_norms(lm, share))
                for row, norm in zip(rows[name], norms, strict=True):
                    row["gradient_norm"] = norm

    # Values of the benchmark -----------------------------------------------------------------------------------------

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the means of every set, forget quality and, where there is a holdout set, the attacks."""
        values: dict[str, float] = {}
        missing = {"forget_quality": f"the forget rows have no '{self.wrong_column}'"}
        for name, rows in examples.items():
            for key in AVERAGED:
                if all_have(key, rows):
                    values[f"{name}/{key}"] = float(np.mean(get_column(rows, key)))
            lacking = sum("paraphrase_probability" not in row for row in rows)
            if 0 < lacking < len(rows):
                reason = f"{lacking} of {len(rows)} rows have no text in '{self.paraphrase_column}'"
                missing[f"{name}/paraphrase_probability"] = reason
            if all_have("truth_ratio", rows):
                kind: Literal["forget", "utility"] = "forget" if name == "forget" else "utility"
                values[f"{name}/truth_ratio"] = truth_ratio_score(get_column(rows, "truth_ratio"), kind)
            if all_have("fluency_nll", rows):
                losses = [row["fluency_nll"] for row in rows if row["fluency_nll"] is not None]
                values[f"{name}/empty"] = 1 - len(losses) / len(rows)
                if losses:
                    values[f"{name}/fluency_nll"] = float(np.mean(losses))
                else:
                    missing[f"{name}/fluency_nll"] = "all generated answers are empty"
        if "holdout" in examples:
            for attack in ATTACKS:
                if all_have(attack, examples["forget"]):
                    values[f"auc/{attack}"] = compute_attack_auc(examples, attack)
        for attack in self._list_extra_attacks():
            missing[f"auc/{attack}"] = "it needs a holdout set"
        values |= compute_memorization(examples["forget"], values)

        compared = compare_with_retain(examples, retain)
        values |= compared.values
        missing |= compared.missing
        return Aggregate(values, {name: reason for name, reason in missing.items() if name not in values})

    def _list_extra_attacks(self) -> list[str]:
        """Return the attacks that settings switch on."""
        chosen = {"reference": self.reference_model is not None, "gradient_norm": self.gradient_norm}
        return [attack for attack, is_chosen in chosen.items() if is_chosen]


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
            return self.questions.read_file(source, tokenizer)

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
        """Add the fluency of generated forget answers, and the attacks that need another model or gradients."""
        self.questions.add_fluency(examples["forget"], lm, self.token_budget)
        self.questions.add_attacks(examples, self.prepare(lm.tokenizer), lm, self.token_budget)


def describe_attack(attack: QuestionAttack) -> Values:
    """Return the name and the settings of an attack, in plain types."""
    return {"name": attack.name, **asdict(cast("Any", attack))}


def _get_measured(example: BenchmarkExample) -> tuple[str, Example]:
    """Return the kind and the tokens of what a row's own values are measured on: its answer, or a chunk of raw text."""
    kind = "answer" if "answer" in example.sequences else "text"
    (sequence,) = example.sequences[kind]
    return kind, sequence


def _has_end(example: BenchmarkExample) -> bool:
    """Return whether the last supervised token is the end of an answer: one that was cut has none, nor has raw text."""
    kind, sequence = _get_measured(example)
    # Nothing predicts the first token.
    supervised = sum(label != IGNORED for label in sequence.labels[1:])
    return kind == "answer" and not sequence.is_cut and supervised > 1


def _leave_out_end(example: BenchmarkExample) -> Example:
    """Return what a row's values are measured on, with the end token unsupervised."""
    _, sequence = _get_measured(example)
    if not _has_end(example):
        return sequence
    labels = list(sequence.labels)
    last = max(place for place, label in enumerate(labels) if label != IGNORED)
    labels[last] = IGNORED
    return sequence._replace(labels=labels)


def _load_beside(name: str, lm: LanguageModel) -> LanguageModel:
    """Load another model onto the measured one's device, as late as possible: generation needs the memory."""
    other = LanguageModel(name)
    other.load(torch.float32)
    other.to(next(lm.parameters()).device)
    return other
