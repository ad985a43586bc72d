"""From a checkpoint of this package to a model directory with its record."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.export.record import RECORD, Record, export_digests, with_outcome, write_record
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.io import atomic_directory, read_json

_WEIGHTS = "lm.model."  # of the model itself: not of its frozen reference, nor of an objective


_SHARDED = "meta.pt"  # Lightning's, in the folder of a checkpoint that every process wrote a part of


def _renew(source: Path, target: Path, benchmarks: list[dict[str, Any]]) -> None:
    """Copies an export, with more benchmarks in its record."""
    record = read_json(source / RECORD)
    if export_digests(source) != record["files"]:
        raise ValueError(
            f"the files in '{source}' are not those that its record was made with, whose sha256 it holds. Export the checkpoint "
            "again."
        )
    every = {one["sha256"]: one for one in [*record.get("benchmarks", []), *benchmarks]}
    with atomic_directory(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        write_record(folder, {**record, "benchmarks": list(every.values())})


def _export(path: Path, target: Path, base: str | None, benchmarks: list[dict[str, Any]]) -> None:
    checkpoint = read_checkpoint(path)
    record = checkpoint["callbacks"].get("ExportModel", {}).get("record") or {}
    lm = _load(path, checkpoint["state_dict"], record, base)
    record = {"kind": "unlearned" if "constraints" in checkpoint else "taught", "model": lm.origin(), **record}
    step, best = checkpoint["global_step"], checkpoint["run"].get("best")
    kept = best["step"] if best else step
    record = with_outcome(
        {**record, "benchmarks": benchmarks},
        checkpoint["callbacks"].get("RunReport", {}).get("values", {}),
        best["values"] if best and kept == step else {},
        checkpoint.get("constraints", {}),
        step=step,
        kept_step=kept,
        steps=step,
    )
    lm.save(target, finish=partial(write_record, record=record))
    if kept != step:
        print(f"this is the model of step {step}; the run keeps that of step {kept}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, without the optimizer's state, on the CPU.

    A file runs no code. The index of a sharded checkpoint is a pickle, which can: read only those that you trust.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is none of this package.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint '{path}': expected a file or folder such as 'last-step=100.ckpt'."
        )
    if path.is_dir() and not (path / _SHARDED).is_file():
        raise ValueError(
            f"'{path}' is a folder without '{_SHARDED}', so no whole sharded checkpoint, and without '{RECORD}', so no export with "
            "a record."
        )
    try:
        file = path / _SHARDED if path.is_dir() else path
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"'{path}' is no checkpoint that can be read without running its code: {error}") from error
    if not isinstance(checkpoint, dict) or not {"run", "callbacks", "global_step"} <= checkpoint.keys():
        raise ValueError(
            f"'{path}' is no checkpoint of a LitUnlearn or LitFinetune run: it has no `run`, `callbacks` and `global_step`."
        )
    if path.is_dir():
        checkpoint["state_dict"] = _sharded_weights(path)
    return checkpoint


def _sharded_weights(path: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = f"state_dict.{_WEIGHTS}"
    state: dict[str, Any] = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in stored.items()
        if name.startswith(prefix) and isinstance(part, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*load in a single process")
        load(state, checkpoint_id=path, no_dist=True)
    return {name.removeprefix("state_dict."): value for name, value in state.items()}


def _load(path: Path, state: Mapping[str, Tensor], record: Record, base: str | None) -> LanguageModel:
    """The model of a checkpoint."""
    weights = {name.removeprefix("lm."): value for name, value in state.items() if name.startswith(_WEIGHTS)}
    settings = _settings(path, record, base)
    lm = LanguageModel(**settings)
    dtypes = Counter(value.dtype for value in weights.values() if value.is_floating_point())
    lm.load(dtypes.most_common(1)[0][0], device="cpu")
    _check_base(lm, record)
    wanted = {name for name, p in lm.named_parameters() if p.requires_grad} if lm.has_adapter else {*lm.state_dict()}
    known = lm.state_dict()
    wrong = [name for name in weights if name not in known or known[name].shape != weights[name].shape]
    if wrong := sorted({*wrong, *(wanted - weights.keys())}):
        raise ValueError(
            f"{len(wrong)} tensors of the checkpoint, such as '{wrong[0]}', do not fit the model "
            f"'{settings.get('model')}': it was made with another model or adapter. Give its base with --model."
        )
    lm.load_state_dict(weights, strict=False)
    return lm


def _settings(path: Path, record: Record, base: str | None) -> dict[str, Any]:
    """The arguments of the checkpoint's `LanguageModel`."""
    config = record.get("config")
    if config is None and base is None:
        raise ValueError(
            f"'{path}' does not say what model it belongs to (it was made in Python, or by an earlier version): give the directory "
            "or hub name of its base with --model."
        )
    settings = (
        dict(config["model"]["init_args"]["lm"]) if config else {"adapter": record.get("model", {}).get("adapter")}
    )
    settings |= {"compile": False, "activation_checkpointing": False}
    return settings if base is None else {**settings, "model": base, "config": None, "revision": None}


def _check_base(lm: LanguageModel, record: Record) -> None:
    """Refuses another base than the adapter was trained on: the checkpoint holds the adapter alone."""
    if not lm.has_adapter or not record:
        return
    was, now = record["model"], lm.origin()
    if was["weights"] and now["weights"] and was["weights"] != now["weights"]:
        raise ValueError(
            f"'{lm.name}' is not the base model that the adapter was trained on: that was '{was['name']}' with the weights "
            f"{was['weights']}, and these are {now['weights']}. Give the same with --model."
        )
