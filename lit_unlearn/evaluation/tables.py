"""Format results as tables: plain text for terminals, Markdown for pages, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tabulate import DataRow, TableFormat, tabulate

from lit_unlearn.errors import ConfigError

TableStyle = Literal["text", "ruled", "markdown", "csv"]
MISSING = "–"

# Not tabulate's "pipe", which pads cells: one sha256 in a column would stretch every other line of the page's source.
_MARKDOWN_ROW = DataRow("| ", " | ", " |")
_MARKDOWN = TableFormat(
    None, lambda widths, _: "|---" * len(widths) + "|", None, None, _MARKDOWN_ROW, _MARKDOWN_ROW, 0, None
)

_METRIC_LABELS = {
    "loss": "forget objective",
    "nll": "NLL, nats per token",
    "probability": "answer probability",
    "margin": "logit margin",
    "entropy": "entropy / log V",
    "kl_to_uniform": "KL(uniform‖model), nats",
}


def format_table(rows: Iterable[Sequence[object]], headers: Sequence[str], style: TableStyle = "text") -> str:
    """Format rows as a table: the first column aligned to the left, all others, which hold numbers, to the right.

    Args:
        rows: Cells, of which each row has as many as there are ``headers``. Floats get four significant digits, ``None`` a dash.
        headers: Names of the columns.
        style: ``"text"`` has a rule under the headers, ``"ruled"`` also one above them and one below the last row.

    Raises:
        ConfigError: If ``style`` is unknown.

    Example:
        >>> print(format_table([["NLL", 0.25], ["ROUGE", None]], ["", "retain"]))
               retain
        -------------
        NLL      0.25
        ROUGE       –
    """
    table = []
    for row in (headers, *rows):
        table.append([format_cell(value) for value in row])
    if style == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(table)
        return file.getvalue().rstrip("\n")
    if style == "markdown":
        # A pipe in a cell, as in a conditional probability, would begin another column.
        table = [list(map(_escape_pipes, row)) for row in table]
        return str(tabulate(table[1:], table[0], _MARKDOWN, disable_numparse=True, stralign=None))
    if style not in ("text", "ruled"):
        raise ConfigError(f"`style` must be text, ruled, markdown or csv, not {style!r}.", argument="style")

    # Numbers are formatted already: parsed again by tabulate they would be aligned at their decimal points. The headers go in as
    # a row, because tabulate makes every column two characters wider than its header.
    alignment = ["left", *["right"] * (len(headers) - 1)]
    lines = tabulate(table, tablefmt="plain", disable_numparse=True, colalign=alignment).splitlines()
    rule = "-" * len(lines[0])
    if style == "ruled":
        return "\n".join([rule, lines[0], rule, *lines[1:], rule])
    return "\n".join([lines[0], rule, *lines[1:]])


def _escape_pipes(cell: str) -> str:
    return cell.replace("|", "\\|")


def format_cell(value: object) -> str:
    """Return a float with four significant digits, a dash for ``None``, and the text of anything else."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report_table(report: dict[str, Any]) -> str:
    """Format a run's report as a table of values before and after, with one line per constraint below it.

    Args:
        report: ``before`` and ``after``: values by ``<stream>/<metric>``; ``constraints``: by name ``value``,
            ``epsilon``, ``slack``, ``multiplier_before`` and ``multiplier_after``; ``steps`` and ``kept_step``, the
            step whose values are ``after``.
    """
    # Dictionaries for sets in order: the table has the order of the report.
    streams: dict[str, None] = {}
    metrics: dict[str, None] = {}
    for name in report["after"]:
        stream, metric = name.split("/", 1)
        if stream != "constraint":
            streams[stream] = metrics[metric] = None

    headers = [f"step {report['kept_step']} of {report['steps']}"]
    for stream in streams:
        headers += [f"{stream} before", f"{stream} after"]
    rows = []
    for metric in metrics:
        row = [_METRIC_LABELS.get(metric, metric)]
        for stream in streams:
            row += [report["before"].get(f"{stream}/{metric}"), report["after"].get(f"{stream}/{metric}")]
        rows.append(row)

    verdicts = [_constraint_verdict(name, values) for name, values in report["constraints"].items()]
    return "\n".join([format_table(rows, headers, "ruled"), *verdicts])


def _constraint_verdict(name: str, values: dict[str, float]) -> str:
    # NaN compares false with everything, so a slack that is not a number counts as a violation.
    is_feasible = values["slack"] >= 0
    numbers = {key: format_cell(None if value is None else float(value)) for key, value in values.items()}
    comparison = f"{numbers['value']} {'≤' if is_feasible else '>'} epsilon {numbers['epsilon']}"
    return (
        f"constraint {name}: {comparison} ({'feasible' if is_feasible else 'violated'}), slack {numbers['slack']}; "
        f"λ {numbers['multiplier_before']} → {numbers['multiplier_after']}"
    )
