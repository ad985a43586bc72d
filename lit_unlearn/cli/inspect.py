"""``lit-unlearn inspect``: models answer the same questions side by side, with the probability of every token."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import torch

from lit_unlearn.cli.compare import short_names
from lit_unlearn.data.source import Source
from lit_unlearn.data.templates import check_template
from lit_unlearn.evaluation.inspection import Asked, Page, Reply, ask, record
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.io import atomic_file

Question = tuple[str, str | None]  # and its right answer, where that is known


def run(arguments: list[str]) -> None:
    """Asks every model the same questions and shows what they say.

    Args:
        arguments: After the command's name.

    Raises:
        ValueError: If there is no question, or a column of the file is missing or not text.
        FileNotFoundError: If there is no such file or model.
    """
    options = _parse(arguments)
    names = short_names([Path(f"{Path(model).absolute()}.model") for model in options.models])  # 3.2-1B has no suffix
    models = {name: LanguageModel(model) for name, model in zip(names, options.models, strict=True)}  # not loaded yet
    page = Page(shutil.get_terminal_size().columns, _has_colours(options))
    talks = not (options.questions or options.asked) and sys.stdin.isatty() and sys.stdout.isatty()
    asked = _talk(models, options, page) if talks else _ask_all(models, _questions(options), options)
    if options.format == "json":
        content = {"models": {name: lm.name for name, lm in models.items()}, **record(asked)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
    else:
        text = page.whole(asked)
    if options.output is not None:
        with atomic_file(options.output) as file:
            file.write_text(text + "\n", encoding="utf-8")
    elif not talks or options.format == "json":
        print(text)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lit-unlearn inspect",
        description="Asks models the same questions; shows their answers and the probability of every token.",
        epilog="Without --questions or -q, questions are typed, or piped in: one a line, up to an empty line or the end.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="model directories or hub names, such as before and after"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--questions", type=Path, metavar="FILE", help=".json, .jsonl, .csv or .parquet")
    source.add_argument("-q", dest="asked", action="append", metavar="TEXT", help="a question; may be repeated")
    parser.add_argument("--question_column", default="question", help="of the file (default: question)")
    parser.add_argument("--answer_column", help="of the file, with right answers (default: answer, if there is one)")
    parser.add_argument("--max_rows", type=int, default=10, help="only the file's first so many (default: 10)")
    parser.add_argument("--template", help="text with {question} and {answer} (default: as `data.template` has it)")
    parser.add_argument(
        "--max_length", type=int, default=512, help="of question and right answer, in tokens (default: 512)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, help="of an answer (default: 100)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="instead of bars")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="to write to, instead of printing")
    options = parser.parse_args(arguments)
    check_template(options.template)
    return options


def _has_colours(options: argparse.Namespace) -> bool:
    if options.color != "auto":
        return bool(options.color == "always")
    to_terminal = options.output is None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return to_terminal and not os.environ.get("NO_COLOR")


# Questions ------------------------------------------------------------------------------------------------------------


def _questions(options: argparse.Namespace) -> list[Question]:
    if options.asked:
        return [(question, None) for question in options.asked]
    if options.questions is not None:
        return _read(options)
    typed = [*takewhile(bool, map(str.strip, sys.stdin))]
    if not typed:
        raise ValueError("there is no question: give --questions FILE or -q TEXT, or pipe in a line for each.")
    return [(question, None) for question in typed]


def _read(options: argparse.Namespace) -> list[Question]:
    import datasets

    if not options.questions.is_file():
        raise FileNotFoundError(f"there is no file of questions '{options.questions}'.")
    datasets.disable_progress_bars()
    rows = Source(str(options.questions), max_rows=options.max_rows).load("questions")
    answer = options.answer_column or ("answer" if "answer" in rows.column_names else None)
    columns = [options.question_column, *([answer] if answer else [])]
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"'{options.questions}' has no column {', '.join(map(repr, missing))}; its columns are {rows.column_names}. "
            "Set --question_column and --answer_column."
        )
    questions = []
    for number, row in enumerate(rows.to_list()):
        texts = [row[column] for column in columns]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"row {number} of '{options.questions}' is not text: {' and '.join(columns)} are {texts}.")
        questions.append((texts[0], texts[1] if answer else None))
    return questions


# Answers --------------------------------------------------------------------------------------------------------------


def _load(lm: LanguageModel, dtype: str) -> None:
    lm.load(getattr(torch, dtype))
    lm.to("cuda" if torch.cuda.is_available() else "cpu")


def _ask(lm: LanguageModel, question: Question, number: int, options: argparse.Namespace) -> Reply:
    limits = {"max_length": options.max_length, "max_new_tokens": options.max_new_tokens}
    return ask(lm, *question, template=options.template, number=number, **limits)


def _ask_all(
    models: Mapping[str, LanguageModel], questions: Sequence[Question], options: argparse.Namespace
) -> list[Asked]:
    """Has one model after the other answer all questions, so that only one is in memory."""
    replies: list[dict[str, Reply]] = [{} for _ in questions]
    for name, lm in models.items():
        _load(lm, options.dtype)
        for number, question in enumerate(questions):
            replies[number][name] = _ask(lm, question, number, options)
        lm.model = None  # frees it
    return [Asked(*question, replies=said) for question, said in zip(questions, replies, strict=True)]


def _talk(models: Mapping[str, LanguageModel], options: argparse.Namespace, page: Page) -> list[Asked]:
    """Shows the answers to each question as soon as it is typed."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` arrow keys and a history)
    for lm in models.values():
        _load(lm, options.dtype)
    asked: list[Asked] = []
    print(f"{page.legend()}\n\nAsk {' and '.join(models)}; an empty line ends.")
    try:
        while question := input("\n> ").strip():
            replies = {name: _ask(lm, (question, None), len(asked), options) for name, lm in models.items()}
            asked.append(Asked(question, None, replies))
            print(f"\n{page.answers(asked[-1])}")
    except (EOFError, KeyboardInterrupt):
        print()
    return asked
