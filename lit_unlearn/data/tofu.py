"""TOFU: questions about fictitious authors, the standard unlearning benchmark."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source, find_local_folder
from lit_unlearn.errors import MissingFileError, arguments_of
from lit_unlearn.utils.validation import check_choice

# The retain set of each forget set: together they are the 4000 rows.
RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


class TOFU(ForgetRetain):
    """One of TOFU's three tasks: forget 1, 5 or 10 % of 200 fictitious authors and keep the others.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).

    Args:
        forget_split: ``"forget01"``, ``"forget05"`` or ``"forget10"``: 40, 200 or 400 rows; the retain set follows.
        source: Hub name, or a local folder with the files (``forget10.json``, ``retain90.json``, …).
        max_retain_rows: Number of retain rows to read, from the first one on; ``None`` for all.
        **settings: As for `ForgetRetain`, without ``forget`` and ``retain``. With an ``alternate_column``, such as
            ``perturbed_answer`` (plausible, wrong answers), the same forget rows are read from TOFU's perturbed set.

    Raises:
        MissingFileError: If a local folder lacks a file.
        ConfigError: If ``forget_split`` is unknown.
    """

    sets_argument: ClassVar[str | None] = "source"

    def __init__(
        self,
        forget_split: Literal["forget01", "forget05", "forget10"] = "forget10",
        source: str = "locuslab/TOFU",
        max_retain_rows: int | None = None,
        **settings: Any,
    ) -> None:
        check_choice(tuple(RETAIN), self, forget_split=forget_split)
        # The perturbed sets have the same rows with more columns; there is none for a retain set.
        forget = forget_split if settings.get("alternate_column") is None else f"{forget_split}_perturbed"
        with arguments_of(self):
            forget_set = tofu_source(source, forget)
            retain_set = tofu_source(source, RETAIN[forget_split], max_retain_rows)
        # Not `*sets`: jsonargparse reads in this call which arguments are left for a configuration.
        super().__init__(forget_set, retain_set, **settings)
        self.forget_split = forget_split


def tofu_source(source: str, split: str, max_rows: int | None = None) -> Source:
    """Return the source of a split: a file of a local folder, or a configuration of the hub data set.

    Raises:
        MissingFileError: If a local folder, or its file of the split, is missing.
    """
    folder = find_local_folder(source, "TOFU")
    if folder is None:
        return Source(source, name=split, max_rows=max_rows)
    file = folder / f"{split}.json"
    if not file.is_file():
        raise MissingFileError(
            f"the folder '{source}' has no '{file.name}': check `source` and the split.", argument="source"
        )
    return Source(str(file), max_rows=max_rows)
