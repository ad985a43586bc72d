"""The embedded data: made-up authors in TOFU's columns, for a run without downloads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.fictional_authors import fictional_authors
from lit_unlearn.data.source import Source

if TYPE_CHECKING:
    from datasets import Dataset


class FictionalAuthors(ForgetRetain):
    """Questions about made-up authors, generated from a seed: the last authors are to be forgotten, the others kept.

    Args:
        num_authors: Authors in all; each has ten questions.
        forget_authors: How many of them to forget.
        authors_seed: Of the generator.
        **settings: As for `ForgetRetain`, without ``forget`` and ``retain``.

    Raises:
        ValueError: If no author would be left to forget or to keep.
    """

    def __init__(self, num_authors: int = 20, forget_authors: int = 2, authors_seed: int = 0, **settings: Any) -> None:
        if not 0 < forget_authors < num_authors:
            raise ValueError(
                f"FictionalAuthors: `forget_authors` must be at least 1 and below `num_authors` ({num_authors}), not "
                f"{forget_authors}."
            )
        super().__init__(Source("embedded"), Source("embedded"), **settings)
        self._authors = (num_authors, forget_authors, authors_seed)

    def load_set(self, name: str) -> Dataset:
        """Generates the rows to forget or to keep; reads a further set."""
        if name not in ("forget", "retain"):
            return super().load_set(name)
        from datasets import Dataset

        num_authors, forget_authors, seed = self._authors
        kept = num_authors - forget_authors
        rows = fictional_authors(num_authors, seed)
        return Dataset.from_list([row for row in rows if (row["author"] >= kept) == (name == "forget")])
