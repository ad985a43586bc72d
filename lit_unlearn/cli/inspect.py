"""Run ``lit-unlearn inspect``: models answer the same questions side by side, with the probability of every token."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import dropwhile, groupby, takewhile
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lit_unlearn.cli.compare import shorten_names
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.files import describe_kind
from lit_unlearn.data.formats import Conversation, RowReader
from lit_unlearn.data.source import Source
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.errors import ConfigError, DataError, MissingFileError, StoppedBySignal
from lit_unlearn.evaluation.inspection import Answer, Asked, ask_model, describe_replies, mean_scores
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.io import atomic_file

# With its right answer, where that is known. What a conversation asks is all that stands before its last turn.
Question = tuple[str | Conversation, str | None]
# A character, and the eighth that the probability of its token is in.
Cell = tuple[str, int]

# For a token's probability, in eighths.
_BARS = "▁▂▃▄▅▆▇█"
# The same on a terminal of 256 colours: orange to blue, which no colour-blindness confuses.
_COLOURS = (166, 208, 215, 223, 195, 153, 75, 32)
_END_MARK, _EXACT_MARK = "∎", "✓"
_BOLD, _RESET = "\x1b[1m", "\x1b[0m"


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn inspect",
        description="Asks models the same questions; shows their answers and the probability of every token.",
        epilog="Without --questions or -q, questions are typed, or piped in: one a line, up to an empty line or the end.",
    )
    parser.add_argument(
        "models", nargs="+", type=str, metavar="MODEL", help="Model directories or hub names, such as before and after."
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="A .json, .jsonl, .csv or .parquet file.")
    parser.add_argument("-q", dest="question", action="append", metavar="TEXT", help="A question; may be repeated.")
    parser.add_argument("--question_column", type=str, default="question", help="Column of the file.")
    parser.add_argument("--answer_column", type=str, help="Column with right answers; `answer`, if there is one.")
    parser.add_argument("--max_rows", type=int, default=10, help="Only this many rows of the file.")
    parser.add_argument(
        "--template",
        type=str,
        help="Text with {question} and {answer}, in which \\n is a line break; by default the tokenizer's chat template.",
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
    return parser


def run(arguments: list[str]) -> None:
    """Ask every model the same questions and show the answers."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.questions and options.question:
        parser.error("give either --questions or -q, not both")
    template = check_template(options.template)
    chat = parser.instantiate(options).chat
    check_chat(chat, template)
    encoding = EncodingSettings(template, chat, options.max_length, allow_special_tokens=options.allow_special_tokens)

    # In a directory's name such as Llama-3.2-1B, ".2-1B" is no suffix: a real one is added, for `shorten_names` to cut off.
    files = [Path(f"{Path(model).absolute()}.model") for model in options.models]
    models = {name: LanguageModel(model) for name, model in zip(shorten_names(files), options.models, strict=True)}

    page = AnswerPage(shutil.get_terminal_size().columns, _use_colours(options))
    is_dialogue = not (options.questions or options.question) and sys.stdin.isatty() and sys.stdout.isatty()
    if is_dialogue:
        answered = _answer_typed_questions(models, options, encoding, page)
    else:
        answered = _answer_questions(models, _read_questions(options), options, encoding)

    if options.format == "json":
        content = {"models": {name: lm.name for name, lm in models.items()}, **describe_replies(answered)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
    else:
        text = page.format_page(answered)
    if options.output is not None:
        with atomic_file(options.output) as file:
            file.write_text(text + "\n", encoding="utf-8")
    elif not is_dialogue or options.format == "json":
        print(text)


def _use_colours(options: Namespace) -> bool:
    if options.color != "auto":
        return bool(options.color == "always")
    to_terminal = options.output is None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return to_terminal and not os.environ.get("NO_COLOR")


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


def _load_model(lm: LanguageModel, dtype: str) -> None:
    lm.load(getattr(torch, dtype))
    lm.to("cuda" if torch.cuda.is_available() else "cpu")


def _answer_questions(
    models: Mapping[str, LanguageModel],
    questions: Sequence[Question],
    options: Namespace,
    encoding: EncodingSettings,
) -> list[Asked]:
    answered = []
    for question, right in questions:
        text = question.question if isinstance(question, Conversation) else question
        answered.append(Asked(text, right, replies={}))
    # One model after the other answers all questions, so that only one is in memory.
    for name, lm in models.items():
        _load_model(lm, options.dtype)
        for number, (question, right) in enumerate(questions):
            answered[number].replies[name] = ask_model(
                lm, question, right, encoding=encoding, max_new_tokens=options.max_new_tokens, number=number
            )
        lm.model = None
    return answered


def _answer_typed_questions(
    models: Mapping[str, LanguageModel], options: Namespace, encoding: EncodingSettings, page: AnswerPage
) -> list[Asked]:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` arrow keys and a history)
    for lm in models.values():
        _load_model(lm, options.dtype)
    answered: list[Asked] = []
    print(f"{page.format_legend()}\n\nAsk {' and '.join(models)}; an empty line ends.")
    try:
        while question := input("\n> ").strip():
            replies = {}
            for name, lm in models.items():
                replies[name] = ask_model(
                    lm, question, encoding=encoding, max_new_tokens=options.max_new_tokens, number=len(answered)
                )
            # Only now: Ctrl-C may have come between two models, and then the question does not count.
            answered.append(Asked(question, None, replies))
            print(f"\n{page.format_answers(answered[-1])}")
    except StoppedBySignal:
        raise  # unlike Ctrl-C, it is no way to end the questions
    except (EOFError, KeyboardInterrupt):
        print()
    return answered


# The page -------------------------------------------------------------------------------------------------------------


class AnswerPage(NamedTuple):
    """Answers for a terminal: every token above a bar as high as its probability, or on a colour for it.

    Args:
        width: Of a line, in characters.
        coloured: Whether the terminal shows 256 colours.
    """

    width: int
    coloured: bool

    def format_page(self, answered: Sequence[Asked]) -> str:
        """Return all questions with their answers and, where there are right ones, the means over all."""
        blocks = [self.format_legend(any(question.answer is not None for question in answered))]
        for question in answered:
            text = textwrap.fill(_make_printable(question.question), self.width)
            blocks.append(f"{_BOLD}{text}{_RESET}" if self.coloured else text)
            blocks.append(self.format_answers(question))
        if means := mean_scores(answered):
            rows = []
            for name, mean in means.items():
                rows.append([name, f"{mean['probability']:.3g}", f"{mean['exact']:.0%}"])
            blocks.append(format_table(rows, [f"questions: {len(answered)}", "answer probability", "exact answers"]))
        return "\n\n".join(blocks)

    def format_legend(self, right: bool = False) -> str:
        """Return what the signs mean, also those beside ``right`` answers."""
        scale = "".join(_paint_text(" ", level) for level in range(8)) if self.coloured else _BARS
        signs = f"probability of each token: 0 {scale} 1   {_END_MARK} end of the answer"
        if not right:
            return signs
        return f"{signs}   {_EXACT_MARK} the right one\nright: the right answer, and its answer probability"

    def format_answers(self, answered: Asked) -> str:
        """Return each model's answer and, where that is not the right one, how probable it finds the right one."""
        name_width = max(map(len, answered.replies)) + 2
        lines: list[str] = []
        for name, reply in answered.replies.items():
            label = f"{name:<{name_width}}"
            if not reply.exact:
                lines += self._format_answer(f"{label}{'says':<{6 if reply.expected is None else 15}}", reply.generated)
                label = " " * name_width
            if reply.expected is not None:
                kind = f"says {_EXACT_MARK}" if reply.exact else "right"
                lines += self._format_answer(f"{label}{kind:<6} {reply.expected.probability:<8.2g}", reply.expected)
        return "\n".join(lines)

    def _format_answer(self, label: str, answer: Answer) -> Iterator[str]:
        indent = f"  {label}"
        for cells in _wrap_cells(_answer_cells(answer), max(self.width - len(indent), 20)):
            text = "".join(char for char, _ in cells)
            if self.coloured:
                painted = ""
                for level, run_of_cells in groupby(cells, key=lambda cell: cell[1]):
                    painted += _paint_text("".join(char for char, _ in run_of_cells), level)
                yield indent + painted
            else:
                yield indent + text
                yield " " * len(indent) + "".join(_BARS[level] for _, level in cells)
            indent = " " * len(indent)


def _answer_cells(answer: Answer) -> list[Cell]:
    tokens = [*answer.tokens[:-1], _END_MARK if answer.ended else f"{answer.tokens[-1]}…"]
    cells: list[Cell] = []
    for token, probability in zip(tokens, answer.probabilities, strict=True):
        level = min(int(8 * probability), 7)
        cells += [(char, level) for char in _make_printable(token)]
    return list(dropwhile(lambda cell: cell[0] == " ", cells))


def _wrap_cells(cells: list[Cell], width: int) -> Iterator[list[Cell]]:
    # textwrap knows texts only; here every character brings its token's probability along.
    while len(cells) > width:
        space = next((i for i in range(width, 0, -1) if cells[i][0] == " "), None)
        yield cells[: space or width]
        cells = cells[space + 1 if space else width :]
    yield cells


def _paint_text(text: str, level: int) -> str:
    return f"\x1b[38;5;16;48;5;{_COLOURS[level]}m{text}{_RESET}"


def _make_printable(text: str) -> str:
    # Control characters in a model's answer would steer the terminal.
    return "".join(char if char.isprintable() else "\ufffd" for char in text.replace("\n", "↵"))
