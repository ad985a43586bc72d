"""The record of an export: which model it comes from, what was done to it, and what that achieved."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.data.templates import Chat
from lit_unlearn.evaluation.results import Results, package_versions
from lit_unlearn.evaluation.verdict import MAX_FORGET_PROBABILITY, decide, get_slack
from lit_unlearn.export.card import PROMPT_SETTINGS, render_card
from lit_unlearn.export.published import publish_record
from lit_unlearn.models.files import RECORD_FILE as RECORD_FILE
from lit_unlearn.training import LitLanguageModel, LitUnlearn
from lit_unlearn.training.agreement import read_arguments
from lit_unlearn.utils.folders import iterate_files
from lit_unlearn.utils.io import atomic_file, file_digest, write_json
from lit_unlearn.utils.redaction import redact_secrets

CARD_FILE = "README.md"

Record = dict[str, Any]


def describe_run(
    trainer: L.Trainer, module: LitLanguageModel, before: Mapping[str, float], earlier: Record | None = None
) -> Record:
    """Describe a run before its first step, in plain types.

    Args:
        trainer: Trainer of the run.
        module: Its module, with the model loaded.
        before: Values of the model before the first step.
        earlier: The record in the checkpoint that is resumed.

    Returns:
        ``kind``, ``versions``, ``model`` (see ``LanguageModel.origin``), ``data``, ``method``, ``bounds``, ``training``,
        ``config`` (of a run from the command line) and ``before``.
    """
    method = None
    bounds = {}
    if isinstance(module, LitUnlearn):
        method = {**_describe_objective(module.forget), "weight": module.forget_weight, "keep": module.keep}
        bounds = {name: _describe_bound(constraint) for name, constraint in module.constraints.items()}
    record = {
        "kind": "fine-tuned" if method is None else "unlearned",
        "versions": {**package_versions(), "python": platform.python_version()},
        "model": module.lm.origin(),
        "data": _describe_data(getattr(trainer, "datamodule", None)),
        "method": method,
        "bounds": bounds,
        "training": _describe_training(trainer, module),
        "config": _find_config(trainer),
        "before": dict(before),
    }
    if earlier:
        record["training"]["resumed_at"] = [*earlier["training"].get("resumed_at", []), trainer.global_step]
        for name, bound in bounds.items():
            # By now λ has moved; `init` is where it was before the first step of the first part.
            bound["multiplier"] = earlier["bounds"].get(name, bound)["multiplier"]
    # The record travels in checkpoints, which are loaded without running code: no enums, no paths, no dtypes.
    plain: Record = json.loads(json.dumps(record, default=str))
    return plain


def add_outcome(record: Record, after: Mapping[str, Any], constraints: Mapping[str, Any], **steps: int) -> Record:
    """Return a record with what the run achieved.

    Args:
        record: From `describe_run`; of a checkpoint that has none, what is known.
        after: Values of the exported model; empty if it was not measured.
        constraints: ``Constraint.state_dict()`` by name.
        **steps: ``step`` of the exported model, ``kept_step`` of the one that the run keeps so far, and ``steps`` taken.

    Returns:
        The record, with ``before``, ``after``, ``constraints`` and the steps, as ``report.json`` has them, and, if it
        unlearned, ``verdict`` and its threshold ``max_forget_probability``.
    """
    bounds = record.get("bounds") or {}
    outcomes = {}
    for name, state in constraints.items():
        outcomes[name] = _describe_outcome(name, bounds.get(name, {}), after, state)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    outcome = {"created": created, **steps, "before": record.get("before", {}), "after": {**after}}
    if record["kind"] == "unlearned":
        threshold = record.get("max_forget_probability", MAX_FORGET_PROBABILITY)
        outcome |= {
            "verdict": decide(outcome["before"], after, threshold),
            "max_forget_probability": threshold,
        }
    return {**record, **outcome, "constraints": outcomes}


def _describe_outcome(
    name: str, bound: Mapping[str, Any], after: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    value, epsilon = after.get(f"constraint/{name}/value"), state.get("epsilon")
    return {
        "value": value,
        "slack": get_slack(value, epsilon),
        "epsilon": epsilon,
        "reference": state["reference"],
        "stream": bound.get("stream", "retain"),
        "multiplier_before": bound.get("multiplier", {}).get("init"),
        "multiplier_after": state["multiplier"]["value"],
    }


def summarize_results(file: Path) -> dict[str, Any]:
    """Return a results file without its examples, and the sha256 that it is known by.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it is not a results file.
    """
    # The examples stay out: the record must not show what was deleted.
    results = Results.read(file).to_dict()
    summary = {key: value for key, value in results.items() if key != "examples"}
    return {**summary, "sha256": file_digest(file)}


def write_record(folder: Path, record: Record) -> None:
    """Write the record and its card into a folder with the other files of an export.

    Both show what may be published, see `publish_record`. A record without ``files`` gets their digests. One that has them keeps them: they say which files it was made with.
    """
    if "files" not in record:
        record = {**record, "files": digest_export(folder)}
    record = publish_record(record)
    write_json(folder / RECORD_FILE, record)
    with atomic_file(folder / CARD_FILE) as file:
        file.write_text(render_card(record), encoding="utf-8")


def digest_export(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of an export, except the record, its card and the list of digests."""
    digests = {}
    for name, path in iterate_files(folder):
        if name not in (RECORD_FILE, CARD_FILE):
            digests[name] = file_digest(path)
    return digests


def digest_examples(examples: Sequence[Example]) -> str:
    """Return the sha256 of the examples' token ids and labels.

    The text that is hashed has a line ``[input_ids, labels]`` for every example, as Python's ``json.dumps`` writes it; the
    card shows how to compute it again.
    """
    # Token ids, not texts: they are what was trained on.
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{json.dumps([example.input_ids, example.labels])}\n".encode())
    return digest.hexdigest()


def _describe_data(data: Any) -> dict[str, Any] | None:
    if not isinstance(data, ForgetRetain):
        return None
    sets = {}
    for name, examples in data.examples.items():
        supervised_tokens = 0
        for example in examples:
            supervised_tokens += len(example.labels) - example.labels.count(IGNORED)
        sets[name] = {
            "source": data.sources[name].describe(),
            "format": data.formats.get(name),
            "rows": len(examples),
            "supervised_tokens": supervised_tokens,
            "sha256": digest_examples(examples),
        }
        alternates = [example.alternate for example in examples if example.alternate is not None]
        if alternates:
            sets[name]["alternates_sha256"] = digest_examples(alternates)
        if name in data.num_dropped:
            sets[name]["dropped_duplicates"] = data.num_dropped[name]
    return {
        "class": type(data).__name__,
        "template": data.template,
        "prompt": data.prompt,
        "max_length": data.max_length,
        "train_on": data.train_on,
        **_describe_choice(data),
        "seed": data.seed,
        "batch_size": data.batch_size,
        "retain_batch_size": data.retain_batch_size,
        "sets": sets,
    }


def find_chat_template(record: Record) -> str | None:
    """Return the chat template that a run was given in the place of the tokenizer's; ``None`` if it was given none."""
    data = record.get("data") or {}
    prompt = data.get("prompt") or {}
    template: str | None = prompt.get("chat_template")
    return template


def _describe_choice(data: ForgetRetain) -> dict[str, Any]:
    """Return what a benchmark must be told to read the same rows in the same prompts."""
    choice: dict[str, Any] = {}
    # TOFU's, MUSE's and LUME's, and what the columns of a file are called.
    for name in ("forget_split", "corpus", "forget_set", "tasks", "question_column", "answer_column"):
        value = getattr(data, name, None)
        if value is not None:
            choice[name] = value
    # Settings that most runs leave alone.
    defaults = inspect.signature(ForgetRetain).parameters
    for name in (*PROMPT_SETTINGS, "supervise", "span_column"):
        value = getattr(data, name)
        if value != defaults[name].default:
            choice[name] = asdict(value) if isinstance(value, Chat) else value
    return choice


def _describe_bound(constraint: Any) -> dict[str, Any]:
    multiplier = constraint.multiplier
    bound = {**_describe_objective(constraint.objective), "stream": constraint.stream}
    if constraint.relative is None:
        bound["epsilon"] = constraint.epsilon
    else:
        bound["relative"] = constraint.relative
    # `init` as it is now: a `FixedMultiplier` calls its argument otherwise.
    bound["multiplier"] = {"class": type(multiplier).__name__, **read_arguments(multiplier), "init": multiplier.value}
    bound["update_every"] = constraint.update_every
    bound["warmup_epochs"] = constraint.warmup_epochs
    bound["smoothing"] = constraint.smoothing
    return bound


def _describe_objective(objective: Any) -> dict[str, Any]:
    return {
        "objective": type(objective).__name__,
        "settings": read_arguments(objective),
        "formula": objective.formula,
        "paper": objective.paper,
    }


def _describe_training(trainer: L.Trainer, module: LitLanguageModel) -> dict[str, Any]:
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


def _find_config(trainer: L.Trainer) -> Any:
    # The command line leaves its configuration with this callback of Lightning's; a run from Python has none.
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return redact_secrets(yaml.safe_load(callback.parser.dump(callback.config, skip_unset=False)))
    return None
