"""Files and folders that are whole or absent, JSON, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def file_digest(path: Path) -> str:
    """The sha256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_export_target(target: Path) -> None:
    """Refuses to replace anything but an empty directory or an earlier export."""
    if not target.is_dir():
        taken = target.is_file()
    else:
        marks = (target / "config.json", target / "adapter" / "adapter_config.json")
        taken = any(target.iterdir()) and not any(mark.is_file() for mark in marks)
    if taken:
        raise FileExistsError(f"'{target}' is not empty and not a model directory: choose another place to export to.")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A new folder that becomes ``target`` when the block ends well; a half-written one never replaces a whole one.

    Args:
        target: Final place; what is there before stays until the new folder is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        fresh, old = Path(work) / "new", Path(work) / "old"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file; a half-written one never replaces a whole one."""
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A file that takes the target's place once it is written, and is gone if that fails.

    Args:
        target: Final place; its folder is made. The suffix is that of the unfinished file, too.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(target)
    except OSError as error:
        raise OSError(f"'{target}' cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
