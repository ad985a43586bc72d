"""Exports made of checkpoints: a Hugging Face directory with its record."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.errors import CheckpointError, ModelError
from lit_unlearn.export.record import RECORD_FILE, Record, add_outcome, digest_export, find_chat_template, write_record
from lit_unlearn.models import LanguageModel
from lit_unlearn.training.checkpoint_files import open_checkpoint, read_sharded_weights
from lit_unlearn.training.weights import check_base
from lit_unlearn.utils.folders import check_export_target, finish_replacement, lock_folder, read_digests, replace_folder
from lit_unlearn.utils.io import read_json

# The model itself: neither its frozen reference, nor its teacher, nor the state of an objective.
_MODEL_PREFIX = "lm.model."


def export_checkpoint(
    path: Path,
    target: Path,
    base_model: str | None = None,
    benchmarks: Sequence[dict[str, Any]] = (),
    dtype: str | None = None,
) -> Record:
    """Write the model of a checkpoint, with its record, as a Hugging Face directory.

    It is the model of the checkpoint's step. The run may keep an earlier one, which then is only in the run's own export:
    compare the record's ``step`` and ``kept_step``.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        target: Folder to write; an earlier export there is replaced.
        base_model: Directory or hub name of the base model, where it is not what the checkpoint says.
        benchmarks: Results for the record, from `summarize_results`.
        dtype: Of the weights, such as ``"bfloat16"``; ``None`` for that of the run's own export.

    Returns:
        The record. It has values of the model only if these very weights were measured, in that dtype.

    Raises:
        MissingFileError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, does not say which base model it belongs to, or belongs to another one.
        ModelError: If the base model does not fit.
        OccupiedError: If the target holds something that is not ours.
    """
    checkpoint = read_checkpoint(path)
    callbacks = checkpoint["callbacks"]
    saved_record = callbacks.get("ExportModel", {}).get("record") or {}
    settings = _find_model_settings(path, saved_record, base_model)
    # Before the minutes that loading may take.
    check_export_target(target, [settings.get("model"), settings.get("tokenizer")])
    lm = _load_model(checkpoint, saved_record, settings)
    files_dtype = None if lm.files_dtype is None else str(lm.files_dtype).removeprefix("torch.")
    measured_dtype = saved_record.get("dtype", files_dtype)
    dtype = dtype or measured_dtype

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
        "checksum": lm.checksum(),
        "dtype": dtype,
    }
    # Values of other weights would be claimed for a model that was never measured. The step does not tell: a checkpoint may
    # have the weights that a callback averages.
    is_measured = best is not None and (kept_step, best["weights"]) == (step, record["checksum"])
    after = best["values"] if is_measured and _are_rounded_alike(lm, dtype, measured_dtype) else {}
    damage = callbacks.get("StopAtDamage", {}).get("damage")
    if after and damage is not None and damage["step"] == step:
        record["damage"] = damage
    steps = {"step": step, "kept_step": kept_step, "steps": step}
    record = add_outcome(record, after, checkpoint.get("constraints", {}), **steps)
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    finish = partial(write_record, record=record)
    lm.save(target, finish=finish, dtype=torch_dtype, chat_template=find_chat_template(record))
    return record


def _are_rounded_alike(lm: LanguageModel, dtype: str | None, other: str | None) -> bool:
    """Return whether exports in two dtypes compute the same."""
    is_rounded = [name is not None and lm.is_rounded_by(getattr(torch, name)) for name in (dtype, other)]
    return dtype == other or not any(is_rounded)


def renew_record(source: Path, target: Path, benchmarks: Sequence[dict[str, Any]]) -> None:
    """Copy an export, with more benchmarks in its record.

    Args:
        source: The export.
        target: Folder to write; it may be the same.
        benchmarks: From `summarize_results`; a file that the record has already is not added again.

    Raises:
        CheckpointError: If the export's files were changed since its record was written, or results are of other files.
        OccupiedError: If the target holds something that is not ours.
    """
    if read_digests(source):
        with lock_folder(source):
            finish_replacement(source)
    record = read_json(source / RECORD_FILE)
    # Otherwise the results of one model would be certified for another.
    if digest_export(source) != record["files"]:
        raise CheckpointError(
            f"the files in '{source}' are not those that its record was made with, whose sha256 it holds. Export the "
            "checkpoint again."
        )
    for results in benchmarks:
        files = results["model"].get("files") or {}
        if not files or not files.items() <= record["files"].items():
            raise CheckpointError(
                f"the results of '{results['model'].get('name')}' ({results['suite']}) were not measured on the files in '{source}': "
                "evaluate this export, and give the results of that."
            )
    by_digest = {results["sha256"]: results for results in [*record.get("benchmarks", []), *benchmarks]}
    record["benchmarks"] = list(by_digest.values())
    is_same = target.is_dir() and target.samefile(source)
    with replace_folder(target, [] if is_same else [source], keeps_others=is_same) as staging:
        for name in [] if is_same else record["files"]:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
        write_record(staging, record)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, without the optimizer's state, on the CPU.

    No code in it runs, whether it is a file or sharded.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Raises:
        MissingFileError: If there is none.
        CheckpointError: If it cannot be read, or is not from this package.
    """
    checkpoint = open_checkpoint(path)
    if not {"run", "callbacks"} <= checkpoint.keys():
        raise CheckpointError(
            f"'{path}' is no checkpoint of a LitUnlearn or LitFinetune run: it has no `run` and `callbacks`."
        )
    if path.is_dir():
        checkpoint["state_dict"] = read_sharded_weights(path, _MODEL_PREFIX)
    return checkpoint


def _load_model(checkpoint: Record, record: Record, settings: Mapping[str, Any]) -> LanguageModel:
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    weights = {name.removeprefix("lm."): value for name, value in state.items() if name.startswith(_MODEL_PREFIX)}
    dtypes = Counter(value.dtype for value in weights.values() if value.is_floating_point())
    lm = LanguageModel(**settings)
    # An adapter is wider than a base model in 16 bits.
    base_dtype = (checkpoint["run"].get("base") or {}).get("dtype")
    dtype = dtypes.most_common(1)[0][0]
    if settings.get("adapter") is not None and base_dtype is not None:
        dtype = getattr(torch, base_dtype)
    lm.load(dtype, device="cpu")
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
    # All weights of a model that was made from a config are in the checkpoint, whatever they are loaded into.
    if "config" not in checkpoint["run"].get("base", {}):
        check_base(checkpoint["run"], lm, lm)
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
        origin = record.get("model", {})
        base = origin.get("base")
        settings = {"adapter": origin.get("adapter")}
        if base is not None:
            # Of a saved adapter, which either is in the base now or has gone on being trained.
            settings = {"adapter": origin["adapter"] if base["merged"] else None, "merge_adapter": base["merged"]}
    # They would only slow down a model that is loaded to be written, and the teacher's files may have gone.
    settings |= {"compile": False, "activation_checkpointing": False, "teacher": None, "teacher_revision": None}
    if base_model is not None:
        # A model that was exported from the GGUF file has the same weights.
        file = settings.get("gguf_file")
        is_there = file is not None and (Path(base_model) / file).is_file()
        gguf_file = file if is_there else None
        settings |= {"model": base_model, "config": None, "revision": None, "gguf_file": gguf_file}
    return settings


def _check_base_model(lm: LanguageModel, record: Record) -> None:
    """Refuse another base model than the adapter was trained on: merged, it would be a model that was never trained."""
    if not lm.has_adapter or not record:
        return
    recorded, loaded = record["model"], lm.origin()
    _compare_weights(recorded, loaded)
    # The run may have started from a saved adapter, on a base model of its own.
    if recorded.get("base") and loaded["base"]:
        _compare_weights(recorded["base"], loaded["base"])


def _compare_weights(recorded: Record, loaded: Record) -> None:
    if recorded["weights"] and loaded["weights"] and recorded["weights"] != loaded["weights"]:
        raise ModelError(
            f"'{loaded['name']}' is not the base model that the adapter was trained on: that was '{recorded['name']}' with the "
            f"weights {recorded['weights']}, and these are {loaded['weights']}. Give the same as `base_model` (--model)."
        )
