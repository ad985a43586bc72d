"""Run ``lit-unlearn data``: show how files of rows are read, before any model is loaded."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data.duplicates import find_duplicates, list_rows
from lit_unlearn.data.encoding import encode_row
from lit_unlearn.data.encoding_settings import EncodingSettings, check_chunk_overlap, check_tokenizer
from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.data.formats import Conversation, Format, Row, RowReader, Supervise
from lit_unlearn.data.selection import Rule
from lit_unlearn.data.shown_tokens import format_example, show_tokens
from lit_unlearn.data.source import Source
from lit_unlearn.data.spans import Spans, read_spans
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.errors import LitUnlearnError
from lit_unlearn.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn data",
        description="Shows how files of rows are read: format, columns, counts and, with --tokenizer, token lengths and the first "
        "row as the model sees it, its supervised tokens in brackets. With several files, the rows that they share. Loads no model.",
    )
    parser.add_argument("files", nargs="+", type=str, metavar="FILE", help="Files of rows, or data sets on the hub.")
    parser.add_argument("--tokenizer", type=str, metavar="MODEL", help="Directory or hub name of the model.")
    parser.add_argument("--format", type=Format, default="auto", help="Of all files, where their columns mislead.")
    parser.add_argument(
        "--supervise", type=Supervise, default="all", help="Turns of a conversation that are supervised."
    )
    parser.add_argument("--question_column", type=str, default="question", help="Column with the question.")
    parser.add_argument("--answer_column", type=str, default="answer", help="Column with the answer.")
    parser.add_argument("--messages_column", type=str, default="messages", help="Column with a list of messages.")
    parser.add_argument("--text_column", type=str, default="text", help="Column with raw text.")
    parser.add_argument("--context_column", type=str, help="Column with text before raw text, which is only read.")
    parser.add_argument("--span_column", type=str, help="Column with the parts that alone are supervised.")
    parser.add_argument(
        "--where",
        type=Rule,
        help="Values by column, as of a source: each file is shown as the rows that have all of them, and those that have none.",
    )
    parser.add_argument("--template", type=str, help="Text with {question} and {answer}; by default the chat template.")
    parser.add_argument("--chat", type=Chat | None, help="Settings of the chat template, as the data has them.")
    parser.add_argument("--max_length", type=int, default=512, help="Tokens of an example.")
    parser.add_argument("--chunk_overlap", type=int, default=0, help="Tokens that a chunk of raw text repeats.")
    return parser


def run(arguments: list[str]) -> None:
    """Show every file, and what each two of them share."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    template = check_template(options.template)
    chat = parser.instantiate(options).chat
    check_chat(chat, template)
    check_chunk_overlap(options.chunk_overlap, options.max_length, parser)
    settings = EncodingSettings(template, chat, options.max_length, options.chunk_overlap)
    reader = RowReader(
        options.format,
        options.supervise,
        options.question_column,
        options.answer_column,
        options.messages_column,
        options.text_column,
        options.context_column,
    )
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        check_tokenizer(tokenizer)

    sets: dict[str, list[Row]] = {}
    sources = _list_sources(options.files, options.where)
    for title, source in sources.items():
        name = Path(title).name
        table = source.load(name, argument="files")
        sets[title] = reader.read(table, name)
        has_spans = options.span_column in table.column_names
        spans = read_spans(table, sets[title], options.span_column, name) if has_spans else None
        print(
            f"{title}: {len(table)} rows, format {reader.recognize(table.column_names)}, columns {table.column_names}"
        )
        for line in _describe_rows(sets[title], spans, tokenizer, settings, name):
            print(f"  {line}")
    if options.where is not None:
        for file in options.files:
            if left_out := _count_left_out(sources[f"{file} (chosen)"], sources[f"{file} (where_not)"]):
                print(f"{file}: {left_out} rows are in neither set, because only some of the columns match")
    for first, second in combinations(sets, 2):
        print(_describe_overlap(first, second, sets))


def _list_sources(files: Sequence[str], where: Rule | None) -> dict[str, Source]:
    """Return by title the rows that are shown."""
    sources = {}
    for file in files:
        if where is None:
            sources[file] = Source(file)
        else:
            sources[f"{file} (chosen)"] = Source(file, where=where)
            sources[f"{file} (where_not)"] = Source(file, where_not=where)
    return sources


def _count_left_out(chosen: Source, others: Source) -> int:
    """Return how many rows of a file are in neither of two sets that have been read."""
    counts = [source.counts or {} for source in (chosen, others)]
    return counts[0]["rows_read"] - sum(count["rows_chosen"] for count in counts)


def _describe_rows(
    rows: Sequence[Row],
    spans: Sequence[Spans] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: EncodingSettings,
    name: str,
) -> Iterator[str]:
    conversations = [row for row in rows if isinstance(row, Conversation)]
    if conversations:
        turns = sum(len(row.supervised) for row in conversations)
        yield f"{turns} supervised turns in {len(conversations)} conversations"
    if tokenizer is None:
        yield _describe_lengths("characters", [sum(map(len, row.texts)) for row in rows])
        yield "give --tokenizer MODEL to see tokens"
        return

    examples: list[Example] = []
    refused: list[str] = []
    num_cut = 0
    for number, row in enumerate(rows):
        try:
            of_row = encode_row(row, tokenizer, settings, f"row {number} of {name}", spans[number] if spans else None)
        except LitUnlearnError as error:
            refused.append(str(error))
            continue
        num_cut += any(example.is_cut for example in of_row)
        examples += of_row
    if examples:
        lengths = [len(example.input_ids) for example in examples]
        supervised = [len(example.labels) - example.labels.count(IGNORED) for example in examples]
        yield f"{len(examples)} examples; {_describe_lengths('tokens', lengths)}"
        yield _describe_lengths("supervised tokens", supervised)
    if num_cut:
        yield f"{num_cut} rows are longer than --max_length ({settings.max_length} tokens), and are cut at the end"
    if refused:
        yield f"{len(refused)} rows cannot be used; the first: {refused[0]}"
    if examples:
        yield f"the first example: {format_example(show_tokens(examples[0], tokenizer))}"


def _describe_lengths(what: str, lengths: Sequence[int]) -> str:
    return f"{what}: {sum(lengths)} in all; {min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}"


def _describe_overlap(first: str, second: str, sets: dict[str, list[Row]]) -> str:
    duplicates = find_duplicates([row.texts for row in sets[first]], [row.texts for row in sets[second]])
    if not duplicates.forget:
        return f"{first} and {second} share no row"
    return (
        f"{first} and {second} share rows, up to white space and case: {len(duplicates.forget)} of {first} "
        f"({list_rows(duplicates.forget)}), {len(duplicates.other)} of {second} ({list_rows(duplicates.other)})"
    )
