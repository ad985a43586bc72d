"""Run ``lit-unlearn compare``: results of several models side by side, or over seeds, as a table and a picture."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lit_unlearn.cli.cells import REPORT_FILE, STATE_FILE, list_states, read_state
from lit_unlearn.cli.main import print_warning
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import DataError
from lit_unlearn.evaluation.question_scores import compare_with_retain
from lit_unlearn.evaluation.results import Results, check_matched, check_same_rows, list_differences, results_table
from lit_unlearn.evaluation.seeds import Group, average_results, read_report, seeds_table
from lit_unlearn.plotting import draw_trade_off
from lit_unlearn.utils.io import atomic_file, check_output_file, read_json

# The axis of a sweep, in a cell such as "data_seed=0,seed=1".
_SEED_AXIS = re.compile(r"(?:^|,)seed=(\d+)(?=,|$)")
# In a path without one: a part such as "seed_1" or "pdu-seed2".
_SEED = re.compile(r"(?:^|[,_-])seed[=_-]?(\d+)(?=[,._-]|$)")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn compare",
        description="Shows results of several models side by side; with --seeds, means over seeds with intervals and tests.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="Files that `lit-unlearn evaluate` or `test` wrote, a fit's report.json, or the folder of a sweep.",
    )
    parser.add_argument(
        "--results", type=str, default=REPORT_FILE, metavar="NAME", help="Of a sweep: the file in its cells to compare."
    )
    parser.add_argument("--retain", type=Path, help="Results of the retain-only model, for scores that a file lacks.")
    parser.add_argument(
        "--matched",
        action="store_true",
        help="Refuse models that were not taken at the same damage, see method/matched/kl.yaml.",
    )
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="Put files together whose paths differ in the seed alone, such as `seed=0`: mean ± half the interval.",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="Of the intervals over seeds.")
    parser.add_argument(
        "--against", type=str, metavar="NAME", help="With --seeds: adds p-values of paired tests against this group."
    )
    parser.add_argument(
        "--names",
        nargs="+",
        type=str,
        help="Of the models or, with --seeds, of the groups, after the files; by default from the files' names.",
    )
    parser.add_argument(
        "--format", type=Literal["text", "markdown", "csv", "latex"], default="text", help="Of the table."
    )
    parser.add_argument("--output", type=Path, help="File for the table, instead of printing it.")
    parser.add_argument("--figure", type=Path, help="File for the picture, .png or .svg.")
    parser.add_argument("--overwrite", action="store_true", help="Replace these files, if they are there.")
    return parser


def run(arguments: list[str]) -> None:
    """Print a table and, if asked to, draw forgetting against utility."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    files = list_files(options.files, options.results)
    groups = group_by_seed(files) if options.seeds else {}
    names = options.names or (name_groups(list(groups)) if options.seeds else shorten_names(files))
    expected = len(groups or files)
    if len(names) != expected:
        what = "groups of seeds" if options.seeds else "results files"
        parser.error(f"{expected} {what} need as many --names, not {len(names)}")
    if options.figure and options.figure.suffix not in (".png", ".svg"):
        parser.error(f"--figure must end in .png or .svg, unlike '{options.figure}'")
    for name in ("output", "figure"):
        if (target := getattr(options, name)) is not None:
            check_output_file(target, argument=name, is_ours=lambda _: options.overwrite)
    if options.against is not None and not options.seeds:
        parser.error("--against compares groups of seeds: add --seeds")
    if options.seeds and len(set(names)) < len(names):
        parser.error(f"--names of groups must differ, unlike {', '.join(names)}")

    results = _read_comparable(files, options.retain)
    if options.seeds:
        text, names, shown = _compare_seeds(groups, names, results, options)
    else:
        if options.matched:
            check_matched(list(results.values()), [str(file) for file in results])
        names = [name for name, file in zip(names, files, strict=True) if file in results]
        shown = [results[file] for file in files if file in results]
        text = results_table(shown, names, options.format)
    if options.output is None:
        print(text)
    else:
        with atomic_file(options.output, may_replace=options.overwrite) as output:
            output.write_text(text + "\n", encoding="utf-8")
    if options.figure is not None:
        with atomic_file(options.figure, may_replace=options.overwrite) as output:
            draw_trade_off(shown, names, output)


def _compare_seeds(
    groups: Mapping[Path, Mapping[int, Path]],
    names: Sequence[str],
    results: Mapping[Path, Results],
    options: Namespace,
) -> tuple[str, list[str], list[Results]]:
    """Return the table over seeds, and names and means of the groups that have results, for the picture."""
    by_name: dict[str, Group] = {}
    for name, seeds in zip(names, groups.values(), strict=True):
        by_name[name] = {seed: results.get(file) for seed, file in seeds.items()}
    if options.matched:
        _check_matched_by_seed(groups, results)
    text = seeds_table(by_name, options.format, options.confidence, options.against)
    with_results = [name for name, group in by_name.items() if any(group.values())]
    return text, with_results, [average_results(by_name[name]) for name in with_results]


def _check_matched_by_seed(groups: Mapping[Path, Mapping[int, Path]], results: Mapping[Path, Results]) -> None:
    """Refuse models of one seed at different damage. Between seeds, a relative limit differs with the target model."""
    by_seed: dict[int, list[Path]] = {}
    for seeds in groups.values():
        for seed, file in seeds.items():
            if file in results:
                by_seed.setdefault(seed, []).append(file)
    for of_seed in by_seed.values():
        check_matched([results[file] for file in of_seed], [str(file) for file in of_seed])


def list_files(arguments: Sequence[Path], name: str) -> list[Path]:
    """Return the results files that are meant: of the folder of a sweep, one in every cell, whether it is there or not.

    Args:
        arguments: Files, and folders of sweeps.
        name: Of the file in a cell.

    Raises:
        DataError: If a folder is not that of a sweep.
    """
    files = []
    for argument in arguments:
        if argument.is_dir():
            files += [folder / name for folder, _ in list_states(argument)]
        else:
            files.append(argument)
    return files


def group_by_seed(files: Sequence[Path]) -> dict[Path, dict[int, Path]]:
    """Return files by seed, and by their path without it.

    Raises:
        DataError: If a path has no seed, or two paths are the same but for how they write it.

    Example:
        >>> groups = group_by_seed([Path("pdu,seed=0/tofu.json"), Path("pdu,seed=1/tofu.json"), Path("npo,seed=0/tofu.json")])
        >>> [(path.as_posix(), list(seeds)) for path, seeds in groups.items()]
        [('pdu/tofu.json', [0, 1]), ('npo/tofu.json', [0])]
    """
    groups: dict[Path, dict[int, Path]] = {}
    for file in files:
        parts, seed = [], None
        names = file.with_suffix("").parts
        pattern = _SEED_AXIS if any(map(_SEED_AXIS.search, names)) else _SEED
        for name in names:
            if match := pattern.search(name):
                seed = int(match[1])
                name = (name[: match.start()] + name[match.end() :]).lstrip(",_-")
            parts.append(name)
        if seed is None:
            raise DataError(f"'{file}' has no seed in its path, such as `seed=0`: rename it, or leave out `seeds`.")
        group = Path(f"{Path(*parts)}{file.suffix}")
        if seed in groups.setdefault(group, {}):
            raise DataError(f"'{file}' and '{groups[group][seed]}' are of the same seed: leave one of both out.")
        groups[group][seed] = file
    return groups


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


def _read_files(files: Sequence[Path]) -> dict[Path, Results]:
    """Return what files hold. A cell of a sweep that is not done has no results, whatever it has left: a warning says why.

    Raises:
        DataError: If no file is left.
    """
    read = {}
    for file in files:
        cell = next((folder for folder in file.parents if (folder / STATE_FILE).is_file()), None)
        state = None if cell is None else read_state(cell)
        if state is None or state.status == "done":
            read[file] = _read_results(file)
        else:
            print_warning(f"'{cell}' has no results: {state.status}, {state.reason or 'not ended yet'}")
    if not read:
        raise DataError("there are no results to compare: no cell is done.")
    return read


def _read_results(file: Path) -> Results:
    # The report of a fit has the values of its data module's rows.
    if file.name == REPORT_FILE:
        # Whatever is wrong with it, `Results.read` says so.
        with suppress(OSError, ValueError):
            content = read_json(file)
            if isinstance(content, dict) and {"after", "constraints", "verdict"} <= content.keys():
                return read_report(content)
    return Results.read(file)


def name_groups(groups: Sequence[Path]) -> list[str]:
    """Return the shortest names of groups: of files that are all called the same, those of their folders.

    Example:
        >>> name_groups([Path("runs/method=pdu,lr=0.1/tofu.json"), Path("runs/method=npo,lr=0.1/tofu.json")])
        ['method=pdu,lr=0.1', 'method=npo,lr=0.1']
    """
    if len(groups) > 1 and len({group.name for group in groups}) == 1:
        # With a suffix for `shorten_names` to cut off: that of "lr=0.1" is none.
        groups = [Path(f"{group.parent}.json") for group in groups]
    return shorten_names(groups)


def _read_comparable(files: Sequence[Path], retain: Path | None) -> dict[Path, Results]:
    """Return the results in files, without those of cells that have none.

    Raises:
        DataError: If they cannot be compared.
    """
    read = _read_files(files)
    # A report of an earlier version does not say which rows it is of: the others are checked against each other.
    with_rows = [file for file, results in read.items() if results.data]
    first = next(iter(with_rows or read))
    reference = read[first] if retain is None else Results.read(retain)
    whose = "the first model" if retain is None else "the retain-only model"
    comparable = {}
    for file, results in read.items():
        if with_rows and file not in with_rows:
            print_warning(
                f"'{file}' is a report that does not say which rows it is of: check that they are those of the others."
            )
        data = results.data or reference.data
        forget = data.get("forget", {"rows": None, "texts": None, "tokens": None})
        try:
            check_same_rows(results.benchmark, forget, reference, "forget", str(retain or first), whose)
            comparable[file] = results if retain is None else _add_scores(results, reference, file)
        except ValueError as error:
            raise DataError(f"'{file}': {error}") from error
    if differ := list_differences([reference, *comparable.values()]):
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
