"""Run ``lit-unlearn compare``: results of several models side by side, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lit_unlearn.cli.main import print_warning
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import DataError
from lit_unlearn.evaluation.question_scores import compare_with_retain
from lit_unlearn.evaluation.results import Results, check_matched, check_same_rows, list_differences, results_table
from lit_unlearn.plotting import draw_trade_off
from lit_unlearn.utils.io import atomic_file


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(prog="lit-unlearn compare", description="Shows results of several models side by side.")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="RESULTS", help="Files that `lit-unlearn evaluate` or `test` wrote."
    )
    parser.add_argument("--retain", type=Path, help="Results of the retain-only model, for scores that a file lacks.")
    parser.add_argument(
        "--matched",
        action="store_true",
        help="Refuse models that were not taken at the same damage, see method/matched/kl.yaml.",
    )
    parser.add_argument(
        "--names", nargs="+", type=str, help="Of the models, after the files; by default from the files' names."
    )
    parser.add_argument("--format", type=Literal["text", "markdown", "csv"], default="text", help="Of the table.")
    parser.add_argument("--output", type=Path, help="File for the table, instead of printing it.")
    parser.add_argument("--figure", type=Path, help="File for the picture, .png or .svg.")
    return parser


def run(arguments: list[str]) -> None:
    """Print a table and, if asked to, draw forgetting against utility."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    names = options.names or shorten_names(options.files)
    if len(names) != len(options.files):
        parser.error(f"{len(options.files)} results files need as many --names, not {len(names)}")
    if options.figure and options.figure.suffix not in (".png", ".svg"):
        parser.error(f"--figure must end in .png or .svg, unlike '{options.figure}'")

    results = _read_comparable(options.files, options.retain)
    if options.matched:
        check_matched(results, [str(file) for file in options.files])
    text = results_table(results, names, options.format)
    if options.output is None:
        print(text)
    else:
        with atomic_file(options.output) as file:
            file.write_text(text + "\n", encoding="utf-8")
    if options.figure is not None:
        with atomic_file(options.figure) as file:
            draw_trade_off(results, names, file)


def shorten_names(files: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths, without suffix, that tell files apart; equal paths get a number.

    Example:
        >>> shorten_names([Path("npo/tofu.json"), Path("pdu/tofu.json"), Path("target.json"), Path("target.json")])
        ['npo/tofu', 'pdu/tofu', 'target (1)', 'target (2)']
    """
    paths = [file.absolute().with_suffix("").parts for file in files]
    names: list[str] = []
    for path in paths:
        length = 1
        while length < len(path) and [candidate[-length:] for candidate in paths].count(path[-length:]) > 1:
            length += 1
        # No end of equal paths is unique: they keep the file's name.
        names.append("/".join(path[-length:]) if length < len(path) else path[-1])

    numbered = []
    for position, name in enumerate(names):
        number = names[: position + 1].count(name)
        numbered.append(f"{name} ({number})" if names.count(name) > 1 else name)
    return numbered


def _read_comparable(files: Sequence[Path], retain: Path | None) -> list[Results]:
    reference = Results.read(retain or files[0])
    whose = "the first model" if retain is None else "the retain-only model"
    comparable = []
    for file in files:
        results = Results.read(file)
        forget = results.data.get("forget", {"rows": None, "texts": None, "tokens": None})
        try:
            check_same_rows(results.benchmark, forget, reference, "forget", str(retain or files[0]), whose)
            comparable.append(results if retain is None else _add_scores(results, reference, file))
        except ValueError as error:
            raise DataError(f"'{file}': {error}") from error
    if differ := list_differences([reference, *comparable]):
        print_warning(f"the results differ in {', '.join(differ)}: do not compare values that depend on that.")
    return comparable


def _add_scores(results: Results, retain: Results, file: Path) -> Results:
    compared = compare_with_retain(results.examples, retain)
    if not compared.values and not compared.missing:
        print_warning(
            f"'{file}' has no truth ratios, nor Min-K of forget and holdout rows: --retain adds nothing to it."
        )
    for name, reason in compared.missing.items():
        if name not in results.aggregate:
            print_warning(f"{name} of '{file}' is missing: {reason}.")
    for name, score in compared.values.items():
        # A benchmark that ran with other retain-only results has measured the same score against those: it stays.
        if not math.isclose(results.aggregate.get(name, score), score):
            measured = results.aggregate[name]
            print_warning(
                f"'{file}' was compared with other retain-only results: its {name} stays {measured:.4g}; by --retain, it is "
                f"{score:.4g}."
            )
    return replace(results, aggregate={**compared.values, **results.aggregate})
