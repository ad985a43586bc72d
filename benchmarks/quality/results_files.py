"""Result files of the sweep: one JSON Lines file per stage, one line per unit, sorted by the unit's name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import protocol
from lit_unlearn.utils.io import atomic_file

RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


def unit_name(unit: Mapping[str, Any]) -> str:
    """Return the name that identifies a unit within its stage, such as ``pdu-4-0``."""
    return f"{unit['label']}-{unit['size'] or 'all'}-{unit['seed']}"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a missing file has no lines."""
    if not path.is_file():
        return []
    # Not `splitlines`: it also splits at characters such as U+2028, which JSON leaves inside strings.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file; an interrupted write leaves the previous file as it was."""
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_results(results: Path, stage: str) -> list[Result]:
    """Read all results of a stage, sorted by unit name.

    Raises:
        ValueError: If some were made under another protocol: their numbers do not belong in the same table.
    """
    stage_results = read_json_lines(results / f"{stage}.jsonl")
    foreign = {result["protocol"] for result in stage_results} - {protocol.digest()}
    if foreign:
        raise ValueError(
            f"'{results / stage}.jsonl' has results of another protocol ({', '.join(sorted(foreign))}): remove or rerun them."
        )
    return stage_results


def write_result(results: Path, result: Result) -> None:
    """Add the result of a unit to its stage's file, or replace the unit's earlier result.

    The file is read again before every write, so that two sweeps with different units can share a folder.
    """
    path, name = results / f"{result['unit']['stage']}.jsonl", unit_name(result["unit"])
    rows = [row for row in read_json_lines(path) if unit_name(row["unit"]) != name]
    rows.append(round_numbers(result))
    # Sorted, so that the file's history in git shows which results changed, whatever order they ran in.
    rows.sort(key=lambda row: unit_name(row["unit"]))
    write_json_lines(path, rows)


def select_results(results: Sequence[Result], **values: Any) -> list[Result]:
    """Return the results whose unit has the given values, such as ``label="pdu", size=4``."""
    return [result for result in results if values.items() <= result["unit"].items()]


def drop_failed(results: Sequence[Result]) -> list[Result]:
    """Return the results without an error."""
    return [result for result in results if "error" not in result]


def round_numbers(value: Any) -> Any:
    """Round every number to four digits, which is enough for the tables and keeps the files small."""
    if isinstance(value, float):
        # JSON has no infinity and no nan; they are stored as text.
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: round_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_numbers(item) for item in value]
    return value
