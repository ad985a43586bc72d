"""Plugins of the Trainer: how checkpoints are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_unlearn.errors import CheckpointError, reading
from lit_unlearn.training.checkpoint_files import check_sharding, read_plain
from lit_unlearn.training.strategies import unfinished_checkpoint
from lit_unlearn.utils.io import output_errors


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final path and rename it, so that an interruption never leaves an incomplete one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one file, completely or not at all."""
        # Not all of Lightning's arguments and addresses are files.
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Lightning's own makes a copy in memory, and one in the system's temporary folder, which may be too small. From there
        # a move may be a copy, too, which is not atomic.
        final = Path(path)
        unfinished = unfinished_checkpoint(final)
        try:
            with output_errors(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                with unfinished.open("wb") as file:
                    _save(checkpoint, file)
                unfinished.replace(final)
        finally:
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one file, without running code that it may hold.

        Raises:
            MissingFileError: If there is none.
            CheckpointError: If there is code in it, it is damaged, or it is a sharded checkpoint.
        """
        if "://" in str(path):
            with reading("the checkpoint", path, "Resume from another one.", CheckpointError, argument="ckpt_path"):
                return super().load_checkpoint(path, *args, **kwargs)
        check_sharding(Path(path), is_sharding=False)
        # Not a checkpoint alone: processes that were spawned hand their weights back in such a file.
        content: dict[str, Any] = read_plain(Path(path), is_mapped=False)
        return content


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch tries to end the archive even if the disk is full, and reports that this has failed, too.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
