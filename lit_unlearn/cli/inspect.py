"""Run ``lit-unlearn inspect``: models answer the same questions side by side, with the probability of every token."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch

from lit_unlearn.cli.answer_page import AnswerPage
from lit_unlearn.cli.compare import shorten_names
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.files import describe_kind
from lit_unlearn.data.formats import Conversation, RowReader
from lit_unlearn.data.source import Source
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.errors import ConfigError, DataError, MissingFileError, StoppedBySignal
from lit_unlearn.evaluation.inspection import Asked, Reply, ask_model, describe_replies
from lit_unlearn.evaluation.served import KEY_VARIABLE, ServedModel
from lit_unlearn.export.audit_files import read_question_settings, read_record
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.io import atomic_file, check_output_file

# With its right answer, where that is known. What a conversation asks is all that stands before its last turn.
Question = tuple[str | Conversation, str | None]
Model = LanguageModel | ServedModel


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn inspect",
        description="Asks models the same questions; shows their answers and the probability of every token.",
        epilog="Without --questions or -q, questions are typed, or piped in: one a line, up to an empty line or the end. "
        f"The key of a server, where it needs one, is read from {KEY_VARIABLE}.",
    )
    parser.add_argument(
        "models", nargs="*", type=str, metavar="MODEL", help="Model directories or hub names, such as before and after."
    )
    parser.add_argument(
        "--url",
        type=str,
        help="Ask an OpenAI-compatible server as well: what precedes /chat/completions, such as …/v1.",
    )
    parser.add_argument(
        "--served_model", type=str, metavar="NAME", help="The server's name of the model, if it lists several."
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="A .json, .jsonl, .csv or .parquet file.")
    parser.add_argument("-q", dest="question", action="append", metavar="TEXT", help="A question; may be repeated.")
    parser.add_argument("--question_column", type=str, default="question", help="Column of the file.")
    parser.add_argument("--answer_column", type=str, help="Column with right answers; `answer`, if there is one.")
    parser.add_argument("--max_rows", type=int, default=10, help="Only this many rows of the file.")
    parser.add_argument(
        "--template",
        type=str,
        help="Text with {question} and {answer}, in which \\n is a line break; by default as the model's record says, or else the "
        "tokenizer's chat template.",
    )
    parser.add_argument(
        "--chat",
        type=Chat | None,
        help="Settings of the chat template, as the data has them: --chat.system=TEXT, --chat.template=FILE, --chat.args.NAME=VALUE.",
    )
    parser.add_argument(
        "--allow_special_tokens",
        action="store_true",
        help="Special tokens in questions and answers are control tokens, and not text.",
    )
    parser.add_argument("--max_length", type=int, default=512, help="Tokens of a question with its right answer.")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="Tokens of an answer.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Of the weights."
    )
    parser.add_argument(
        "--color", type=Literal["auto", "always", "never"], default="auto", help="Colours instead of bars."
    )
    parser.add_argument("--format", type=Literal["text", "json"], default="text", help="Of the output.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="File to write to, instead of printing.")
    parser.add_argument("--overwrite", action="store_true", help="Replace that file, if it is there.")
    return parser


def run(arguments: list[str]) -> None:
    """Ask every model the same questions and show the answers."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.questions and options.question:
        parser.error("give either --questions or -q, not both")
    if options.output is not None:
        check_output_file(options.output, argument="output", is_ours=lambda _: options.overwrite)
    encoding = _find_prompt(options, parser.instantiate(options).chat)

    models = _find_models(options)
    page = AnswerPage(shutil.get_terminal_size().columns, _use_colours(options))
    is_dialogue = not (options.questions or options.question) and sys.stdin.isatty() and sys.stdout.isatty()
    if is_dialogue:
        answered = _answer_typed_questions(models, options, encoding, page)
    else:
        answered = _answer_questions(models, _read_questions(options), options, encoding)

    if options.format == "json":
        content = {"models": {name: model.name for name, model in models.items()}, **describe_replies(answered)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
    else:
        text = page.format_page(answered)
    if options.output is not None:
        with atomic_file(options.output, may_replace=options.overwrite) as file:
            file.write_text(text + "\n", encoding="utf-8")
    elif not is_dialogue or options.format == "json":
        print(text)


def _find_prompt(options: Namespace, chat: Chat | None) -> EncodingSettings:
    """Return the prompt that is given, or else that of the first model whose record tells it: in another one it knows less."""
    template = check_template(options.template)
    check_chat(chat, template)
    if template is None and chat is None:
        records = map(read_record, options.models)
        settings = next((read_question_settings(record) for record in records if record is not None), {})
        template, chat = settings.get("template"), settings.get("chat")
    return EncodingSettings(template, chat, options.max_length, allow_special_tokens=options.allow_special_tokens)


def _use_colours(options: Namespace) -> bool:
    if options.color != "auto":
        return bool(options.color == "always")
    to_terminal = options.output is None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return to_terminal and not os.environ.get("NO_COLOR")


# Models ---------------------------------------------------------------------------------------------------------------


def _find_models(options: Namespace) -> dict[str, Model]:
    """Return the models that are to be asked by the names they are shown by; none is loaded yet."""
    # In a directory's name such as Llama-3.2-1B, ".2-1B" is no suffix: a real one is added, for `shorten_names` to cut off.
    files = [Path(f"{Path(model).absolute()}.model") for model in options.models]
    models: dict[str, Model] = {}
    for name, model in zip(shorten_names(files), options.models, strict=True):
        models[name] = LanguageModel(model)
    if options.url is not None:
        served = ServedModel(options.url, options.served_model, os.environ.get(KEY_VARIABLE, "").strip())
        models[f"{Path(served.name).name} at {urlsplit(served.url).netloc}"] = served
    elif options.served_model is not None:
        raise ConfigError("--served_model is a model of a server: give its address as --url.")
    if not models:
        raise ConfigError("there is no model to ask: give MODEL, or --url for one behind a server.")
    return models


def _load_model(model: Model, dtype: str) -> None:
    if isinstance(model, LanguageModel):
        model.load(getattr(torch, dtype))
        model.to("cuda" if torch.cuda.is_available() else "cpu")


def _ask(
    model: Model,
    question: str | Conversation,
    right: str | None,
    options: Namespace,
    encoding: EncodingSettings,
    number: int,
) -> Reply:
    settings = {"encoding": encoding, "max_new_tokens": options.max_new_tokens}
    if isinstance(model, ServedModel):
        return model.ask(question, right, **settings)
    return ask_model(model, question, right, **settings, number=number)


# Questions ------------------------------------------------------------------------------------------------------------


def _read_questions(options: Namespace) -> list[Question]:
    if options.questions is not None:
        return _read_question_file(options)
    questions = options.question or [*takewhile(bool, map(str.strip, sys.stdin))]
    if not questions:
        raise ConfigError("there is no question: give --questions FILE or -q TEXT, or pipe in a line for each.")
    return [(question, None) for question in questions]


def _read_question_file(options: Namespace) -> list[Question]:
    import datasets

    if not options.questions.is_file():
        raise MissingFileError(f"there is no file of questions '{options.questions}'.")
    datasets.disable_progress_bars()
    rows = Source(str(options.questions), max_rows=options.max_rows).load("questions")

    reader = RowReader(supervise="last", question_column=options.question_column)
    if reader.recognize(rows.column_names) in ("messages", "prompt_completion"):
        conversations = [row for row in reader.read(rows, "questions") if isinstance(row, Conversation)]
        return [(conversation, conversation.answer) for conversation in conversations]

    columns = [options.question_column]
    if options.answer_column:
        columns.append(options.answer_column)
    elif "answer" in rows.column_names:
        columns.append("answer")
    missing = [repr(column) for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"'{options.questions}' has no column {', '.join(missing)}; its columns are {rows.column_names}. "
            "Set --question_column and --answer_column."
        )

    questions: list[Question] = []
    for number, row in enumerate(rows.to_list()):
        texts = [row[column] for column in columns]
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                kind = describe_kind(text)
                raise DataError(
                    f"row {number} of '{options.questions}' has {kind} in '{column}', where a text must be."
                )
        questions.append((texts[0], texts[1] if len(texts) == 2 else None))
    return questions


# Answers --------------------------------------------------------------------------------------------------------------


def _answer_questions(
    models: Mapping[str, Model],
    questions: Sequence[Question],
    options: Namespace,
    encoding: EncodingSettings,
) -> list[Asked]:
    answered = []
    for question, right in questions:
        text = question.question if isinstance(question, Conversation) else question
        answered.append(Asked(text, right, replies={}))
    # One model after the other answers all questions, so that only one is in memory.
    for name, model in models.items():
        _load_model(model, options.dtype)
        for number, (question, right) in enumerate(questions):
            answered[number].replies[name] = _ask(model, question, right, options, encoding, number)
        if isinstance(model, LanguageModel):
            model.model = None
    return answered


def _answer_typed_questions(
    models: Mapping[str, Model], options: Namespace, encoding: EncodingSettings, page: AnswerPage
) -> list[Asked]:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` arrow keys and a history)
    for model in models.values():
        _load_model(model, options.dtype)
    answered: list[Asked] = []
    print(f"{page.format_legend()}\n\nAsk {' and '.join(models)}; an empty line ends.")
    try:
        while question := input("\n> ").strip():
            replies = {}
            for name, model in models.items():
                replies[name] = _ask(model, question, None, options, encoding, len(answered))
            # Only now: Ctrl-C may have come between two models, and then the question does not count.
            answered.append(Asked(question, None, replies))
            print(f"\n{page.format_answers(answered[-1])}")
    except StoppedBySignal:
        raise  # unlike Ctrl-C, it is no way to end the questions
    except (EOFError, KeyboardInterrupt):
        print()
    return answered
