"""Run ``lit-unlearn tokenizer``: a small tokenizer for models made from scratch."""

from __future__ import annotations

from pathlib import Path

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data import fictional_authors, lume, muse, tofu  # noqa: F401  (imported, so that short class names resolve)
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.tokenizer import train_tokenizer
from lit_unlearn.utils.folders import check_export_target, replace_folder


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn tokenizer",
        description="Trains a byte-level BPE tokenizer on a data module's questions and answers and saves it.",
    )
    parser.add_argument("--config", action="config", help="A YAML file with these options.")
    parser.add_subclass_arguments(ForgetRetain, "data", required=True)
    parser.add_argument("--vocab_size", type=int, default=4096, help="Largest number of vocabulary entries.")
    parser.add_argument(
        "--output", type=Path, required=True, help="Folder to write; an earlier tokenizer there is replaced."
    )
    return parser


def run(arguments: list[str]) -> None:
    """Train a tokenizer and save it."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    # Before the rows are read.
    check_export_target(options.output)
    data = parser.instantiate(options).data
    tokenizer = train_tokenizer(data.texts(), options.vocab_size)
    with replace_folder(options.output) as folder:
        tokenizer.save_pretrained(folder)
    print(f"tokenizer: {len(tokenizer)} entries, {options.output}")
