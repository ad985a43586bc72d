"""Run ``lit-unlearn ledger``: the deletion requests in a ledger, which of them hold on the newest model, and how to keep that."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Literal

import yaml

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import ConfigError, DataError, NotDecidable, OccupiedError, RequirementNotMet
from lit_unlearn.export.ledger import (
    Entry,
    build_constraints,
    find_export,
    find_latest_audit,
    find_request_audit,
    format_ledger,
    label_exports,
    list_ancestors,
    list_requests,
    list_unaudited_requests,
    match_rows,
    name_requests,
    read_ledger,
    shorten_weights,
)
from lit_unlearn.utils.io import atomic_file

_AUDIT_OPTIONS = ("policy", "retain", "holdout", "general", "retain_only", "before", "key")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn ledger",
        description="Checks a ledger and prints its entries, and the models that the newest one comes from, each with the newest "
        "audit of it. A fit appends to it with --export.ledger=FILE --export.request=ID, an audit with --ledger FILE. With --audit, audits "
        "earlier requests on the newest model; with --remember, writes constraints that keep them forgotten in the next run.",
    )
    parser.add_argument("ledger", type=Path, metavar="LEDGER", help="File of JSON lines.")
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="MODEL",
        help="The newest model: audits every request behind it that was not audited on it. Needs --policy, --retain and --rows.",
    )
    parser.add_argument(
        "--remember",
        type=Path,
        metavar="FILE",
        help="Writes a configuration with a constraint for every request behind the newest model, for `fit --config FILE`. Needs --rows.",
    )
    parser.add_argument(
        "--rows", type=str, nargs="+", default=[], metavar="FILE", help="Files of forget rows, found by their digests."
    )
    for name in _AUDIT_OPTIONS:
        parser.add_argument(f"--{name}", type=str, metavar="FILE", help="As for `lit-unlearn audit`.")
    parser.add_argument("--output", type=Path, default=Path("audits"), metavar="DIR", help="Folder of the audits.")
    parser.add_argument("--request", type=str, metavar="ID", help="Only the entries of this request.")
    parser.add_argument("--format", type=Literal["text", "markdown", "csv"], default="text", help="Of the table.")
    return parser


def run(arguments: list[str]) -> None:
    """Print a ledger."""
    options = build_parser().parse_args(arguments)
    entries = read_ledger(options.ledger)
    if options.audit is not None:
        _audit_requests(options, entries)
        return
    if options.remember is not None:
        _write_constraints(options, entries)
        return
    shown = [entry for entry in entries if options.request in (None, entry["request"])]
    print(format_ledger(shown, options.format))
    exports = [entry for entry in shown if entry["kind"] == "export"]
    if exports and options.format == "text":
        print(_describe_chain(entries, exports[-1]))


def _audit_requests(options: Namespace, entries: list[Entry]) -> None:
    """Audit the requests behind a model that were not audited on it by this policy.

    Raises:
        RequirementNotMet: If the newest audit of one of them fails, now or earlier.
        NotDecidable: If none does, and one is not decidable or its rows were not given.
    """
    # A ledger is printed at once, without what measures models.
    from lit_unlearn.cli import audit
    from lit_unlearn.evaluation.audit import FAIL, PASS
    from lit_unlearn.evaluation.audit_policy import read_policy

    for name in ("policy", "retain"):
        if getattr(options, name) is None:
            raise ConfigError(f"--audit needs --{name} FILE.", argument=name)
    newest = find_export(entries, options.audit)
    exports = list_requests(entries, newest)
    files = match_rows(exports, options.rows)
    arguments = [str(options.audit), f"--ledger={options.ledger}"]
    for name in _AUDIT_OPTIONS:
        if getattr(options, name) is not None:
            arguments.append(f"--{name}={getattr(options, name)}")

    failed: list[str] = []
    undecided: list[str] = []
    policy = read_policy(options.policy)
    # A request with several exports has rows in several files, and an audit of each: c-17 and c-17_2.
    labeled = label_exports(exports)
    for request, folder in name_requests(labeled).items():
        print(f"\nrequest {request}")
        earlier = find_request_audit(entries, newest, labeled[request], policy.sha256)
        if earlier is not None:
            print(f"audited on {earlier['created']}: {earlier['verdict']}")
            if earlier["verdict"] != PASS:
                (failed if earlier["verdict"] == FAIL else undecided).append(request)
            continue
        if request not in files:
            print("not tested: no file among --rows has the digest of its forget rows")
            undecided.append(request)
            continue
        try:
            audit.run(
                [
                    *arguments,
                    f"--forget={files[request]}",
                    f"--request={labeled[request]['request']}",
                    f"--output={options.output / folder}",
                ]
            )
        except RequirementNotMet:
            failed.append(request)
        except NotDecidable:
            undecided.append(request)
    if failed:
        raise RequirementNotMet(f"deletions that do not hold on '{options.audit}': {', '.join(failed)}.")
    if undecided:
        raise NotDecidable(f"not shown to hold on '{options.audit}': {', '.join(undecided)}.")
    print(f"every request behind '{options.audit}' passes on it")


def _write_constraints(options: Namespace, entries: list[Entry]) -> None:
    if options.remember.exists():
        # Somebody may have edited it.
        raise OccupiedError(
            f"'{options.remember}' is there already, and may have been edited: give another --remember."
        )
    exports = [entry for entry in entries if entry["kind"] == "export"]
    requests = list_requests(entries, exports[-1]) if exports else []
    if not requests:
        raise DataError(f"the ledger '{options.ledger}' has no export that was made for a request.")
    content = build_constraints(requests, match_rows(requests, options.rows))
    with atomic_file(options.remember) as file:
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    print(
        f"constraints that keep earlier requests forgotten: {', '.join(label_exports(requests))}. Add --config {options.remember} "
        "to the next fit, after its other ones"
    )


def _describe_chain(entries: list[Entry], newest: Entry) -> str:
    lines = ["\nthe newest model and those that it comes from:"]
    chain = [newest, *list_ancestors(entries, newest)]
    for entry in chain:
        audit = find_latest_audit(entries, entry)
        verdict = "not audited" if audit is None else f"audit: {audit['verdict']}"
        lines.append(f"  {shorten_weights(entry['model'])}  request {entry['request'] or 'without an id'}; {verdict}")
    origin = shorten_weights(chain[-1]["parent"])
    if origin is not None:
        lines.append(f"  {origin}  the model that all began with, or one that is in no ledger")
    if unaudited := list_unaudited_requests(entries, newest):
        lines.append(
            f"not audited on the newest model: {', '.join(unaudited)}. To do so: lit-unlearn ledger LEDGER --audit MODEL --policy FILE "
            "--retain FILE --rows FILE …"
        )
    return "\n".join(lines)
