"""The folder of an audit: ``audit.json`` for programs, ``audit.html`` for people, and the digests of both."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_unlearn.data.source import digest_if_whole
from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import ModelError
from lit_unlearn.evaluation.audit import AuditResult
from lit_unlearn.evaluation.results import Values, package_versions
from lit_unlearn.export.audit_page import render_page
from lit_unlearn.export.card import PROMPT_SETTINGS
from lit_unlearn.export.record import RECORD_FILE, Record, digest_export, find_chat_template
from lit_unlearn.export.signature import SIGNATURE_SUFFIX, write_signature
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.folders import replace_folder
from lit_unlearn.utils.io import atomic_file, file_digest, read_json, write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

AUDIT_FILE, PAGE_FILE = "audit.json", "audit.html"
FORMAT = 1
"""Of ``audit.json``; a change that readers must know of raises it."""

_QUESTION_SETTINGS = ("question_column", "answer_column", "template", "max_length", *PROMPT_SETTINGS)


def read_record(model: str | Path) -> Record | None:
    """Return the record of an export; ``None`` of a model that is none, such as one on the hub."""
    file = Path(model) / RECORD_FILE
    return read_json(file) if file.is_file() else None


def read_question_settings(record: Record | None) -> dict[str, Any]:
    """Return the settings with which a benchmark of questions asks in the prompts of a run.

    Args:
        record: Of the run's export; ``None`` for the benchmark's defaults.
    """
    data = (record or {}).get("data") or {}
    settings = {name: data[name] for name in _QUESTION_SETTINGS if data.get(name) is not None}
    if "chat" in settings:
        # Its text: the file may be gone. The exported tokenizer has it too, but not that of a model which this one is compared with.
        settings["chat"] = Chat(**{**settings["chat"], "template": find_chat_template(record or {})})
    return settings


def load_described(lm: LanguageModel, dtype: str | None) -> Values:
    """Load a model, and return its name without its folders, its dtype, and digests of its weights and of its files, if they are here.

    Args:
        lm: The model.
        dtype: Of its weights, such as ``float32``; ``None`` for that of its files.

    Raises:
        ModelError: If its files were replaced meanwhile: the digests would be of other weights than those that are measured.
    """
    name = str(lm.name)
    is_local = Path(name).is_dir()
    files = digest_export(Path(name)) if is_local else {}
    lm.load(None if dtype is None else getattr(torch, dtype))
    if is_local and digest_export(Path(name)) != files:
        raise ModelError(f"the files in '{name}' were replaced while they were loaded: give the command again.")
    return {
        "name": Path(name).resolve().name if is_local else name,
        "dtype": str(lm.causal_lm.dtype).removeprefix("torch."),
        "weights": fingerprint(cast(nn.Module, lm.model))[:16],
        "files": files,
    }


def describe_record(model: str, examples_digest: str, file_sha256: str | None) -> Values | None:
    """Return the part of a model's record that an audit repeats: what was done, and whether these are its rows.

    Args:
        model: Directory or hub name.
        examples_digest: `digest_examples` of the forget rows, as the audit asks for them.
        file_sha256: The sha256 of their file; ``None`` if they are in no file.
    """
    record = read_record(model)
    if record is None:
        return None
    constraints = {}
    for name, values in (record.get("constraints") or {}).items():
        constraints[name] = {"value": values["value"], "epsilon": values["epsilon"]}
    method = record.get("method")
    sets = (record.get("data") or {}).get("sets") or {}
    forget = sets.get("forget") or {}
    is_same: bool | None = examples_digest == forget.get("sha256")
    if not is_same:
        # The same rows in another prompt, or others: their files tell, unless the run read only some rows of its file.
        is_same = _compare_files(forget.get("source") or {}, file_sha256)
    return {
        "kind": record["kind"],
        "sha256": file_digest(Path(model) / RECORD_FILE),
        "method": method and {"objective": method["objective"], "paper": method["paper"]},
        "constraints": constraints,
        "parent": {
            "name": Path(str(record["model"]["name"])).name,
            "weights": record["model"].get("weights") or {},
        },
        "forget": {"rows": forget.get("rows"), "sha256": forget.get("sha256")},
        "same_rows": is_same,
    }


def _compare_files(source: Values, digest: str | None) -> bool | None:
    """Return whether a file is the one that a run read whole; ``None`` where that cannot be told."""
    recorded = digest_if_whole(source)
    return None if digest is None or recorded is None else digest == recorded


def was_fixed_before(record: Record | None, policy_digest: str | None) -> bool | None:
    """Return whether the record of a run names this policy as the one of its audit; ``None`` if it names none."""
    plan = (record or {}).get("audit")
    return None if plan is None else plan["policy_sha256"] == policy_digest


def build_audit(
    result: AuditResult,
    *,
    model: Values,
    data: Mapping[str, Values],
    record: Values | None = None,
    policy_fixed_before: bool | None = None,
    compared_with: Mapping[str, Values] | None = None,
    settings: Values | None = None,
    request: str | None = None,
) -> dict[str, Any]:
    """Return the content of ``audit.json``: numbers, counts and digests, no text of a row.

    Args:
        result: Outcomes and numbers.
        model: From `load_described`.
        data: Description of every stream: ``rows``, ``texts``, ``tokens`` and, of a file, ``sha256``.
        record: From `describe_record`.
        policy_fixed_before: From `was_fixed_before`.
        compared_with: The other models, likewise, by role.
        settings: How the questions were put.
        request: Who asked for the deletion, as the user calls it.
    """
    streams = {}
    for stream, values in data.items():
        # The source is a path, which may name a person.
        streams[stream] = {key: value for key, value in values.items() if key != "source"}
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "request": request,
        "verdict": result.verdict,
        "policy": result.policy.describe(),
        "policy_fixed_before": policy_fixed_before,
        "model": model,
        "compared_with": dict(compared_with or {}),
        "record": record,
        "data": streams,
        "settings": settings or {},
        "versions": package_versions(),
        "findings": [finding.to_dict() for finding in result.findings],
    }


def write_audit(
    folder: Path, audit: dict[str, Any], key: Ed25519PrivateKey | None = None, record_file: Path | None = None
) -> None:
    """Write ``audit.json`` and ``audit.html``, and list their digests; an earlier audit there is replaced.

    Args:
        folder: The folder.
        audit: From `build_audit`.
        key: Signs the audit, and the record; ``None`` for no signature.
        record_file: The record of the audited model. Its signature stands in this folder too: the model's own stays as it is.

    Raises:
        OccupiedError: If the folder holds something that is not ours.
        OutputError: If it cannot be written.
    """
    with replace_folder(folder) as staging:
        write_json(staging / AUDIT_FILE, audit)
        # As it will be read again: a page can then be compared with its audit.
        with atomic_file(staging / PAGE_FILE) as file:
            file.write_text(render_page(read_json(staging / AUDIT_FILE)), encoding="utf-8")
        if key is not None:
            write_signature(staging / AUDIT_FILE, key)
            if record_file is not None and record_file.is_file():
                write_signature(record_file, key, staging / f"{RECORD_FILE}{SIGNATURE_SUFFIX}")
