"""Run ``lit-unlearn ledger``: the deletion requests in a ledger, and the chain of models behind the newest one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.export.ledger import (
    Entry,
    find_latest_audit,
    format_ledger,
    list_ancestors,
    list_unaudited_requests,
    read_ledger,
    shorten_weights,
)


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn ledger",
        description="Checks a ledger and prints its entries, and the models that the newest one comes from, each with the newest "
        "audit of it. A fit appends to it with --export.ledger=FILE --export.request=ID, an audit with --ledger FILE.",
    )
    parser.add_argument("ledger", type=Path, metavar="LEDGER", help="File of JSON lines.")
    parser.add_argument("--request", type=str, metavar="ID", help="Only the entries of this request.")
    parser.add_argument("--format", type=Literal["text", "markdown", "csv"], default="text", help="Of the table.")
    return parser


def run(arguments: list[str]) -> None:
    """Print a ledger."""
    options = build_parser().parse_args(arguments)
    entries = read_ledger(options.ledger)
    shown = [entry for entry in entries if options.request in (None, entry["request"])]
    print(format_ledger(shown, options.format))
    exports = [entry for entry in shown if entry["kind"] == "export"]
    if exports and options.format == "text":
        print(_describe_chain(entries, exports[-1]))


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
            f"not audited on the newest model: {', '.join(unaudited)}. For each: lit-unlearn audit MODEL --policy FILE --forget FILE "
            "--retain FILE --request ID --ledger FILE"
        )
    return "\n".join(lines)
