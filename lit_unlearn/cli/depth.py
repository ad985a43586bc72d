"""Run ``lit-unlearn depth``: the Unlearning Depth Score of a model, as a table by layer and a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from lit_unlearn.cli.main import print_warning
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.formats import RowReader
from lit_unlearn.data.source import Source
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.evaluation.depth import UnlearningDepth, summarize_layers
from lit_unlearn.evaluation.results import Results, is_results_file
from lit_unlearn.evaluation.tables import TableStyle, format_table
from lit_unlearn.metrics.depth import KNOWLEDGE_THRESHOLD
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.io import check_output_file

# Columns of the table by layer, beside the layer's number.
_COLUMNS = {
    "retain_drop": "drop, retain-only",
    "unlearned_drop": "drop, unlearned",
    "with_knowledge": "with knowledge",
    "erased": "erased",
    "lens_erased": "erased, lens",
}


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn depth",
        description="Scores how deep unlearning went, from 0 (the target model) to 1 (the retain-only model): hidden states of the "
        "model replace those of the target model, layer by layer. Prints a table; --output writes a results file.",
    )
    parser.add_argument("model", type=str, metavar="MODEL", help="The unlearned model: a directory, or a hub name.")
    parser.add_argument("--target", type=str, required=True, metavar="MODEL", help="The model before unlearning.")
    parser.add_argument(
        "--retain_only", type=str, required=True, metavar="MODEL", help="The model trained without the forget set."
    )
    parser.add_argument("--rows", type=str, required=True, metavar="FILE", help="Forget rows with their spans.")
    parser.add_argument("--span_column", type=str, default="entity", help="Column with the facts in every answer.")
    parser.add_argument("--question_column", type=str, default="question", help="Column with the question.")
    parser.add_argument("--answer_column", type=str, default="answer", help="Column with the answer.")
    parser.add_argument("--max_rows", type=int, help="Only this many rows.")
    parser.add_argument(
        "--threshold",
        type=float,
        default=KNOWLEDGE_THRESHOLD,
        help="Drop above which a layer holds knowledge, nats per token.",
    )
    parser.add_argument("--template", type=str, help="Text with {question} and {answer}; by default the chat template.")
    parser.add_argument("--chat", type=Chat | None, help="Settings of the chat template, as the data has them.")
    parser.add_argument("--max_length", type=int, default=512, help="Tokens of an example.")
    parser.add_argument("--token_budget", type=int, default=8192, help="Tokens of the largest batch.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Of the weights."
    )
    parser.add_argument("--format", type=Literal["text", "markdown", "csv"], default="text", help="Of the tables.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Results file to write.")
    return parser


def run(arguments: list[str]) -> None:
    """Measure a model and print its scores."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.output is not None:
        check_output_file(options.output, argument="output", is_ours=is_results_file)
    template = check_template(options.template)
    chat = parser.instantiate(options).chat
    check_chat(chat, template)
    depth = UnlearningDepth(
        options.span_column,
        options.threshold,
        RowReader(supervise="last", question_column=options.question_column, answer_column=options.answer_column),
        EncodingSettings(template, chat, options.max_length),
        options.token_budget,
    )
    unlearned = LanguageModel(options.model)
    description = {} if unlearned.files is None else unlearned.files.describe_export()
    results = depth.run(
        LanguageModel(options.target),
        LanguageModel(options.retain_only),
        unlearned,
        Source(options.rows, max_rows=options.max_rows),
        getattr(torch, options.dtype),
    )
    results.model.update(description)
    if options.output is not None:
        results.write(options.output)
    for name, reason in results.missing.items():
        print_warning(f"{name} is missing: {reason}.")
    print(format_results(results, options.format))


def format_results(results: Results, style: TableStyle = "text") -> str:
    """Format the scores, and below them the means of every layer; ``style`` is as for `format_table`."""
    scores = [[name, results.aggregate.get(name)] for name in (*results.missing, *results.aggregate)]
    layers = []
    for number, values in enumerate(summarize_layers(results), 1):
        layers.append([str(number), *(values[column] for column in _COLUMNS)])
    model = results.model["name"] or "unlearned"
    tables = [
        format_table(scores, ["", Path(model).name], style),
        format_table(layers, ["layer", *_COLUMNS.values()], style),
    ]
    return "\n\n".join(tables)
