"""Run ``lit-unlearn verify``: compute again what an export or an audit claims."""

from __future__ import annotations

from pathlib import Path

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.cli.questions import SETS, add_set_options
from lit_unlearn.errors import RequirementNotMet
from lit_unlearn.export.signature import read_public_key
from lit_unlearn.export.verification import verify_folder


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn verify",
        description="Computes again what the folder of an export or of an audit claims, and says what matches: the digests of its "
        "files, of an audit the intervals, outcomes and page and, with the model and the rows at hand, their digests. Exit code 1 "
        "if anything differs.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="Folder of an export, or of an audit.")
    parser.add_argument("--model", type=str, metavar="DIR", help="Of an audit: the model that was audited.")
    parser.add_argument(
        "--public_key", type=str, metavar="KEY", help="Of an audit: who must have signed it, a PEM file or 64 digits."
    )
    parser.add_argument(
        "--policy", type=str, metavar="FILE", help="Of an audit: its policy, to compare the thresholds."
    )
    add_set_options(parser, takes_rules=False)
    return parser


def run(arguments: list[str]) -> None:
    """Print every comparison, and fail if something differs.

    Raises:
        RequirementNotMet: If something differs.
    """
    options = build_parser().parse_args(arguments)
    sets = {name: getattr(options, name) for name in SETS if getattr(options, name) is not None}
    public_key = None if options.public_key is None else read_public_key(options.public_key)
    checks = verify_folder(options.folder, options.model, sets, public_key, options.policy)
    for check in checks:
        word = {True: "matches", False: "DIFFERS", None: "not checked"}[check.matches]
        print(f"{word:<12} {check.subject}{f': {check.detail}' if check.detail else ''}")
    differences = [check.subject for check in checks if check.matches is False]
    print(f"{len(checks)} comparisons, {len(differences)} of which differ")
    if differences:
        raise RequirementNotMet(f"'{options.folder}' is not what it claims: {', '.join(differences)}.")
