"""Rows of question sets: read with the question that is asked of them, checked, and tokenised as examples of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.encoding import describe_first_prompt, encode_row
from lit_unlearn.data.encoding_settings import check_tokenizer, find_hidden_id
from lit_unlearn.data.example import IGNORED, Example, prompt_of
from lit_unlearn.data.files import describe_kind
from lit_unlearn.data.formats import Conversation, Document, Format, Row
from lit_unlearn.data.source import Source
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.errors import ConfigError, DataError, ModelError, arguments_of
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.question_sets import QuestionAttack, QuestionSets
from lit_unlearn.evaluation.results import Values
from lit_unlearn.models import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_streams(questions: QuestionSets, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
    """Read and tokenise every set.

    Args:
        questions: The sets. They learn what decides their prompts.
        tokenizer: The measured model's.

    Raises:
        DataError: If a column is missing or a row has no answer.
        ModelError: If the reference model has another tokenizer.
    """
    check_tokenizer(tokenizer)
    if questions.reference_model is not None:
        _check_reference_tokenizer(questions, tokenizer)
    streams = {}
    for name, question_set in questions.sets.items():
        with arguments_of(questions.owner):
            table = question_set.source.load(name, argument=question_set.argument or name)
        kind = questions.reader.recognize(table.column_names)
        cells = table.to_list()
        _check_wrong_answers(questions, name, cells)
        rows = [_read_row(questions, name, number, row, kind) for number, row in enumerate(cells)]
        _warn_of_special_tokens(questions, name, rows, tokenizer)
        if name == "forget" and questions.attack is not None:
            rows = _ask_as_attack(questions, rows, questions.attack)
        questions.prompt = questions.prompt or describe_first_prompt(rows, tokenizer, questions.encoding)
        examples: list[BenchmarkExample] = []
        for number, row in enumerate(rows):
            if isinstance(row, Document):
                examples += _encode_document(questions, row, name, number, tokenizer)
            else:
                examples.append(_encode_conversation(questions, row, cells[number], name, number, tokenizer))
        cut = sum(answer.is_cut for example in examples for answer in example.sequences.get("answer", []))
        if cut:
            rank_zero_warn(
                f"`max_length` ({questions.encoding.max_length} tokens, with the prompt) cuts {cut} of {len(examples)} {name} answers: only "
                "their beginnings are measured. Raise it."
            )
        streams[name] = BenchmarkStream(
            examples,
            question_set.source.path,
            questions.max_new_tokens,
            hidden_id=find_hidden_id(tokenizer, questions.encoding),
        )
    return streams


def read_file(questions: QuestionSets, path: str, tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    """Return the tokens of every row of a file, put as the sets' rows are.

    Args:
        questions: The sets, with what decides the tokens.
        path: A file of questions, conversations or texts, or a hub name.
        tokenizer: The model's.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If its rows cannot be read.
    """
    name = "source"
    table = Source(path).load(name, argument=name)
    reader = questions.reader
    if reader.question_column not in table.column_names:
        # Not a file like those of the sets, of which columns and format may be set.
        reader = replace(reader, format="auto", question_column="question", answer_column="answer")
    encoded = []
    for number, row in enumerate(reader.read(table, name, argument=name)):
        encoded.append(encode_row(row, tokenizer, questions.encoding, f"row {number} of the {name} set"))
    return encoded


def _check_reference_tokenizer(questions: QuestionSets, tokenizer: PreTrainedTokenizerBase) -> None:
    # NLLs of other tokens would not compare; told now, and not after all rows are measured.
    other = LanguageModel(questions.reference_model).tokenizer
    if other is None or other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"`reference_model` '{questions.reference_model}' must have the measured model's tokenizer, but has "
            f"{'none' if other is None else 'another one'}: give the base model, or set it to null.",
            owner=questions.owner,
            argument="reference_model",
        )


def _ask_as_attack(questions: QuestionSets, rows: Sequence[Row], attack: QuestionAttack) -> list[Row]:
    """Return the forget rows with the questions that an attack asks."""
    conversations = [row for row in rows if isinstance(row, Conversation)]
    if len(conversations) < len(rows):
        raise ConfigError(
            f"the attack '{attack.name}' changes questions, but the forget set has raw text: leave it out.",
            owner=questions.owner,
            argument="forget",
        )
    return [*attack.change_questions(conversations, questions.attack_answers)]


def _read_row(questions: QuestionSets, name: str, number: int, row: Values, kind: Format) -> Row:
    """Return a row with the question that is asked of it."""
    place = f"row {number} of the {name} set"
    # Of conversations, too, the question may be asked in other words.
    is_changed = questions.question_column != questions.reader.question_column
    if is_changed or kind == "question_answer":
        _check_text(questions, row, questions.question_column, place)
    if kind == "question_answer":
        _check_text(questions, row, questions.answer_column, place)
        return Conversation.from_turn(row[questions.question_column], row[questions.answer_column])
    with arguments_of(questions.owner):
        read = questions.reader.read_row(row, kind, place, argument=name)
    if isinstance(read, Conversation) and is_changed:
        read = read.with_question(row[questions.question_column])
    if isinstance(read, Conversation) and questions.answer_column != questions.reader.answer_column:
        _check_text(questions, row, questions.answer_column, place)
        read = read.with_answer(row[questions.answer_column])
    return read


def _check_text(questions: QuestionSets, row: Values, column: str, place: str) -> None:
    text = row.get(column)
    # An empty answer has a message of its own, where its tokens are counted.
    is_empty = column == questions.question_column and isinstance(text, str) and not text.strip()
    if not isinstance(text, str) or is_empty:
        kind = "none"
        if column in row:
            kind = "an empty one" if is_empty else describe_kind(text)
        raise DataError(
            f"{place} has no text in '{column}': expected a string, got {kind}; its columns are {sorted(row)}. Set "
            "`question_column`, `answer_column` and `wrong_column`.",
            owner=questions.owner,
            argument="answer_column" if column == questions.answer_column else "question_column",
        )


def _check_wrong_answers(questions: QuestionSets, name: str, rows: Sequence[Values]) -> None:
    """Refuse a set in which only some rows have wrong answers: a truth ratio over some rows would be that of another set."""
    lacking = [number for number, row in enumerate(rows) if row.get(questions.wrong_column) in (None, "", [])]
    if len(lacking) == len(rows):
        for row in rows:
            row.pop(questions.wrong_column, None)
        return
    for number, row in enumerate(rows):
        answers = row[questions.wrong_column]
        texts = [answers] if isinstance(answers, str) else answers
        if number not in lacking and isinstance(texts, list):
            kinds = [describe_kind(text) for text in texts if not isinstance(text, str) or not text.strip()]
            problem = f"{kinds[0]} in" if kinds else ""
        else:
            problem = "no wrong answer in" if number in lacking else f"{describe_kind(answers)} in"
        if problem:
            raise DataError(
                f"row {number} of the {name} set has {problem} '{questions.wrong_column}': expected a text or a list of texts in every "
                "row, or in none. Correct the row, or set `wrong_column` to another column.",
                owner=questions.owner,
                argument="wrong_column",
            )


def _warn_of_special_tokens(
    questions: QuestionSets, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    row_text = RowText(tokenizer, questions.encoding.allow_special_tokens)
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


def _encode_conversation(
    questions: QuestionSets,
    row: Conversation,
    cells: Values,
    name: str,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
) -> BenchmarkExample:
    question_set = questions.sets[name]
    place = f"row {number} of the {name} set"
    wrong = cells.get(questions.wrong_column)

    answers: dict[str, list[str]] = {"answer": [row.answer]}
    paraphrase_column = questions.paraphrase_column
    if wrong is not None and questions.compares_paraphrase(name):
        paraphrase_column = question_set.truth_column
        _check_text(questions, cells, paraphrase_column, place)
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
            sequences[kind] += encode_row(row.with_answer(text), tokenizer, questions.encoding, place)
    prompt = prompt_of(sequences["answer"][0]) if question_set.generates else None
    return BenchmarkExample({"question": row.question, "answer": row.expected}, sequences, prompt)


def _encode_document(
    questions: QuestionSets, row: Document, name: str, number: int, tokenizer: PreTrainedTokenizerBase
) -> list[BenchmarkExample]:
    """Return an example for every chunk of raw text, the first of which is continued if there is a context."""
    examples: list[BenchmarkExample] = []
    for chunk in encode_row(row, tokenizer, questions.encoding, f"row {number} of the {name} set"):
        text = str(tokenizer.decode([label for label in chunk.labels if label != IGNORED]))
        context = "" if examples else row.context
        is_continued = questions.sets[name].generates and bool(context) and chunk.labels[0] == IGNORED
        prompt = prompt_of(chunk) if is_continued else None
        examples.append(BenchmarkExample({"question": context, "answer": text}, {"text": [chunk]}, prompt))
    return examples
