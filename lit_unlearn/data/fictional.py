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
        unseen_authors: How many more there are in a further set "unseen", of which a model taught on the others knows
            nothing; 0 for no such set, as when one is taught.
        **settings: As for `ForgetRetain`, without ``forget`` and ``retain``.

    Raises:
        ValueError: If no author would be left to forget or to keep, or ``unseen_authors`` is negative.
    """

    def __init__(
        self,
        num_authors: int = 20,
        forget_authors: int = 2,
        authors_seed: int = 0,
        unseen_authors: int = 0,
        **settings: Any,
    ) -> None:
        if not 0 < forget_authors < num_authors:
            raise ValueError(
                f"FictionalAuthors: `forget_authors` must be at least 1 and below `num_authors` ({num_authors}), not "
                f"{forget_authors}."
            )
        if unseen_authors < 0:
            raise ValueError(f"FictionalAuthors: `unseen_authors` must be 0 or more, not {unseen_authors}.")
        if unseen_authors:
            settings["streams"] = {**(settings.get("streams") or {}), "unseen": Source("embedded")}
        super().__init__(Source("embedded"), Source("embedded"), **settings)
        kept = num_authors - forget_authors
        self._authors = {
            "retain": range(kept),
            "forget": range(kept, num_authors),
            "unseen": range(num_authors, num_authors + unseen_authors),
        }
        self._authors_seed = authors_seed

    def load_set(self, name: str) -> Dataset:
        """Generates the rows of these authors; reads a further set."""
        authors = self._authors.get(name)
        if not authors:
            return super().load_set(name)
        from datasets import Dataset

        rows = fictional_authors(authors.stop, self._authors_seed)
        return Dataset.from_list([row for row in rows if row["author"] in authors])
