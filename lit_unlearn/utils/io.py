"""Files and folders that are whole or absent, JSON, digests, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_unlearn.errors import OccupiedError, OutputError


def cache_folder() -> Path:
    """Return the folder of measurements that later runs use again: ``$LIT_UNLEARN_CACHE`` or ``~/.cache/lit_unlearn``."""
    return Path(os.environ.get("LIT_UNLEARN_CACHE") or Path.home() / ".cache" / "lit_unlearn")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the content that `write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; a half-written one never replaces a whole one."""
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a file to write, which takes the target's place when the block ends, and is removed if it fails.

    Args:
        target: Final path; its folder is created. The unfinished file has the same suffix.

    Raises:
        OutputError: If it cannot be written.
    """
    # Beside the target: a move from another disk would be a copy, which an interruption can cut.
    unfinished = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(target)
    except OSError as error:
        raise OutputError(f"'{target}' cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes ``target`` when the block ends well; a half-written one never replaces a whole one.

    Args:
        target: Final path; the folder there before stays until the new one is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        fresh, previous = Path(work) / "new", Path(work) / "old"
        fresh.mkdir()
        yield fresh

        if target.exists():
            target.rename(previous)
        try:
            fresh.rename(target)
        except OSError:
            if previous.exists():
                previous.rename(target)
            raise


def check_export_target(target: Path) -> None:
    """Raise `OccupiedError` for a target that is neither absent, nor empty, nor an earlier export."""
    if target.is_dir():
        marks = (target / "config.json", target / "adapter" / "adapter_config.json")
        is_export = any(mark.is_file() for mark in marks)
        occupied = any(target.iterdir()) and not is_export
    else:
        occupied = target.is_file()
    if occupied:
        raise OccupiedError(f"'{target}' is not empty and not a model directory: choose another place to export to.")
