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


def write_rows(
    tofu: str, folder: Path, selection: Selection, entities: str | None = None, max_entities: int = 10
) -> None:
    """Write the rows of every forget set, unless they are there.

    Of each size there is ``<size>/forget10_perturbed.json`` and ``<size>/retain.jsonl``, which together are the rows of the target
    model, and what TOFU's benchmark measures beside the forget set. All sizes share ``unseen.jsonl``, ``holdout.jsonl`` and
    ``general.jsonl``, on which no model is trained.

    Args:
        tofu: Folder with TOFU's files, or its name on the hub.
        folder: Folder to write.
        selection: The rows to take.
        entities: File with the entity in each answer of ``forget10``, for the Unlearning Depth Score; ``None`` for none.
        max_entities: Rows with an entity to take of each forget set, spread over it; ``None`` for all.

    Raises:
        MissingFileError: If a file is not there.
    """
    from lit_unlearn.data.source import Source
    from lit_unlearn.data.tofu import tofu_source

    def read(split: str) -> list[Row]:
        return tofu_source(tofu, split).load(split, argument="source").to_list()

    last = folder / "general.jsonl"
    if not last.is_file():
        first_authors, last_authors = read("retain90"), read("forget10_perturbed")
        kept = selection.authors - max(selection.sizes)
        aside = selection.aside * ROWS_PER_AUTHOR
        files: dict[str, list[Row]] = {}
        if aside:
            files["unseen.jsonl"] = first_authors[-2 * aside : -aside]
            files["holdout.jsonl"] = first_authors[-aside:]
        else:
            # Not every copy of TOFU has it.
            with suppress(MissingFileError):
                files["holdout.jsonl"] = read("holdout10")
        others = {f"{name}_perturbed.json": read(f"{name}_perturbed") for name in ("real_authors", "world_facts")}
        # TOFU's retain_perturbed has its first twenty authors.
        others["retain_perturbed.json"] = read("retain_perturbed")[: kept * ROWS_PER_AUTHOR]
        for size in selection.sizes:
            forget = last_authors[-size * ROWS_PER_AUTHOR :]
            not_forgotten = last_authors[-max(selection.sizes) * ROWS_PER_AUTHOR : -size * ROWS_PER_AUTHOR]
            files[f"{size}/forget10_perturbed.json"] = forget
            files[f"{size}/retain.jsonl"] = keep_pairs([*first_authors[: kept * ROWS_PER_AUTHOR], *not_forgotten])
            for name, rows in others.items():
                files[f"{size}/{name}"] = spread(rows, selection.measured)
        for name, rows in files.items():
            write_json_lines(folder / name, rows)
        # Written last, so that an interruption is noticed.
        write_json_lines(
            last, keep_pairs([*others["real_authors_perturbed.json"], *others["world_facts_perturbed.json"]])
        )

    if entities is not None:
        with_entity = Source(entities).load("entities", argument="entities").to_list()
        last_authors = read("forget10")
        for size in selection.sizes:
            questions = {row["question"] for row in last_authors[-size * ROWS_PER_AUTHOR :]}
            of_size = [{key: row[key] for key in ("question", "answer", "entity")} for row in with_entity]
            of_size = [row for row in of_size if row["question"] in questions]
            write_json_lines(folder / str(size) / "entities.jsonl", spread(of_size, max_entities))


def keep_pairs(rows: Sequence[Row]) -> list[Row]:
    """Return the questions and answers of rows, without other columns."""
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def spread(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Return this many rows at equal distances: the rows of an author stand together, and the first ones would be of one author.

    Example:
        >>> [row["n"] for row in spread([{"n": number} for number in range(7)], 3)]
        [0, 2, 4]
    """
    if count is None or count >= len(rows):
        return [*rows]
    return [*rows[:: len(rows) // count]][:count]
