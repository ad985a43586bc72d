"""examples/quickstart.ipynb runs from its first cell to its last, with both positions of its switch, and stores no output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from command_line import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SECONDS = 300  # of a cell, on a machine that does other things as well

Execute = Callable[..., list[Any]]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    """Run the notebook in an empty folder, with lines of its first code cell replaced, and return its code cells with their outputs."""
    from nbclient import NotebookClient

    def execute(**settings: str) -> list[Any]:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for name, value in settings.items():
            cells[0].source, count = re.subn(
                rf"^{name} = \S+", f"{name} = {value}", cells[0].source, flags=re.MULTILINE
            )
            assert count == 1, name
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return cells

    return execute


def read_output(cells: list[Any]) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def read_audit(folder: Path) -> dict[str, str]:
    audit = json.loads((folder / "quickstart/audit/audit.json").read_text(encoding="utf-8"))
    return {finding["measure"]: finding["outcome"] for finding in audit["findings"]}


@pytest.mark.slow
def test_two_authors_are_forgotten_and_the_others_are_not(execute: Execute, tmp_path: Path) -> None:
    cells = execute()
    assert "verdict: forgotten | violated constraints: []" in read_output(cells)
    (last_table,) = [
        cell.outputs[-1].data["text/html"] for cell in cells if cell.source.startswith('questions["unlearned"]')
    ]
    rows = re.findall(r"<tr>\s*<th>\d</th>(.*?)</tr>", last_table, re.DOTALL)
    answers = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows]
    assert [row[0] for row in answers] == ["forget", "forget", "retain", "retain"]
    for name, _, right, before, after in answers:
        assert before == right
        assert (after == right) == (name == "retain")
    outcomes = read_audit(tmp_path)
    assert outcomes["forget_known"] == outcomes["retain_nll_increase"] == "pass"
    assert outcomes["relearned_gap"] != "not tested"
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]


@pytest.mark.slow
def test_the_switch_takes_a_model_by_name_and_a_teacher(execute: Execute, model_dir: str, tmp_path: Path) -> None:
    """The other branch of every cell, on the tests' tiny model, which learns no rows at this rate: the audit measures both and refuses."""
    output = read_output(execute(REAL_MODEL="True", MODEL=repr(model_dir)))
    assert re.search(r"verdict: .+ \| violated constraints", output)
    assert "measuring quickstart/target" in output
    assert not (tmp_path / "quickstart/audit").exists()
    assert "0 of which differ" in output


def test_no_output_is_stored_and_every_code_cell_is_explained() -> None:
    """Outputs differ between machines, and would be text that no run checks."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    kinds = [cell.cell_type for cell in cells]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")
