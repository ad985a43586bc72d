"""Checkpoints that are read without running code in them.

A file of tensors is read by ``torch.load(weights_only=True)``. A sharded checkpoint is a folder: its index ``.metadata`` and the
plain values of its optimizer are pickles, which torch reads without restriction, so they are checked here first.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from lit_unlearn.errors import CheckpointError, LitUnlearnError, MissingFileError

# Lightning writes it last into the folder of a sharded checkpoint.
SHARDED_MARK = "meta.pt"
# Every checkpoint of Lightning's has them.
_KEYS = {"global_step", "loops", "pytorch-lightning_version"}
_INDEX = ".metadata"
_METADATA_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
# All that torch writes into an index. None of them does anything but hold values.
_ALLOWED = {
    *((f"{Metadata.__module__}", name) for name in _METADATA_CLASSES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    # The name of the module depends on Python's version.
    *product(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
}


class _Forbidden(pickle.UnpicklingError):
    """The reason why a file is refused."""


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that knows nothing but what an index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class.

        Raises:
            pickle.UnpicklingError: If it is not allowed.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise _Forbidden(f"it asks for {module}.{name}, which no index of tensors needs")


class _CheckedReader(FileSystemReader):
    """torch's reader of sharded checkpoints, with an index that was checked."""

    # Not `**kwargs`: torch would then fall back to an index per process, which it reads without restriction.
    def read_metadata(self) -> Metadata:
        """Return the index."""
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def _refusing_code(file: Path) -> Iterator[None]:
    """Turn whatever a damaged or malicious file raises into a `CheckpointError`."""
    try:
        yield
    except LitUnlearnError:
        raise
    except Exception as error:
        # torch's own reason is advice to read the file without restriction.
        reason = f": {error}" if isinstance(error, (_Forbidden, OSError)) else ""
        raise CheckpointError(
            f"'{file}' is damaged, or cannot be read without running its code{reason}. Take another checkpoint; do not trust "
            "this one if somebody else made it."
        ) from error


def read_plain(path: Path, is_mapped: bool = True) -> Any:
    """Read tensors and plain values on the CPU, without running code that the file may hold.

    Args:
        path: A file, or the folder of a sharded checkpoint, of which the part that is no tensor is returned.
        is_mapped: Whether tensors are read only when they are used, for which the file must stay as it is.

    Raises:
        MissingFileError: If there is none.
        CheckpointError: If there is code in it, or it is damaged or incomplete.
    """
    if not path.exists():
        message = f"there is no checkpoint '{path}': expected a file or folder such as 'last-step=100.ckpt'."
        raise MissingFileError(message, argument="ckpt_path")
    file = path / SHARDED_MARK if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"'{path}' is a folder without '{SHARDED_MARK}', so it is no complete sharded checkpoint: give a "
            "file or folder such as 'last-step=100.ckpt'.",
            argument="ckpt_path",
        )
    with _refusing_code(file):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)


def open_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of Lightning's as `read_plain` does.

    Raises:
        MissingFileError: If there is none.
        CheckpointError: If there is code in it, or it is damaged, incomplete or of another program.
    """
    checkpoint = read_plain(path)
    missing = _KEYS - checkpoint.keys() if isinstance(checkpoint, dict) else _KEYS
    if missing:
        raise CheckpointError(
            f"'{path}' is no checkpoint of a run of this package: it has no `{'`, `'.join(sorted(missing))}`.",
            argument="ckpt_path",
        )
    return dict(checkpoint)


def check_checkpoint(path: Path, is_sharding: bool) -> None:
    """Raise unless a checkpoint can be resumed from, without running code in it.

    Args:
        path: A file, or the folder of a sharded checkpoint; anything else passes, such as an address.
        is_sharding: Whether the run shards its model, as a sharded checkpoint needs.

    Raises:
        CheckpointError: If there is code in it, it is damaged, or the run cannot read it.
    """
    if path.is_dir():
        check_sharding(path, is_sharding)
        with _refusing_code(path / _INDEX):
            _check_values(path, read_index(path))
    if path.exists():
        open_checkpoint(path)


def check_sharding(path: Path, is_sharding: bool) -> None:
    """Raise if a checkpoint is sharded and the run is not.

    Raises:
        CheckpointError: With what to do.
    """
    if path.is_dir() and not is_sharding:
        raise CheckpointError(
            f"'{path}' is a sharded checkpoint, which only a run with FSDP2 can resume: add --config configs/hardware/fsdp2.yaml, "
            "or make a model of it with `lit-unlearn export` and start from that.",
            argument="ckpt_path",
        )


def _check_values(folder: Path, metadata: Metadata) -> None:
    """Raise unless everything in the shards that is no tensor is a plain value: torch would run its code."""
    for info in metadata.storage_data.values():
        # The shards lie beside the index, whereas torch would follow any path. An extension would decode the bytes first.
        if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
            raise _Forbidden(f"it names the shard {info.relative_path!r}, which is none")
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, BytesStorageMetadata):
            continue
        info = metadata.storage_data[MetadataIndex(name)]
        file = folder / info.relative_path
        with _refusing_code(file), file.open("rb") as shard:
            shard.seek(info.offset)
            torch.load(io.BytesIO(shard.read(info.length)), map_location="cpu", weights_only=True)


def read_index(folder: Path) -> Metadata:
    """Read the index of a sharded checkpoint.

    Raises:
        CheckpointError: If it is missing, damaged, or holds more than an index needs.
    """
    with _refusing_code(folder / _INDEX), (folder / _INDEX).open("rb") as stream:
        metadata = _IndexUnpickler(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise _Forbidden("it is no index of tensors")
    return metadata


def read_sharded_weights(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read tensors of a sharded checkpoint, put together on the CPU; the optimizer's, twice as large, are not read.

    Args:
        folder: The checkpoint.
        prefix: Of the tensors' names in the state of the module.

    Raises:
        CheckpointError: If it cannot be read without running code in it.
    """
    state: dict[str, Any] = {}
    for name, stored in read_index(folder).state_dict_metadata.items():
        # Only what is a tensor is asked for, so that no other value is read.
        if name.startswith(f"state_dict.{prefix}") and isinstance(stored, TensorStorageMetadata):
            state[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings(), _refusing_code(folder):
        warnings.filterwarnings("ignore", ".*load in a single process")
        load(state, storage_reader=_CheckedReader(folder), no_dist=True)
    return {name.removeprefix("state_dict."): value for name, value in state.items()}
