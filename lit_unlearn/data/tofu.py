"""TOFU: questions about fictitious authors, the standard unlearning benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source

RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


class TOFU(ForgetRetain):
    """One of TOFU's three tasks: forget 1, 5 or 10 % of 200 fictitious authors and keep the others.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).

    Args:
        forget_split: ``"forget01"``, ``"forget05"`` or ``"forget10"``: 40, 200 or 400 rows; the retain set follows.
        source: Hub name, or a local folder with the files (``forget10.json``, ``retain90.json``, …).
        max_retain_rows: Only the first so many retain rows; ``None`` for all.
        **settings: As for `ForgetRetain`, without ``forget`` and ``retain``. With an ``alternate_column``, such as
            ``perturbed_answer`` (plausible, wrong answers), the same forget rows are read from TOFU's perturbed set.

    Raises:
        FileNotFoundError: If a local folder lacks a file.
        ValueError: If ``forget_split`` is unknown.
    """

    def __init__(
        self,
        forget_split: Literal["forget01", "forget05", "forget10"] = "forget10",
        source: str = "locuslab/TOFU",
        max_retain_rows: int | None = None,
        **settings: Any,
    ) -> None:
        if forget_split not in RETAIN:
            raise ValueError(f"TOFU: `forget_split` must be one of {', '.join(RETAIN)}, not {forget_split!r}.")
        forget = forget_split if settings.get("alternate_column") is None else f"{forget_split}_perturbed"
        super().__init__(
            tofu_source(source, forget), tofu_source(source, RETAIN[forget_split], max_retain_rows), **settings
        )


def tofu_source(source: str, split: str, max_rows: int | None = None) -> Source:
    """Where a split is: in a local folder, or on the hub.

    Raises:
        FileNotFoundError: If a local folder, or its file of the split, is missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise FileNotFoundError(f"there is no folder '{source}' with TOFU's files: check `data.source`.")
        return Source(source, name=split, max_rows=max_rows)
    file = folder / f"{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"the folder '{source}' has no '{file.name}': check `data.source` and `data.forget_split`."
        )
    return Source(str(file), max_rows=max_rows)
