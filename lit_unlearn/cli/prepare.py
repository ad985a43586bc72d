"""Run ``lit-unlearn prepare``: rows that a user does not have, made with a model and written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data.source import Rows, to_source
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.models import LanguageModel
from lit_unlearn.prepare import Ask, Prepared, ask_with, make_alternates, make_paraphrases, make_retain, make_unseen
from lit_unlearn.prepare.rows import Row
from lit_unlearn.utils.io import atomic_file, check_output_file

Kind = Literal["alternates", "retain", "unseen", "paraphrases"]

# How a file of each kind is used, for the line that names it.
_USES = {
    "alternates": "give it as the forget set, with --data.alternate_column=alternate",
    "retain": "give it as --data.retain",
    "unseen": "give it as --data.streams='{unseen: FILE}'",
    "paraphrases": "give it as the forget set of a StressBenchmark with `paraphrased: true`",
}


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn prepare",
        description="Makes rows from the forget set with a model, and writes them as JSON lines. Read and edit them before use.",
        epilog="alternates: other answers to the forget questions. retain: the model's own answers to general prompts, and the "
        "training rows nearest to the forget set. unseen: rows in the manner of the forget rows, about invented names. "
        "paraphrases: the forget questions in other words.",
    )
    parser.add_argument("kind", type=Kind, metavar="KIND", help="alternates, retain, unseen or paraphrases.")
    parser.add_argument(
        "--model", type=str, required=True, help="Model directory or hub name, such as the target model."
    )
    parser.add_argument(
        "--forget",
        type=Rows,
        required=True,
        metavar="FILE",
        help="The forget set, or with --forget.path=FILE --forget.where='{COLUMN: VALUE}' the rows that it is.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="A .jsonl file that is not there yet."
    )
    parser.add_argument(
        "--training", type=Rows | None, metavar="FILE", help="For retain: rows that the model was trained on."
    )
    parser.add_argument("--question_column", type=str, default="question", help="Column with the question.")
    parser.add_argument("--answer_column", type=str, default="answer", help="Column with the answer.")
    parser.add_argument(
        "--count",
        type=Literal[0, 1, 2, 3, 4],
        default=1,
        help="For alternates: answers per row, at most 4; 0: the model's own answer to the question alone.",
    )
    parser.add_argument(
        "--max_prompts", type=NonNegativeInt | None, help="For retain: only this many of the general prompts."
    )
    parser.add_argument(
        "--max_neighbours", type=NonNegativeInt, default=200, help="For retain: only this many training rows."
    )
    parser.add_argument("--template", type=str, help="Text with {question} and {answer}; by default that of the model.")
    parser.add_argument("--chat", type=Chat | None, help="Settings of the chat template, as the data has them.")
    parser.add_argument("--max_new_tokens", type=PositiveInt, default=200, help="Tokens of an answer.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything that is drawn.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Of the weights."
    )
    return parser


def run(arguments: list[str]) -> None:
    """Make the rows, write them, and say how many were left out."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = parser.instantiate(options)
    check_chat(given.chat, check_template(options.template))
    if options.output.suffix not in (".jsonl", ".ndjson"):
        message = f"--output is '{options.output}', but JSON lines are written: give a name that ends in .jsonl."
        raise ConfigError(message)
    # Somebody may have edited one that is there.
    check_output_file(options.output, argument="output", is_ours=lambda _: False)
    forget = _read_rows(given.forget, "forget")
    training = [] if given.training is None else _read_rows(given.training, "training")

    lm = LanguageModel(options.model)
    lm.load(getattr(torch, options.dtype))
    ask = ask_with(lm, options.max_new_tokens, options.template, given.chat)
    prepared = _prepare(options, ask, forget, training)
    # An empty file would be in the way of the next try, and no set.
    if not prepared.rows:
        reasons = [f"{number} × {reason}" for reason, number in sorted(prepared.counts.items())]
        raise DataError(
            f"there are no {options.kind} to write: {', '.join(reasons)}. Give another model or other rows."
        )
    with atomic_file(options.output, may_replace=False) as file, file.open("w", encoding="utf-8") as lines:
        for row in prepared.rows:
            # A Parquet file may have dates, which JSON has not.
            lines.write(f"{json.dumps(row, ensure_ascii=False, default=str)}\n")
    print(f"{options.kind}: {len(prepared.rows)} rows, {options.output}")
    for reason, number in sorted(prepared.counts.items()):
        print(f"{number:>5} × {reason}")
    print(f"read and edit them, then {_USES[options.kind]}")


def _read_rows(rows: Rows, name: str) -> list[Row]:
    return [dict(row) for row in to_source(rows, name).load(name)]


def _prepare(options: Namespace, ask: Ask, forget: list[Row], training: list[Row]) -> Prepared:
    columns = {"question_column": options.question_column, "answer_column": options.answer_column}
    if options.kind == "alternates":
        return make_alternates(ask, forget, **columns, count=options.count, seed=options.seed)
    if options.kind == "unseen":
        return make_unseen(ask, forget, **columns, seed=options.seed)
    if options.kind == "paraphrases":
        return make_paraphrases(ask, forget, **columns, seed=options.seed)
    return make_retain(
        ask,
        forget,
        training,
        **columns,
        max_prompts=options.max_prompts,
        max_neighbours=options.max_neighbours,
        seed=options.seed,
    )
