"""One line of a results file for each cell of a sweep: what ran, at which commit, and what it measured."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.measuring import ATTACK_FOLDER, DEPTH_FILE, TOFU_FILE
from benchmarks.quality.results_files import read_json_lines, round_numbers, write_json_lines
from benchmarks.quality.run_unit import WORK_FOLDER, describe_commit
from lit_unlearn.cli.cells import REPORT_FILE, CellState, read_state
from lit_unlearn.cli.grid import Cell, read_sweep
from lit_unlearn.utils.io import read_json

Line = dict[str, Any]
"""A cell's result: ``cell``, ``labels``, ``protocol``, ``commit``, ``commands``, ``digests`` and ``seconds``, the values of each file
under its name, and of a cell that failed ``error``."""

# Of every forget row, beside the means: forget quality and fluency are computed from them.
_ROW_VALUES = ("truth_ratio", "fluency_nll", "repetition")
_SHOWN_ANSWERS = 3
# None is the fluency of an empty answer.
_NOT_MEASURED = "not measured"


def collect(file: Path, results: Path, protocol: str, work: Path) -> list[Line]:
    """Add the cells of a sweep that have ended to its results file, and return the lines of all its cells.

    A line whose cell has not changed stays as it is, with the commit that it was made at. So do lines of cells that are not here:
    they were run on another machine.

    Args:
        file: The sweep.
        results: The results file.
        protocol: Digest of the settings that the results were made with.
        work: Folder of everything that sweeps write, which stands as ``{work}`` in the lines.
    """
    output, cells = read_sweep(str(file))
    lines = {line["cell"]: line for line in read_json_lines(results)}
    for cell in cells:
        state = read_state(output / cell.name)
        if state.status not in ("done", "failed"):
            continue
        line = make_line(cell, state, output / cell.name, protocol, work)
        if _list_what_ran(line) != _list_what_ran(lines.get(cell.name, {})):
            lines[cell.name] = line
    # Sorted, so that the file's history in git shows which results changed, whatever order they ran in.
    write_json_lines(results, [line for _, line in sorted(lines.items())])
    return [lines[cell.name] for cell in cells if cell.name in lines]


def _list_what_ran(line: Line) -> list[Any]:
    # Seconds to four digits are not the same of another run.
    return [line.get(key) for key in ("protocol", "commands", "seconds", "error")]


def make_line(cell: Cell, state: CellState, folder: Path, protocol: str, work: Path) -> Line:
    """Return the line of a cell that has ended."""
    line: Line = {
        "cell": cell.name,
        "labels": read_labels(cell.name),
        "protocol": protocol,
        "commit": describe_commit(),
        "commands": list(map(shlex.join, cell.commands)),
        "digests": state.digests,
        "seconds": state.seconds,
    }
    if state.reason is not None:
        line["error"] = state.reason
    for name, (file, summarize) in _FILES.items():
        if (folder / file).is_file():
            line[name] = summarize(read_json(folder / file))
    # No line depends on where a machine has its folders.
    without_folders: Line = json.loads(json.dumps(line).replace(str(work), WORK_FOLDER))
    return round_numbers(without_folders)


def digest_settings(settings: Any) -> str:
    """Return the digest of plain values, by which results of another protocol are told."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_labels(cell: str) -> dict[str, str]:
    """Return the label of each axis from the name of a cell.

    Example:
        >>> read_labels("seed=0,method=pdu")
        {'seed': '0', 'method': 'pdu'}
    """
    return dict(part.split("=", 1) for part in cell.split(","))


def read_lines(results: Path, protocol: str) -> list[Line]:
    """Return the lines of a results file; none if there is no such file.

    Raises:
        ValueError: If some were made under another protocol: their numbers do not belong in the same table.
    """
    lines = read_json_lines(results)
    foreign = sorted({line["protocol"] for line in lines} - {protocol})
    if foreign:
        raise ValueError(f"'{results}' has results of another protocol ({', '.join(foreign)}): remove or rerun them.")
    return lines


def select_lines(lines: Sequence[Line], **labels: str) -> list[Line]:
    """Return the lines whose cells have the given labels, such as ``method="pdu", size="2"``."""
    return [line for line in lines if labels.items() <= line["labels"].items()]


# Files ----------------------------------------------------------------------------------------------------------------


def _summarize_report(report: Mapping[str, Any]) -> dict[str, Any]:
    # It may have the tokens of a row.
    return {**report, "example": None}


def _summarize_tofu(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the means, some values of each forget row, and three generated answers: TOFU's authors are made up."""
    rows = results["examples"]["forget"]
    of_rows = {}
    for name in _ROW_VALUES:
        column = [row.get(name, _NOT_MEASURED) for row in rows]
        if _NOT_MEASURED not in column:
            of_rows[name] = column
    answers = [row.get("generated") for row in rows[:_SHOWN_ANSWERS]]
    return {"aggregate": results["aggregate"], "missing": results["missing"], "forget": of_rows, "answers": answers}


def _summarize_attack(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each attack brought back with its largest effort, or why it was not tested."""
    attacks = {}
    for label, entry in report["attacks"].items():
        outcome = entry["model"]
        attacks[label] = outcome["points"][-1] if "points" in outcome else outcome
    return attacks


def _summarize_depth(results: Mapping[str, Any]) -> dict[str, Any]:
    return {**results["aggregate"]}


_FILES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "report": (REPORT_FILE, _summarize_report),
    "tofu": (TOFU_FILE, _summarize_tofu),
    "attack": (f"{ATTACK_FOLDER}/attack.json", _summarize_attack),
    "depth": (DEPTH_FILE, _summarize_depth),
}
