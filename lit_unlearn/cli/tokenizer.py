"""``lit-unlearn tokenizer``: a small tokenizer for models made from scratch."""

from __future__ import annotations

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data import fictional_authors, muse, tofu  # noqa: F401  (imported, so that short class names resolve)
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.tokenizer import train_tokenizer


def run(arguments: list[str]) -> None:
    """Trains a byte-level BPE tokenizer on a data module's questions and answers and saves it."""
    parser = CommandParser(prog="lit-unlearn tokenizer", description=run.__doc__)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(ForgetRetain, "data", required=True)
    parser.add_argument("--vocab_size", type=int, default=4096, help="Largest number of entries.")
    parser.add_argument("--output", type=str, required=True, help="Folder to write to.")
    config = parser.parse_args(arguments)
    data = parser.instantiate(config).data
    tokenizer = train_tokenizer(data.texts(), config.vocab_size)
    tokenizer.save_pretrained(config.output)
    print(f"tokenizer: {len(tokenizer)} entries, {config.output}")
