"""Sets of questions and answers: where their rows are, and the settings that they are asked and measured by."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast, get_args

from lit_unlearn.data.encoding_settings import EncodingSettings, check_chunk_overlap
from lit_unlearn.data.formats import Conversation, Format, RowReader
from lit_unlearn.data.source import Source
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.errors import ConfigError, DataError, arguments_of
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.results import Values
from lit_unlearn.models.locating import check_model_directory
from lit_unlearn.utils.io import expand_home
from lit_unlearn.utils.validation import check_at_least, check_choice

Ratio = Literal["geometric", "arithmetic"]


class QuestionSet(NamedTuple):
    """One set of questions.

    Args:
        source: Where its rows are.
        truth_column: Column with the text that the truth ratio compares with the wrong answers.
        is_multiple_choice: Whether the probability is that among the given options, p / (p + Σ p_wrong).
        generates: Whether the questions are answered, for ROUGE.
        argument: The benchmark's argument that the source was made from, for errors; ``None`` for the set's name.
    """

    source: Source
    truth_column: str = "paraphrased_answer"
    is_multiple_choice: bool = False
    generates: bool = True
    argument: str | None = None


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

    def compares_paraphrase(self, name: str) -> bool:
        """Return whether a set's truth ratio takes the paraphrased answer for the right one."""
        return self.sets[name].truth_column != self.answer_column


def describe_attack(attack: QuestionAttack) -> Values:
    """Return the name and the settings of an attack, in plain types."""
    return {"name": attack.name, **asdict(cast("Any", attack))}
