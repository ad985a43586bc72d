"""TOFU's rows for the sweeps on real models: a folder with TOFU's file names for each forget set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.results_files import write_json_lines
from lit_unlearn.errors import MissingFileError

ROWS_PER_AUTHOR = 20
Row = dict[str, Any]


class Selection(NamedTuple):
    """Which rows of TOFU a grid takes.

    Args:
        authors: Number of authors that a target model is fine-tuned on, from TOFU's first ones and its last ones.
        sizes: Numbers of authors to forget, ascending; they are TOFU's last ones.
        aside: Number of authors in each of two sets that no model is fine-tuned on; 0 for TOFU's holdout10 in place of one.
        measured: Rows that are measured of each set but the forget set, spread over it; ``None`` for all.
    """

    authors: int
    sizes: tuple[int, ...]
    aside: int
    measured: int | None


def write_rows(tofu: str, folder: Path, selection: Selection) -> None:
    """Write the rows of every forget set, unless they are there.

    Of each size there is ``<size>/forget10_perturbed.json`` and ``<size>/retain.jsonl``, which together are the rows of the target
    model, and what TOFU's benchmark measures beside the forget set. All sizes share ``unseen.jsonl``, ``holdout.jsonl`` and
    ``general.jsonl``, on which no model is trained.

    Args:
        tofu: Folder with TOFU's files, or its name on the hub.
        folder: Folder to write.
        selection: The rows to take.

    Raises:
        MissingFileError: If a file is not there.
    """
    # Written last, so that an interruption is noticed.
    last = folder / "general.jsonl"
    if last.is_file():
        return
    first_authors, last_authors = _read(tofu, "retain90"), _read(tofu, "forget10_perturbed")
    aside = selection.aside * ROWS_PER_AUTHOR
    files: dict[str, list[Row]] = {}
    if aside:
        files["unseen.jsonl"] = first_authors[-2 * aside : -aside]
        files["holdout.jsonl"] = first_authors[-aside:]
    else:
        # Not every copy of TOFU has it.
        with suppress(MissingFileError):
            files["holdout.jsonl"] = _read(tofu, "holdout10")

    # No forget set has more than the largest, and all others are retained by every size.
    num_retained = (selection.authors - max(selection.sizes)) * ROWS_PER_AUTHOR
    measured = {
        "real_authors_perturbed": _read(tofu, "real_authors_perturbed"),
        "world_facts_perturbed": _read(tofu, "world_facts_perturbed"),
        # It has TOFU's first twenty authors.
        "retain_perturbed": _read(tofu, "retain_perturbed")[:num_retained],
    }
    for size in selection.sizes:
        num_forgotten = size * ROWS_PER_AUTHOR
        not_forgotten = last_authors[-max(selection.sizes) * ROWS_PER_AUTHOR : -num_forgotten]
        files[f"{size}/forget10_perturbed.json"] = last_authors[-num_forgotten:]
        files[f"{size}/retain.jsonl"] = keep_columns([*first_authors[:num_retained], *not_forgotten])
        for name, rows in measured.items():
            files[f"{size}/{name}.json"] = spread(rows, selection.measured)
    for name, rows in files.items():
        write_json_lines(folder / name, rows)
    general = [*measured["real_authors_perturbed"], *measured["world_facts_perturbed"]]
    write_json_lines(last, keep_columns(general))


def write_entities(tofu: str, folder: Path, selection: Selection, file: str, max_rows: int | None) -> None:
    """Write ``<size>/entities.jsonl``, rows of every forget set with the entity in their answers.

    Args:
        tofu: As for `write_rows`, like the following.
        folder: As there.
        selection: As there.
        file: Has the entities of ``forget10`` in the column ``entity``.
        max_rows: Rows to take of each forget set, spread over it; ``None`` for all.

    Raises:
        MissingFileError: If a file is not there.
    """
    from lit_unlearn.data.source import Source

    with_entity = Source(file).load("entities", argument="entities").to_list()
    last_authors = _read(tofu, "forget10_perturbed")
    for size in selection.sizes:
        questions = [row["question"] for row in last_authors[-size * ROWS_PER_AUTHOR :]]
        of_size = [row for row in with_entity if row["question"] in questions]
        rows = keep_columns(spread(of_size, max_rows), ("question", "answer", "entity"))
        write_json_lines(folder / str(size) / "entities.jsonl", rows)


def _read(tofu: str, split: str) -> list[Row]:
    from lit_unlearn.data.tofu import tofu_source

    rows: list[Row] = tofu_source(tofu, split).load(split, argument="source").to_list()
    return rows


def keep_columns(rows: Sequence[Row], columns: Sequence[str] = ("question", "answer")) -> list[Row]:
    """Return rows without other columns than these."""
    kept = []
    for row in rows:
        kept.append({column: row[column] for column in columns})
    return kept


def spread(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Return this many rows at equal distances: the rows of an author stand together, and the first ones would be of one author.

    Example:
        >>> [row["n"] for row in spread([{"n": number} for number in range(7)], 3)]
        [0, 2, 4]
    """
    if count is None or count >= len(rows):
        return [*rows]
    return [*rows[:: len(rows) // count]][:count]
