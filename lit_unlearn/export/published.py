"""The part of a record that is published: `push_to_hub` uploads it, and whoever gets the model reads it.

A list of what may be shown, not of what must be hidden: the next logger or callback would be forgotten in such a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lit_unlearn.data.selection import RULES
from lit_unlearn.utils.redaction import redact_secrets

Record = dict[str, Any]

# Of the Trainer: what decides the numbers, not where they are written.
_TRAINER = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_train_batches",
    "limit_val_batches",
    "deterministic",
)
# Of the data: no rows, no files, no names of either.
_DATA = (
    "question_column",
    "answer_column",
    "alternate_column",
    "text_column",
    "template",
    "chat",
    "format",
    "supervise",
    "messages_column",
    "context_column",
    "chunk_overlap",
    "span_column",
    "mask_padding_ids",
    "max_length",
    "batch_size",
    "retain_batch_size",
    "eval_batch_size",
    "seed",
    "train_on",
    "allow_special_tokens",
    "drop_duplicates",
    "forget_split",
    "corpus",
    "forget_set",
    "retain_split",
    "tasks",
    "kinds",
    "fold",
    "max_retain_rows",
    "num_authors",
    "forget_authors",
    "authors_seed",
    "canaries",
)
# Of the model: everything but a benchmark, which has files of its own.
_MODEL = (
    "lm",
    "forget",
    "constraints",
    "optimizer",
    "scheduler",
    "suite",
    "forget_weight",
    "micro_batch_size",
    "gradient_clip_val",
    "seed",
    "keep",
    "passes",
    "robustness",
)


def publish_record(record: Record) -> Record:
    """Return a record as it is published: settings from a list, no paths, no secrets, rows by digest and number.

    Args:
        record: As checkpoints have it. With ``name_sources``, the base names of row files are published, and the values of the
            rules that chose rows from them; without it, of the rules the columns alone.

    Returns:
        The same for a record that was published before.
    """
    published = dict(record)
    published["config"] = _publish_config(record.get("config"))
    data = record.get("data")
    if data:
        names_sources = bool(record.get("name_sources"))
        sets = {}
        for name, values in data["sets"].items():
            sets[name] = {**values, "source": _publish_source(values["source"], names_sources)}
        published["data"] = {**data, "sets": sets}
    published["benchmarks"] = [_publish_benchmark(results) for results in record.get("benchmarks", [])]
    shown: Record = redact_secrets(_hide_folders(published))
    return shown


def _publish_config(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return None
    published: Record = {}
    for section, names in (("model", _MODEL), ("data", _DATA)):
        # Under `class_path` and `init_args`, as the command line has them.
        part = config.get(section)
        if isinstance(part, Mapping):
            arguments = part.get("init_args") or {}
            chosen = {name: arguments[name] for name in names if name in arguments}
            published[section] = {"class_path": part.get("class_path"), "init_args": chosen}
    trainer = config.get("trainer") or {}
    published["trainer"] = {name: trainer[name] for name in _TRAINER if trainer.get(name) is not None}
    if "seed_everything" in config:
        published["seed_everything"] = config["seed_everything"]
    return published


def _publish_source(source: Mapping[str, Any], names_sources: bool) -> Record:
    published = {}
    for key in ("sha256", "max_rows", "rows_read", "rows_chosen"):
        if source.get(key) is not None:
            published[key] = source[key]
    for rule in RULES:
        if source.get(rule):
            # The values may be the names of those whose rows were deleted; a list has the columns alone.
            published[rule] = source[rule] if names_sources else list(source[rule])
    if names_sources:
        # Base names alone, also of a record that was published before.
        published["path"] = _base_name(str(source.get("path", "")))
        published |= {key: source[key] for key in ("name", "split") if source.get(key) is not None}
    return published


def _publish_benchmark(results: Mapping[str, Any]) -> Record:
    published = dict(results)
    data = {}
    for stream, values in (results.get("data") or {}).items():
        data[stream] = {key: value for key, value in values.items() if key != "source"}
    published["data"] = data
    published.pop("retain_results", None)
    return published


def _hide_folders(value: Any) -> Any:
    """Return a value with absolute paths cut to their last part."""
    if isinstance(value, Mapping):
        # A template, and a prompt, is a text of the user's, whatever it begins with; one without a brace is a file.
        hidden = {}
        for key, entry in value.items():
            is_text = key in ("template", "chat_template", "text") and isinstance(entry, str) and "{" in entry
            hidden[key] = entry if is_text else _hide_folders(entry)
        return hidden
    if isinstance(value, list | tuple):
        return [_hide_folders(entry) for entry in value]
    if isinstance(value, str) and _is_absolute(value):
        return _base_name(value)
    return value


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "~/")) or PureWindowsPath(path).is_absolute()


def _base_name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name or path
