"""The record of an export: from what to what a model came, for programs and, rendered as a model card, for people."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.encoding import IGNORED, Example
from lit_unlearn.evaluation.results import Results, package_versions
from lit_unlearn.export.card import card
from lit_unlearn.training import LitLanguageModel, LitUnlearn
from lit_unlearn.utils.io import atomic_file, file_digest, write_json

RECORD, CARD = "unlearning.json", "README.md"

Record = dict[str, Any]


def describe(trainer: L.Trainer, module: LitLanguageModel, earlier: Record | None = None) -> Record:
    """What is known of a run before its first step, in plain types.

    Args:
        trainer: Of the run.
        module: Loaded.
        earlier: The record in the checkpoint that is resumed.

    Returns:
        ``kind``, ``versions``, ``model`` (see ``LanguageModel.origin``), ``data``, ``method``, ``bounds``, ``training`` and
        ``config``, the configuration where the run was started from the command line.
    """
    record = {
        "kind": "unlearned" if isinstance(module, LitUnlearn) else "taught",
        "versions": {**package_versions(), "python": platform.python_version()},
        "model": module.lm.origin(),
        "data": _data(getattr(trainer, "datamodule", None)),
        "method": _objective(module.forget) | {"weight": module.forget_weight, "keep": module.keep}
        if isinstance(module, LitUnlearn)
        else None,
        "bounds": _bounds(module),
        "training": _training(trainer, module),
        "config": _config(trainer),
    }
    if earlier:
        record["training"]["resumed_at"] = [*earlier["training"].get("resumed_at", []), trainer.global_step]
        for name, bound in record["bounds"].items():
            bound["multiplier"] = earlier["bounds"].get(name, bound)["multiplier"]  # λ was moved since
    plain: Record = json.loads(json.dumps(record, default=str))
    return plain


def with_outcome(
    record: Record, before: Mapping[str, Any], after: Mapping[str, Any], constraints: Mapping[str, Any], **steps: int
) -> Record:
    """A record with what the run came to.

    Args:
        record: From `describe`; from a checkpoint without one, what there is of it.
        before: Values of the reference model; empty if unknown.
        after: Values of the exported model; empty if it was not measured.
        constraints: ``Constraint.state_dict()`` by name.
        **steps: ``step`` of the exported model, ``kept_step`` that the run keeps so far, and ``steps`` taken.

    Returns:
        The record, with ``before``, ``after``, ``constraints`` and the steps, as ``report.json`` has them.
    """
    bounds = record.get("bounds") or {}
    outcome = {name: _outcome(name, bounds.get(name, {}), after, state) for name, state in constraints.items()}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**record, "created": created, **steps, "before": {**before}, "after": {**after}, "constraints": outcome}


def _outcome(
    name: str, bound: Mapping[str, Any], after: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, float | None]:
    value, slack = (after.get(f"constraint/{name}/{key}") for key in ("value", "slack"))
    epsilon, reference = bound.get("epsilon"), state["reference"]
    if "relative" in bound and reference is not None:
        epsilon = (1 + bound["relative"]) * reference
    if epsilon is None and value is not None and slack is not None:
        epsilon = value + slack
    return {
        "value": value,
        "slack": slack,
        "epsilon": epsilon,
        "reference": reference,
        "multiplier_before": bound.get("multiplier", {}).get("init"),
        "multiplier_after": state["multiplier"]["value"],
    }


def benchmark(file: Path) -> dict[str, Any]:
    """A results file without its rows, and by which sha256 it is known.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no results file.
    """
    results = Results.read(file).to_dict()
    return {**{key: value for key, value in results.items() if key != "examples"}, "sha256": file_digest(file)}


def write_record(folder: Path, record: Record) -> None:
    """Writes the record and its card into a folder that holds the rest of an export; without ``files``, it gets them."""
    record = record if "files" in record else {**record, "files": export_digests(folder)}
    write_json(folder / RECORD, record)
    with atomic_file(folder / CARD) as file:
        file.write_text(card(record), encoding="utf-8")


def export_digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of an export but the record and its card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: file_digest(path) for name, path in names.items() if name not in (RECORD, CARD)}


def rows_digest(rows: list[Example]) -> str:
    """The sha256 of a text with a line ``[input_ids, labels]`` of JSON for every row, as Python's ``json.dumps`` has it."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{json.dumps([row.input_ids, row.labels])}\n".encode())
    return digest.hexdigest()


def _data(data: Any) -> dict[str, Any] | None:
    if not isinstance(data, ForgetRetain):
        return None
    return {
        "class": type(data).__name__,
        "template": data.template,
        "max_length": data.max_length,
        "train_on": data.train_on,
        "seed": data.seed,
        "batch_size": data.batch_size,
        "retain_batch_size": data.retain_batch_size,
        "sets": {
            name: {"source": data.sources[name].describe(), **_contents(rows)} for name, rows in data.examples.items()
        },
    }


def _contents(rows: list[Example]) -> dict[str, Any]:
    supervised = sum(label != IGNORED for row in rows for label in row.labels)
    return {"rows": len(rows), "supervised_tokens": supervised, "sha256": rows_digest(rows)}


def _bounds(module: LitLanguageModel) -> dict[str, Any]:
    if not isinstance(module, LitUnlearn):
        return {}
    found = {}
    for name, constraint in module.constraints.items():
        multiplier = constraint.multiplier
        relative = constraint.relative
        found[name] = {
            **_objective(constraint.objective),
            "stream": constraint.stream,
            **({"epsilon": constraint.epsilon} if relative is None else {"relative": relative}),
            "multiplier": {"class": type(multiplier).__name__, **_settings(multiplier), "init": multiplier.value},
            "update_every": constraint.update_every,
            "warmup_epochs": constraint.warmup_epochs,
            "smoothing": constraint.smoothing,
        }
    return found


def _objective(objective: Any) -> dict[str, Any]:
    return {
        "objective": type(objective).__name__,
        "settings": _settings(objective),
        "formula": objective.formula,
        "paper": objective.paper,
    }


def _settings(thing: Any) -> dict[str, Any]:
    """The arguments an object was made with, as far as it keeps them under their names."""
    kept = {name: getattr(thing, name, None) for name in inspect.signature(type(thing)).parameters}
    return {name: value for name, value in kept.items() if isinstance(value, (bool, int, float, str))}


def _training(trainer: L.Trainer, module: LitLanguageModel) -> dict[str, Any]:
    optimizer = trainer.optimizers[0]
    return {
        "optimizer": type(optimizer).__name__,
        "settings": {name: value for name, value in optimizer.defaults.items() if value is not None},
        "gradient_clip_val": module.gradient_clip_val,
        "max_epochs": trainer.max_epochs,
        "precision": trainer.precision,
        "strategy": type(trainer.strategy).__name__,
        "processes": trainer.world_size,
        "seed": module.seed,
    }


def _config(trainer: L.Trainer) -> Any:
    saver = next((one for one in trainer.callbacks if isinstance(one, SaveConfigCallback)), None)  # type: ignore[attr-defined]
    return saver and yaml.safe_load(saver.parser.dump(saver.config, skip_unset=False))
