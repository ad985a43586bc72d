"""Run ``lit-unlearn sweep``: a fit, and what measures its model, for every combination of a grid."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from lit_unlearn.cli.cells import (
    AUDIT_FILE,
    REPORT_FILE,
    CellState,
    Processes,
    check_unchanged,
    read_state,
    run_cells,
)
from lit_unlearn.cli.grid import Cell, read_sweep
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import ConfigError, RequirementNotMet
from lit_unlearn.evaluation.tables import TableStyle, format_table
from lit_unlearn.evaluation.verdict import is_feasible
from lit_unlearn.utils.io import check_writable, read_json

_HEADERS = ("cell", "state", "s", "verdict", "forget p", "retain p", "constraints", "audit", "reason")


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn sweep",
        description="Runs a fit, and the commands that measure its model, for every combination of a grid: seeds, methods, any "
        "setting. Every cell has a folder. The same command continues after an interruption, and may run several times at once, "
        "also on machines that share the folder: each cell is run by one of them. `lit-unlearn compare` shows the results.",
        epilog="A cell that fails, or is killed, is a row with its reason, and the others run; the exit code is 1 then.",
    )
    parser.add_argument("file", type=str, metavar="FILE", help="A YAML file, or a packaged one: sweep/demo.yaml.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="Folder of the cells; by default as the file says.")
    parser.add_argument("--jobs", type=PositiveInt, default=1, metavar="N", help="Cells side by side.")
    parser.add_argument(
        "--only", type=str, nargs="+", metavar="NAME", help="Only these cells; * stands for anything: 'seed=0,*'."
    )
    parser.add_argument("--retry", action="store_true", help="Continue cells that failed with the command that did.")
    parser.add_argument("--list", action="store_true", help="Run nothing: show the cells and what is known of them.")
    parser.add_argument(
        "--format", type=Literal["text", "markdown", "csv", "latex"], default="text", help="Of the table."
    )
    return parser


def run(arguments: list[str]) -> None:
    """Run what is left of a sweep, and print a table of its cells.

    Raises:
        RequirementNotMet: If a cell has failed or was interrupted.
    """
    options = build_parser().parse_args(arguments)
    output, cells = read_sweep(options.file)
    output = options.output or output
    cells = select_cells(cells, options.only)
    if options.list:
        print(cells_table(cells, output, options.format))
        return

    # Everything that can be refused is refused before a cell is begun.
    check_writable(output, argument="output")
    for cell in cells:
        check_unchanged(cell, read_state(output / cell.name))
    _run_all(cells, output, options.jobs, options.retry)
    print(cells_table(cells, output, options.format))
    stopped = [cell.name for cell in cells if read_state(output / cell.name).reason is not None]
    if stopped:
        raise RequirementNotMet(
            f"{len(stopped)} of {len(cells)} cells failed or were interrupted: {', '.join(stopped)}. See log.txt in their folders; the "
            "same command continues the interrupted ones, with --retry also those that failed."
        )


def select_cells(cells: Sequence[Cell], patterns: Sequence[str] | None) -> list[Cell]:
    """Return the cells that patterns name; all of them without a pattern.

    Raises:
        ConfigError: If a pattern names none.
    """
    if patterns is None:
        return list(cells)
    chosen = set[str]()
    for pattern in patterns:
        matching = {cell.name for cell in cells if fnmatchcase(cell.name, pattern)}
        if not matching:
            raise ConfigError(f"no cell is called '{pattern}': the first one is '{cells[0].name}'.", argument="only")
        chosen |= matching
    return [cell for cell in cells if cell.name in chosen]


def _run_all(cells: Sequence[Cell], output: Path, jobs: int, retry: bool) -> None:
    """Run the cells, and print a line as each ends."""
    started = time.monotonic()
    elsewhere = []
    # Closed at once if this is interrupted between two cells: otherwise, the next ones would begin.
    with closing(run_cells(cells, output, jobs, Processes(jobs), retry)) as ended:
        for number, (cell, state) in enumerate(ended, 1):
            minutes = (time.monotonic() - started) / 60
            print(f"{number} of {len(cells)}, {minutes:.1f} min: {cell.name} {_describe_state(state)}", flush=True)
            if state is None:
                elsewhere.append(cell.name)
    if elsewhere:
        print(f"{len(elsewhere)} cells are held by other processes; give the command again to see what became of them")


def _describe_state(state: CellState | None) -> str:
    if state is None:
        return "is held by another process"
    seconds = f"{state.status} in {sum(state.seconds):.0f} s"
    return seconds if state.reason is None else f"{state.status}: {state.reason}"


def cells_table(cells: Sequence[Cell], output: Path, style: TableStyle = "text") -> str:
    """Format the state of every cell, and what the report of its fit says; ``style`` is as for `format_table`."""
    rows = [describe_cell(cell, output / cell.name) for cell in cells]
    return format_table(rows, _HEADERS, style)


def describe_cell(cell: Cell, folder: Path) -> list[str | float | None]:
    """Return the row of a cell, under `_HEADERS`. A value that there is not yet is ``None``."""
    state = read_state(folder)
    seconds = f"{sum(state.seconds):.0f}" if state.seconds else None
    row: list[str | float | None] = [cell.name, state.status, seconds]
    file = folder / REPORT_FILE
    # Of a fit that has not ended, the report would be that of an earlier start.
    if file.is_file() and state.seconds:
        report = read_json(file)
        violated = []
        for name, values in report["constraints"].items():
            if not is_feasible(values["value"], values["epsilon"]):
                violated.append(name)
        after = report["after"]
        row += [report["verdict"], after.get("forget/probability"), after.get("retain/probability")]
        # A fine-tuning run has none.
        outcome = "feasible" if report["constraints"] else None
        row.append(f"violated: {', '.join(violated)}" if violated else outcome)
    else:
        row += [None] * 4
    audits = sorted(folder.rglob(AUDIT_FILE))
    row.append(", ".join(read_json(audit)["verdict"] for audit in audits) or None)
    row.append(state.reason)
    return row
