"""Folders that cost minutes to make, and that all processes of a run of the tests read."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first process fills which asks for it; the others wait.

    A fixture of the scope ``session`` alone would run in each of the processes, and side by side, where both take twice as long.

    Args:
        factory: The fixture ``tmp_path_factory``.
        name: Name of the folder, the same in all processes.
        make: Fills the empty folder. If it raises, the next process tries again, and its tests tell the reason, too.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # That one is of this process alone.
        root = root.parent
    folder, is_made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            is_made.touch()
    return folder
