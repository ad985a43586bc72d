"""Partial files: what an evaluation has measured so far, so that an interrupted one goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lit_unlearn.evaluation.results import Values
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.distributed import gather_objects, rank_and_world_size
from lit_unlearn.utils.folders import remove_if_empty
from lit_unlearn.utils.io import read_json, write_json

_START_OF_PARTIAL = re.compile(r'\{\s*"key": "')


def cut_into_parts(name: str, num_rows: int, rows_per_part: int | None) -> Iterator[tuple[str, range]]:
    """Yield the parts of a stream: the name of its partial file, and its rows."""
    if rows_per_part is None:
        yield name, range(num_rows)
        return
    for start in range(0, num_rows, rows_per_part):
        yield f"{name}-{start}", range(start, min(start + rows_per_part, num_rows))


def read_partial(file: Path | None, key: str) -> list[Values] | None:
    """Return what an interrupted evaluation of the same model on the same rows left; a collective call.

    Args:
        file: From `write_partial`; ``None`` if there is none.
        key: Digest of everything that decides the values.
    """
    content: Any = None
    if file is not None and file.is_file():
        # A crash of the machine may leave half a file.
        with suppress(ValueError):
            content = read_json(file)
    is_same = isinstance(content, dict) and content.get("key") == key
    # The first process decides for all: on several machines, only it may see the file.
    return gather_objects(content["examples"] if is_same else None)[0]


def write_partial(file: Path | None, key: str, values: list[Values]) -> None:
    """Keep values until all are measured, for `read_partial`; the first process writes."""
    if file is not None and rank_and_world_size()[0] == 0:
        write_json(file, {"key": key, "examples": values})


def remove_partials(folder: Path) -> None:
    """Remove what `write_partial` left in a folder and those below, with folders that are empty then; other files stay."""
    for file in sorted(folder.rglob("*.json")):
        if _is_partial(file):
            with suppress(OSError):
                file.unlink()
    # Those below first; one with other files in it cannot be removed.
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        remove_if_empty(below)
    remove_if_empty(folder)


def _is_partial(file: Path) -> bool:
    """Return whether `write_partial` wrote a file, or began to before the machine crashed."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    try:
        content = json.loads(text)
    except ValueError:
        return _START_OF_PARTIAL.match(text) is not None
    return isinstance(content, dict) and content.keys() == {"key", "examples"}


def describe_precision(lm: LanguageModel) -> list[str]:
    """Return the dtypes of the weights and of autocast: a model rounded otherwise has other values."""
    first = next(lm.parameters())
    autocast = torch.is_autocast_enabled(first.device.type)
    return [str(first.dtype), str(torch.get_autocast_dtype(first.device.type)) if autocast else "no autocast"]
