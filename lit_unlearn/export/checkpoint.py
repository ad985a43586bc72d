"""Exports made of checkpoints: a Hugging Face directory with its record."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_unlearn.errors import CheckpointError, MissingFileError, ModelError
from lit_unlearn.export.record import RECORD_FILE, Record, add_outcome, digest_export, write_record
from lit_unlearn.models import LanguageModel
from lit_unlearn.training.sharded import SHARDED_MARK, load_tensors, read_sharded_weights
from lit_unlearn.utils.io import atomic_directory, read_json

# The model itself: not its frozen reference, nor the state of an objective.
_MODEL_PREFIX = "lm.model."


def export_checkpoint(
    path: Path, target: Path, base_model: str | None = None, benchmarks: Sequence[dict[str, Any]] = ()
) -> Record:
    """Write the model of a checkpoint, with its record, as a Hugging Face directory.

    It is the model of the checkpoint's step. The run may keep an earlier one, which then is only in the run's own export:
    compare the record's ``step`` and ``kept_step``.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        target: Folder to write; an earlier export there is replaced.
        base_model: Directory or hub name of the base model, where it is not what the checkpoint says.
        benchmarks: Results for the record, from `summarize_results`.

    Returns:
        The record.

    Raises:
        MissingFileError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or does not say which base model it belongs to.
        ModelError: If the base model is another one.
    """
    checkpoint = read_checkpoint(path)
    callbacks = checkpoint["callbacks"]
    saved_record = callbacks.get("ExportModel", {}).get("record") or {}
    lm = _load_model(path, checkpoint["state_dict"], saved_record, base_model)

    step = checkpoint["global_step"]
    best = checkpoint["run"].get("best")
    kept_step = best["step"] if best else step
    record = {
        "kind": "unlearned" if "constraints" in checkpoint else "fine-tuned",
        "model": lm.origin(),
        # A run without `ExportModel` may have had a report.
        "before": callbacks.get("RunReport", {}).get("values", {}),
        **saved_record,
        "benchmarks": list(benchmarks),
    }
    # Values of another step would be claimed for a model that was never measured.
    after = best["values"] if best and kept_step == step else {}
    steps = {"step": step, "kept_step": kept_step, "steps": step}
    record = add_outcome(record, after, checkpoint.get("constraints", {}), **steps)
    lm.save(target, finish=partial(write_record, record=record))
    return record


def renew_record(source: Path, target: Path, benchmarks: Sequence[dict[str, Any]]) -> None:
    """Copy an export, with more benchmarks in its record.

    Args:
        source: The export.
        target: Folder to write; it may be the same.
        benchmarks: From `summarize_results`; a file that the record has already is not added again.

    Raises:
        CheckpointError: If the export's files were changed since its record was written.
    """
    record = read_json(source / RECORD_FILE)
    # Otherwise the results of one model would be certified for another.
    if digest_export(source) != record["files"]:
        raise CheckpointError(
            f"the files in '{source}' are not those that its record was made with, whose sha256 it holds. Export the "
            "checkpoint again."
        )
    by_digest = {results["sha256"]: results for results in [*record.get("benchmarks", []), *benchmarks]}
    with atomic_directory(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        write_record(folder, {**record, "benchmarks": list(by_digest.values())})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, without the optimizer's state, on the CPU.

    No code in it runs, whether it is a file or sharded.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Raises:
        MissingFileError: If there is none.
        CheckpointError: If it cannot be read, or is not from this package.
    """
    if not path.exists():
        raise MissingFileError(
            f"there is no checkpoint '{path}': expected a file or folder such as 'last-step=100.ckpt'."
        )
    if path.is_dir() and not (path / SHARDED_MARK).is_file():
        raise CheckpointError(
            f"'{path}' is a folder without '{SHARDED_MARK}', so it is not a complete sharded checkpoint, and without "
            f"'{RECORD_FILE}', so it is not an export with a record."
        )
    file = path / SHARDED_MARK if path.is_dir() else path
    checkpoint: dict[str, Any] = load_tensors(file)
    if not isinstance(checkpoint, dict) or not {"run", "callbacks", "global_step"} <= checkpoint.keys():
        raise CheckpointError(
            f"'{path}' is no checkpoint of a LitUnlearn or LitFinetune run: it has no `run`, `callbacks` and `global_step`."
        )
    if path.is_dir():
        checkpoint["state_dict"] = read_sharded_weights(path, _MODEL_PREFIX)
    return checkpoint


def _load_model(path: Path, state: Mapping[str, Tensor], record: Record, base_model: str | None) -> LanguageModel:
    weights = {name.removeprefix("lm."): value for name, value in state.items() if name.startswith(_MODEL_PREFIX)}
    dtypes = Counter(value.dtype for value in weights.values() if value.is_floating_point())
    settings = _find_model_settings(path, record, base_model)
    lm = LanguageModel(**settings)
    lm.load(dtypes.most_common(1)[0][0], device="cpu")
    _check_base_model(lm, record)

    state_of_base = lm.state_dict()
    required = set(state_of_base)
    if lm.has_adapter:
        # The checkpoint has the adapter alone.
        required = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    misfits = required - weights.keys()
    for name, weight in weights.items():
        if name not in state_of_base or state_of_base[name].shape != weight.shape:
            misfits.add(name)
    if misfits:
        raise ModelError(
            f"{len(misfits)} tensors of the checkpoint, such as '{min(misfits)}', do not fit the model "
            f"'{settings.get('model')}': it was made with another model or adapter. Give its base model as `base_model` (--model)."
        )
    # Not strict: with an adapter, the base model's weights are loaded already. What is required was checked above.
    lm.load_state_dict(weights, strict=False)
    return lm


def _find_model_settings(path: Path, record: Record, base_model: str | None) -> dict[str, Any]:
    """Return the arguments of the checkpoint's `LanguageModel`."""
    config = record.get("config")
    if config is None and base_model is None:
        raise CheckpointError(
            f"'{path}' does not say which base model it belongs to (it was made in Python, or by an earlier version): give "
            "the directory or hub name of its base model as `base_model` (--model)."
        )
    if config is not None:
        settings = dict(config["model"]["init_args"]["lm"])
    else:
        settings = {"adapter": record.get("model", {}).get("adapter")}
    # Both would only slow down a model that is loaded to be written.
    settings |= {"compile": False, "activation_checkpointing": False}
    if base_model is not None:
        settings |= {"model": base_model, "config": None, "revision": None}
    return settings


def _check_base_model(lm: LanguageModel, record: Record) -> None:
    """Refuse another base model than the adapter was trained on: merged, it would be a model that was never trained."""
    if not lm.has_adapter or not record:
        return
    recorded, loaded = record["model"], lm.origin()
    if recorded["weights"] and loaded["weights"] and recorded["weights"] != loaded["weights"]:
        raise ModelError(
            f"'{lm.name}' is not the base model that the adapter was trained on: that was '{recorded['name']}' with the "
            f"weights {recorded['weights']}, and these are {loaded['weights']}. Give the same as `base_model` (--model)."
        )
