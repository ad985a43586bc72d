"""The rows of all sets of a data module: checked together, encoded as examples with ids, and summed up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.data.duplicates import find_duplicates, list_rows
from lit_unlearn.data.encoding import encode_row
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.data.formats import Format, Row
from lit_unlearn.data.spans import Spans
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def handle_duplicates(
    rows: dict[str, list[Row]], drops: bool, is_unlearning: bool, argument_of: Callable[[str], str]
) -> dict[str, int]:
    """Report forget rows that another set is to keep, or leave them out of that set, in place.

    Args:
        rows: The rows of every set; those of ``forget`` stay.
        drops: Whether they are left out.
        is_unlearning: Whether the run forgets one set and keeps another.
        argument_of: Gives the argument that a set comes from, for errors.

    Returns:
        The number of rows that were left out, by set; empty unless ``drops``.

    Raises:
        DataError: If every forget row is a retain row as well, or every row of a set would be left out.
    """
    forget = [row.texts for row in rows["forget"]]
    num_dropped: dict[str, int] = {}
    for name, of_set in rows.items():
        if name == "forget":
            continue
        duplicates = find_duplicates(forget, [row.texts for row in of_set])
        if drops:
            num_dropped[name] = len(duplicates.other)
            rows[name] = _drop_rows(of_set, duplicates.other, name, argument_of(name))
        elif duplicates.forget:
            shared = f"{len(duplicates.forget)} of {len(forget)}"
            if name == "retain" and len(duplicates.forget) == len(forget) and is_unlearning:
                raise DataError(
                    f"all {len(forget)} forget rows are also retain rows, so the run would be told to forget and to keep the "
                    "same: check which file is which. If the retain set has other rows, too, set `drop_duplicates` to true, or remove these.",
                    argument=argument_of(name),
                )
            rank_zero_warn(
                f"{shared} forget rows are also {name} rows, up to white space and case: the run is told to forget and to keep "
                f"them. In the {name} set they are {list_rows(duplicates.other)}; in the forget set they are "
                f"{list_rows(duplicates.forget)}. Set `drop_duplicates` to true to leave them out of the {name} set."
            )
    return num_dropped


def _drop_rows(rows: list[Row], numbers: list[int], name: str, argument: str) -> list[Row]:
    if not numbers:
        return rows
    if len(numbers) == len(rows):
        raise DataError(
            f"all {len(rows)} {name} rows are also forget rows, and `drop_duplicates` leaves none: give other {name} rows.",
            argument=argument,
        )
    dropped = set(numbers)
    rank_zero_info(
        f"data: {len(numbers)} of {len(rows)} {name} rows are also forget rows, and left out ({list_rows(numbers)}); from here "
        "on, the others are numbered without them"
    )
    return [row for number, row in enumerate(rows) if number not in dropped]


def warn_of_special_tokens(
    rows: Mapping[str, Sequence[Row]], tokenizer: PreTrainedTokenizerBase, allow_special_tokens: bool
) -> None:
    """Warn of rows with special tokens of the tokenizer, unless they are allowed as such."""
    row_text = RowText(tokenizer, allow_special_tokens)
    for name, of_set in rows.items():
        numbers = [number for number, row in enumerate(of_set) if row_text.count(row.texts)]
        if numbers:
            rank_zero_warn(
                f"{len(numbers)} of {len(of_set)} {name} rows contain special tokens of the tokenizer ({list_rows(numbers)}): they "
                "are read as text. If they are meant as control tokens, set `allow_special_tokens` to true."
            )


def encode_set(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: EncodingSettings,
    name: str,
    spans: Sequence[Spans] | None = None,
) -> list[Example]:
    """Tokenise the rows of a set.

    An example's id follows it through shuffling and packing to its reference log-probability and its record.

    Args:
        rows: Conversations and documents.
        tokenizer: As for `encode_row`.
        settings: As for `encode_row`.
        name: Name of the set, which ids begin with.
        spans: The supervised parts of every row; ``None`` for all.
    """
    examples: list[Example] = []
    cut: list[int] = []
    for number, row in enumerate(rows):
        place = f"row {number} of the {name} set"
        of_row = encode_row(row, tokenizer, settings, place, None if spans is None else spans[number])
        if any(example.is_cut for example in of_row):
            cut.append(number)
        for chunk, example in enumerate(of_row):
            ending = f"/{chunk}" if len(of_row) > 1 else ""
            examples.append(example._replace(id=f"{name}/{number}{ending}"))
    if cut:
        rank_zero_warn(
            f"{len(cut)} of {len(rows)} {name} rows are longer than `max_length` ({settings.max_length} tokens) and were "
            f"cut at the end: {list_rows(cut)}."
        )
    return examples


def digest_examples(examples: Mapping[str, Sequence[Example]]) -> str:
    """Return 16 hexadecimal digits that identify the tokens and labels of all sets, with their alternate answers."""
    digest = hashlib.sha256()
    for name in sorted(examples):
        digest.update(name.encode())
        for example in examples[name]:
            alternate = "" if example.alternate is None else example.alternate.digest()
            digest.update(f"{example.digest()}{alternate}".encode())
    return digest.hexdigest()[:16]


def summarize_examples(examples: list[Example], kind: Format) -> str:
    """Return the number of examples and tokens of a set, for the log."""
    num_tokens = sum(len(example.input_ids) for example in examples)
    num_supervised = sum(len(example.labels) - example.labels.count(IGNORED) for example in examples)
    return f"{len(examples)} examples ({kind}; {num_supervised} supervised tokens of {num_tokens})"
