"""The ledger of deletion requests: a file of JSON lines that is only ever appended to.

Every line holds the sha256 of the line before it, so that a line that was changed, removed or put in between shows; lines that
were cut off at the end do not, except to those who know the digest of the last one. Models are
known by the sha256 of their weight files: a model whose files an earlier entry wrote is that entry's child.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lit_unlearn.errors import DataError, MissingFileError, arguments_of
from lit_unlearn.evaluation.tables import TableStyle, format_table
from lit_unlearn.utils.io import check_output_file, output_errors

try:
    import fcntl
except ImportError:  # Windows, where there are no locks then
    fcntl = None  # type: ignore[assignment]

Entry = dict[str, Any]

_WEIGHTS = (".safetensors", ".bin", ".gguf")
# Objectives that are above 0 and of this model alone; others compare with a reference model, which is another one in a later run.
_BOUNDED = ("LogitMargin", "KLToUniform")
_ALLOWED = 1.2  # times what an earlier request achieved
_START = b'{"previous": '  # of every ledger
_KEYS = {"previous", "kind", "created", "request", "forget", "verdict", "model", "parent"}  # of every line
_SHORT = 8  # digits of a digest in the table


# Writing --------------------------------------------------------------------------------------------------------------


def check_ledger(file: Path, owner: object = None) -> None:
    """Refuse a file to which no entry can be appended, as far as that can be known before there is one.

    Args:
        file: The ledger; it need not exist yet.
        owner: The object whose argument ``ledger`` it is, for the error.

    Raises:
        ConfigError: If it is a folder, or its folder cannot be written to.
        DataError: If the file is there, and no ledger.
        OutputError: If it cannot be read.
    """
    with arguments_of(owner):
        check_output_file(file, argument="ledger")
        if file.is_file():
            with output_errors(file), file.open("rb") as stream:
                _check_start(file, stream.read(len(_START)))


def append_entry(file: Path, entry: Entry) -> Entry:
    """Append an entry to a ledger, whole or not at all; several processes may do so at the same time.

    Args:
        file: The ledger; it is created with its folder.
        entry: Plain types. ``previous``, the digest of the line before, is added.

    Returns:
        The entry as it was written.

    Raises:
        DataError: If the file is there, and no ledger.
        OutputError: If it cannot be written.
    """
    with output_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock_file(file) as descriptor:
            content = file.read_bytes()
            _check_start(file, content)
            lines = content.split(b"\n")
            # A machine that crashed may have left a part of a line, which stays: it is never written over.
            is_torn = lines[-1] != b""
            last = lines[-1] if is_torn else (lines[-2] if len(lines) > 1 else b"")
            written = {"previous": _digest_line(last), **entry}
            line = json.dumps(written, ensure_ascii=False).encode()
            # One write: a reader sees all of the line or nothing of it.
            appended = (b"\n" if is_torn else b"") + line + b"\n"
            if os.write(descriptor, appended) < len(appended):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
    return written


@contextmanager
def _lock_file(file: Path) -> Iterator[int]:
    """Open a file for appending, and wait until no other process appends to it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        # Closing unlocks it.
        os.close(descriptor)


def _digest_line(line: bytes) -> str | None:
    return hashlib.sha256(line).hexdigest() if line else None


def describe_export(record: Mapping[str, Any], request: str | None) -> Entry:
    """Return the entry of an export.

    Args:
        record: The content of its ``unlearning.json``.
        request: Who asked for the deletion, as the user calls it.

    Returns:
        Counts and digests of the deleted rows, method, bounds, verdict, the model and the one that it comes from. No text of
        a row, and no path.
    """
    # A ledger is printed at once, without what reads rows.
    from lit_unlearn.data.source import digest_if_whole

    forget = ((record.get("data") or {}).get("sets") or {}).get("forget") or {}
    method = record.get("method") or {}
    bounds = {}
    for name, values in (record.get("constraints") or {}).items():
        bounds[name] = {"value": values["value"], "epsilon": values["epsilon"]}
    files = record.get("files") or {}
    return {
        "kind": "export",
        "created": _now(),
        "request": request,
        "forget": {
            "rows": forget.get("rows"),
            "tokens_sha256": forget.get("sha256"),
            "file_sha256": digest_if_whole(forget.get("source") or {}),
            # What a later run has to keep up, see `build_constraints`.
            "loss": (record.get("after") or {}).get("forget/loss"),
        },
        "method": method.get("objective"),
        "method_settings": method.get("settings"),
        "bounds": bounds,
        "verdict": record.get("verdict"),
        "policy_sha256": (record.get("audit") or {}).get("policy_sha256"),
        "model": _select_weights(files),
        "parent": _select_weights(record["model"].get("weights") or {}),
    }


def describe_audit(audit: Mapping[str, Any]) -> Entry:
    """Return the entry of an audit, from the content of its ``audit.json``."""
    forget = audit["data"]["forget"]
    return {
        "kind": "audit",
        "created": _now(),
        "request": audit["request"],
        "forget": {"rows": forget["rows"], "texts": forget["texts"], "file_sha256": forget.get("sha256")},
        "verdict": audit["verdict"],
        "policy_sha256": audit["policy"]["sha256"],
        "model": _select_weights(audit["model"]["files"]),
        "parent": {},
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _select_weights(files: Mapping[str, str]) -> dict[str, str]:
    """Return the weight files in a model's folder; those of an adapter, in a folder below, only where there are no others."""
    weights = {name: digest for name, digest in files.items() if name.endswith(_WEIGHTS)}
    whole = {name: digest for name, digest in weights.items() if "/" not in name}
    return whole or weights


# Reading --------------------------------------------------------------------------------------------------------------


def read_ledger(file: Path) -> list[Entry]:
    """Read all entries, and check that no line was changed, removed or put in between.

    A part of a line that a crash left is skipped.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If a line is not that which the next one knows.
    """
    if not file.is_file():
        raise MissingFileError(f"there is no ledger '{file}': `--export.ledger=FILE` of a fit makes one.")
    # What follows the last line break is a part of a line, or nothing.
    content = file.read_bytes()
    _check_start(file, content)
    lines = content.split(b"\n")[:-1]
    entries = []
    previous: bytes = b""
    for number, line in enumerate(lines, 1):
        entry = _parse_line(line)
        # A torn line is known to the one that follows it by its digest, too.
        if entry is not None:
            lacking = _KEYS - entry.keys()
            if lacking:
                raise DataError(
                    f"line {number} of the ledger '{file}' has no '{sorted(lacking)[0]}': this package did not write it."
                )
            if entry.get("previous") != _digest_line(previous):
                raise DataError(
                    f"line {number} of the ledger '{file}' does not follow the line before it: a line was changed, removed or added "
                    "since it was written."
                )
            entries.append(entry)
        previous = line
    return entries


def _check_start(file: Path, content: bytes) -> None:
    """Raise DataError for a file that is no ledger; a crash may have left a part of the first line."""
    if content[: len(_START)] != _START[: len(content)]:
        raise DataError(f"'{file}' is no ledger: name a ledger, or a file that is not there yet.", argument="ledger")


def _parse_line(line: bytes) -> Entry | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def list_ancestors(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """Return the exports that a model comes from, the nearest one first.

    A model comes from an earlier export if that wrote the very weight files that it was made of.
    """
    ancestors: list[Entry] = []
    exports = [candidate for candidate in entries if candidate["kind"] == "export" and candidate["model"]]
    current = entry
    while current["parent"]:
        position = _find_position(entries, current)
        # Only what was written before: two exports with equal files do not make a circle.
        matches = [
            candidate
            for candidate in exports
            if candidate["model"] == current["parent"] and _find_position(entries, candidate) < position
        ]
        if not matches:
            break
        current = matches[-1]
        ancestors.append(current)
    return ancestors


def _find_position(entries: Sequence[Entry], entry: Entry) -> int:
    return next(number for number, candidate in enumerate(entries) if candidate is entry)


def find_latest_audit(entries: Sequence[Entry], export: Entry) -> Entry | None:
    """Return the newest audit of the model that an export wrote; ``None`` if there is none."""
    audits = [entry for entry in entries if entry["kind"] == "audit" and entry["model"] == export["model"]]
    return audits[-1] if audits else None


def find_export(entries: Sequence[Entry], model: Path) -> Entry:
    """Return the newest export that wrote the weight files in a directory.

    Raises:
        DataError: If there is none.
    """
    from lit_unlearn.export.record import digest_export

    weights = _select_weights(digest_export(model))
    exports = [entry for entry in entries if entry["kind"] == "export" and entry["model"] == weights]
    if not exports:
        raise DataError(
            f"no export in the ledger wrote the weights in '{model}': give the model of the newest request."
        )
    return exports[-1]


def list_requests(entries: Sequence[Entry], newest: Entry) -> list[Entry]:
    """Return the exports that a model comes from and that were made for a request, its own among them, the oldest first.

    A request that was answered with other rows later has several. Of exports that deleted the same rows for the same request,
    the newest one stands for all.
    """
    chain = [newest, *list_ancestors(entries, newest)]
    exports: dict[tuple[Any, Any], Entry] = {}
    for entry in reversed(chain):
        if entry["request"] is not None:
            exports[entry["request"], _identify_rows(entry)] = entry
    return list(exports.values())


def _identify_rows(export: Entry) -> Any:
    """Return what tells the rows of one export from those of another: their file or, where a rule chose them, their tokens."""
    forget = export["forget"]
    return forget.get("file_sha256") or forget.get("tokens_sha256") or forget.get("rows")


def label_exports(exports: Iterable[Entry]) -> dict[str, Entry]:
    """Return exports by their requests; further exports of the same request are numbered.

    Args:
        exports: From `list_requests`.

    Example:
        >>> list(label_exports([{"request": "c-17"}, {"request": "c-18"}, {"request": "c-17"}]))
        ['c-17', 'c-18', 'c-17_2']
    """
    exports = list(exports)
    requests = {export["request"] for export in exports}
    labeled: dict[str, Entry] = {}
    for export in exports:
        label, number = export["request"], 1
        # Another request may be called "c-17_2" by its user: the number goes on then.
        while label in labeled or (number > 1 and label in requests):
            number += 1
            label = f"{export['request']}_{number}"
        labeled[label] = export
    return labeled


def name_requests(requests: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Return a name for each request that can be a folder's and a constraint's: letters, digits and underscores.

    Args:
        requests: As `label_exports` calls them.
        prefix: Of every name.

    Raises:
        DataError: If two requests would get the same name.
    """
    names: dict[str, str] = {}
    for request in requests:
        name = prefix + re.sub(r"\W", "_", request)
        for other, name_of_other in names.items():
            if name == name_of_other and other != request:
                raise DataError(
                    f"the requests '{other}' and '{request}' differ only in characters that a name cannot have: both would be '{name}'. "
                    "Write the later one's audit or constraint by hand."
                )
        names[request] = name
    return names


def match_rows(exports: Sequence[Entry], files: Sequence[str]) -> dict[str, str]:
    """Find the file of forget rows of every export by its sha256, which is all that a ledger has of it.

    Args:
        exports: From `list_requests`.
        files: Files of rows, in any order.

    Returns:
        Files by request, as `label_exports` calls it; one is missing if none of the files has its digest, or if a rule chose its
        rows from a file.
    """
    from lit_unlearn.data.source import Source

    by_digest = {Source(file).digest(): file for file in files}
    matches = {}
    for request, entry in label_exports(exports).items():
        digest = entry["forget"].get("file_sha256")
        if digest is not None and digest in by_digest:
            matches[request] = by_digest[digest]
    return matches


def build_constraints(exports: Sequence[Entry], files: Mapping[str, str]) -> dict[str, Any]:
    """Return a configuration that bounds how far earlier requests may come back, for a run that answers a later one.

    On the rows of each of them, its own forgetting objective must stay below 1.2 times what its own run achieved; the factor is a
    choice, which a line of the file changes. A request with several exports gets a constraint for the rows of each.

    Args:
        exports: From `list_requests`.
        files: From `match_rows`.

    Raises:
        DataError: If the rows of a request are not known, or its objective is no bound: a run would silently not remember it.
    """
    # An overlay has to list the other constraints; every packaged method has this one.
    constraints: dict[str, Any] = {"nll": {}}
    streams: dict[str, Any] = {}
    labeled = label_exports(exports)
    names = name_requests(labeled, "forgotten_")
    for request, entry in labeled.items():
        achieved = entry["forget"].get("loss")
        if request not in files:
            raise DataError(f"no file among --rows has the digest of the forget rows of request '{request}'.")
        if entry["method"] not in _BOUNDED or not achieved:
            raise DataError(
                f"request '{request}' was answered with {entry['method']}, whose value is no bound in another run: write its constraint "
                f"by hand. Bounds are known of {', '.join(_BOUNDED)}."
            )
        name = names[request]
        constraints[name] = {
            "objective": {"class_path": entry["method"], "init_args": entry.get("method_settings") or {}},
            "epsilon": _ALLOWED * achieved,
            "multiplier": {"class_path": "DualAscent", "init_args": {"lr": 1, "init": 0, "max": None}},
            "stream": name,
            "warmup_epochs": 0,
        }
        streams[name] = {"path": str(Path(files[request]).resolve())}
    return {"model": {"constraints": constraints}, "data": {"init_args": {"streams": streams}}}


def find_request_audit(
    entries: Sequence[Entry], newest: Entry, export: Entry, policy_sha256: str | None = None
) -> Entry | None:
    """Return the newest audit of a request's deletion on the newest model; ``None`` if there is none.

    An audit counts only if it was of the rows of the export: of the same file, or of as many rows where a rule chose them.

    Args:
        entries: Of the ledger.
        newest: The export of the newest model.
        export: The export that was made for the request, from `list_requests`.
        policy_sha256: Of the policy that counts; ``None`` for any.
    """
    audits = []
    for entry in entries:
        is_of_request = entry["kind"] == "audit" and entry["request"] == export["request"]
        is_of_policy = policy_sha256 in (None, entry.get("policy_sha256"))
        if is_of_request and is_of_policy and entry["model"] == newest["model"]:
            audits.append(entry)

    file_sha256 = export["forget"].get("file_sha256")
    if file_sha256 is None:
        exports = [other for other in list_requests(entries, newest) if other["request"] == export["request"]]
        return _find_audit_by_count(audits, export, exports)
    of_file = [audit for audit in audits if audit["forget"].get("file_sha256") == file_sha256]
    return of_file[-1] if of_file else None


def _find_audit_by_count(audits: Sequence[Entry], export: Entry, exports: Sequence[Entry]) -> Entry | None:
    """Return the newest audit of as many rows as a rule chose for an export; ``None`` if there is none.

    Args:
        audits: Of the request on the newest model, the oldest first.
        export: The export whose rows a rule chose.
        exports: All exports of its request.
    """
    # The file of another export is known to have other rows.
    files_of_others = {other["forget"].get("file_sha256") for other in exports} - {None}
    by_texts: dict[Any, Entry] = {}
    for audit in audits:
        rows = audit["forget"]
        if rows.get("rows") == export["forget"].get("rows") and rows.get("file_sha256") not in files_of_others:
            # The newest one comes last.
            by_texts.pop(rows.get("texts"), None)
            by_texts[rows.get("texts")] = audit

    # Where rules chose as many rows for several exports, nothing says which of them an audit measured. Each takes one of other
    # rows, so that no audit counts twice.
    same_count = [
        other
        for other in exports
        if other["forget"].get("file_sha256") is None and other["forget"].get("rows") == export["forget"].get("rows")
    ]
    position = _find_position(same_count, export)
    newest_first = list(by_texts.values())[::-1]
    return newest_first[position] if position < len(newest_first) else None


def list_unaudited_requests(entries: Sequence[Entry], newest: Entry) -> list[str]:
    """Return the requests whose deletion was not audited on the newest model: what was forgotten for them may have come back.

    Args:
        entries: Of the ledger.
        newest: The export of the newest model.

    Returns:
        Requests, as `label_exports` calls them.
    """
    requests = []
    for request, export in label_exports(list_requests(entries, newest)).items():
        if find_request_audit(entries, newest, export) is None:
            requests.append(request)
    return requests


def format_ledger(entries: Sequence[Entry], style: TableStyle = "text") -> str:
    """Format a ledger as a table, one line per entry, each model by the first digits of its weights' digest."""
    headers = ["no.", "kind", "created", "request", "rows", "method", "bounds", "verdict", "model", "made from"]
    rows = []
    for number, entry in enumerate(entries, 1):
        bounds = []
        for name, values in (entry.get("bounds") or {}).items():
            bounds.append(f"{name} {_shorten_number(values['value'])} ≤ {_shorten_number(values['epsilon'])}")
        rows.append(
            [
                *(number, entry["kind"], entry["created"], entry["request"], entry["forget"]["rows"]),
                *(entry.get("method"), "; ".join(bounds) or None, entry["verdict"]),
                *(shorten_weights(entry["model"]), shorten_weights(entry["parent"])),
            ]
        )
    return format_table(rows, headers, style)


def _shorten_number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def shorten_weights(weights: Mapping[str, str]) -> str | None:
    """Return the first digits that stand for a model's weight files; ``None`` if none are known."""
    if not weights:
        return None
    if len(weights) == 1:
        return next(iter(weights.values()))[:_SHORT]
    # Of several files, a digest of their digests.
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:_SHORT]
