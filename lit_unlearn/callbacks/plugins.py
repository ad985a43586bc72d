"""Plugins of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place and moves it there: an interruption never leaves a part of one.

    Lightning's own goes through the machine's temporary folder, from which a move may be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes one file."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        final = Path(path)
        unfinished = final.with_name(f".{final.name}.unfinished")
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        unfinished.replace(final)
