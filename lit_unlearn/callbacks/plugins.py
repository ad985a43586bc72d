"""Plugins of the Trainer: how checkpoints are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final path and rename it, so that an interruption never leaves an incomplete one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one file, completely or not at all."""
        # Lightning's own goes through the machine's temporary folder. From there a move may be a copy, which is not atomic.
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        final = Path(path)
        unfinished = final.with_name(f".{final.name}.unfinished")
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        unfinished.replace(final)
