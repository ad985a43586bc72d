"""``lit-unlearn compare``: results of several models side by side, as a table and a picture."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_unlearn.evaluation.qa import against_retain
from lit_unlearn.evaluation.results import Results, check_same_rows, differences, read_results, results_table
from lit_unlearn.plotting import draw_trade_off
from lit_unlearn.utils.io import atomic_file


def run(arguments: list[str]) -> None:
    """Prints a table and, if asked to, draws forgetting against utility.

    Args:
        arguments: After the command's name.

    Raises:
        ValueError: If results are of different suites or forget rows, or lack what the picture shows.
    """
    parser = argparse.ArgumentParser(prog="lit-unlearn compare", description="Results of several models side by side.")
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS", help="files that `lit-unlearn test` wrote")
    parser.add_argument("--retain", type=Path, help="results of the retain-only model, for scores that a file lacks")
    parser.add_argument("--names", nargs="+", help="of the models, after the files (default: from the files' names)")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="of the table")
    parser.add_argument("--output", type=Path, help="file for the table, instead of printing it")
    parser.add_argument("--figure", type=Path, help="file for the picture, .png or .svg")
    options = parser.parse_args(arguments)
    names = options.names or short_names(options.files)
    if len(names) != len(options.files):
        parser.error(f"{len(options.files)} results files need as many --names, not {len(names)}")
    if options.figure and options.figure.suffix not in (".png", ".svg"):
        parser.error(f"--figure must end in .png or .svg, unlike '{options.figure}'")
    results = _read(options.files, options.retain)
    text = results_table(results, names, options.format)
    if options.output is None:
        print(text)
    else:
        with atomic_file(options.output) as file:
            file.write_text(text + "\n", encoding="utf-8")
    if options.figure is not None:
        with atomic_file(options.figure) as file:
            draw_trade_off(results, names, file)


def short_names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of paths, without suffix, that tell files apart; numbered where nothing does.

    Example:
        >>> short_names([Path("npo/tofu.json"), Path("pdu/tofu.json"), Path("target.json"), Path("target.json")])
        ['npo/tofu', 'pdu/tofu', 'target (1)', 'target (2)']
    """
    paths = [file.absolute().with_suffix("").parts for file in files]
    names = []
    for own in paths:
        unique = (n for n in range(1, len(own)) if [path[-n:] for path in paths].count(own[-n:]) == 1)
        names.append("/".join(own[-next(unique, 1) :]))
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


def _read(files: Sequence[Path], retain: Path | None) -> list[Results]:
    """The results, on the same forget rows, with the scores that compare with the retain-only model's."""
    other, whose = (files[0], "the first model") if retain is None else (retain, "the retain-only model")
    reference, found = read_results(other), []
    for file in files:
        one = read_results(file)
        forget = one["data"].get("forget", {"rows": None, "texts": None, "tokens": None})
        try:
            check_same_rows({"suite": one["suite"], "data": forget}, reference, "forget", str(other), whose)
            found.append(one if retain is None else _with_scores(one, reference, file))
        except ValueError as error:
            raise ValueError(f"'{file}': {error}") from error
    if differ := differences([reference, *found]):
        _warn(f"the results differ in {', '.join(differ)}: do not compare values that depend on that.")
    return found


def _with_scores(results: Results, retain: Results, file: Path) -> Results:
    """Results that have what `against_retain` gives, as they were measured or else from their examples."""
    own = {name: value for name, value in results["aggregate"].items() if value is not None}
    scores = against_retain(results["examples"], retain)
    numbers = {name: score for name, score in scores.items() if not isinstance(score, str)}
    values = {**numbers, **own}
    if not scores:
        _warn(f"'{file}' has no truth ratios, nor Min-K of forget and holdout rows: --retain adds nothing to it.")
    for name, score in scores.items():
        if name not in values:
            _warn(f"{name} of '{file}' is missing: {score}.")
        elif name in numbers and not math.isclose(values[name], score):
            _warn(
                f"'{file}' was compared with other retain-only results: its {name} stays; by --retain, it is {score:.4g}."
            )
    return {**results, "aggregate": values}


def _warn(message: str) -> None:
    print(f"lit-unlearn: warning: {message}", file=sys.stderr)
