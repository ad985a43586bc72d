"""Plugins of the Trainer: how checkpoints are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_unlearn.errors import CheckpointError, MissingFileError, reading
from lit_unlearn.training.strategies import unfinished_checkpoint
from lit_unlearn.utils.io import output_errors

SHARDED = (
    "'{path}' is a sharded checkpoint, which only a run with FSDP2 can resume: add --config configs/hardware/fsdp2.yaml, or make "
    "a model of it with `lit-unlearn export` and start from that."
)
_REMEDY = "Resume from another one, or start at the beginning."


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
            CheckpointError: If it cannot be read, is of another program, or is a sharded checkpoint.
        """
        if "://" in str(path):
            with reading("the checkpoint", path, _REMEDY, CheckpointError, argument="ckpt_path"):
                return super().load_checkpoint(path, *args, **kwargs)
        if Path(path).is_dir():
            raise CheckpointError(SHARDED.format(path=path), argument="ckpt_path")
        return open_checkpoint(Path(path), is_mapped=False)


def open_checkpoint(path: Path, is_mapped: bool = True) -> dict[str, Any]:
    """Read a checkpoint on the CPU, without running code that it may hold.

    Args:
        path: A file, or the folder of a sharded checkpoint, of which the part that is no tensor is returned.
        is_mapped: Whether tensors are read only when they are used, for which the file must stay as it is.

    Raises:
        MissingFileError: If there is none.
        CheckpointError: If it cannot be read, is incomplete, or is of another program.
    """
    if not path.exists():
        raise MissingFileError(f"there is no checkpoint '{path}'.", argument="ckpt_path")
    # Lightning writes it last.
    file = path / "meta.pt" if path.is_dir() else path
    with reading("the checkpoint", path, _REMEDY, CheckpointError, argument="ckpt_path"):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    expected = {"global_step", "loops", "pytorch-lightning_version"}
    missing = expected - checkpoint.keys() if isinstance(checkpoint, Mapping) else expected
    if missing:
        raise CheckpointError(
            f"'{path}' is no checkpoint of a run of this package: it has no `{'`, `'.join(sorted(missing))}`. {_REMEDY}",
            argument="ckpt_path",
        )
    return dict(checkpoint)


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch tries to end the archive even if the disk is full, and reports that this has failed, too.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
