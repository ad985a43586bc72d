"""Format results as tables: plain text for terminals, Markdown for pages, LaTeX for papers, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tabulate import DataRow, TableFormat, tabulate

from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.verdict import describe_damage, explain_kept, explain_verdict, get_slack, is_feasible

TableStyle = Literal["text", "ruled", "markdown", "csv", "latex"]
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
        style: ``"text"`` has a rule under the headers, ``"ruled"`` also one above them and one below the last row. ``"latex"`` needs
            the package booktabs.

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
    alignment = ["left", *["right"] * (len(headers) - 1)]
    if style == "latex":
        return str(tabulate(table[1:], table[0], "latex_booktabs", disable_numparse=True, colalign=alignment))
    if style not in ("text", "ruled"):
        raise ConfigError(f"`style` must be text, ruled, markdown, csv or latex, not {style!r}.", argument="style")

    # Numbers are formatted already: parsed again by tabulate they would be aligned at their decimal points. The headers go in as
    # a row, because tabulate makes every column two characters wider than its header.
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


def report_table(report: Mapping[str, Any]) -> str:
    """Format a run's report as a table of values before and after, with verdict, kept model and constraints below it.

    Args:
        report: ``before`` and ``after``: values by ``<stream>/<metric>``; ``constraints``: by name ``value``, ``epsilon``,
            ``stream``, ``multiplier_before`` and ``multiplier_after``; ``steps`` and ``kept_step``, the step whose values are
            ``after``; ``keep``; ``verdict`` and ``max_forget_probability``, if it unlearned; ``damage``, if it measured that.
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

    lines = [format_table(rows, headers, "ruled")]
    constraints = report["constraints"]
    for name, values in constraints.items():
        lines.append(_format_constraint(name, values, report["before"], report["after"]))
    # Reports of earlier versions, and of fine-tuning, have no verdict.
    if report.get("verdict") is not None:
        feasible = all(is_feasible(values["value"], values["epsilon"]) for values in constraints.values())
        lines.append(explain_kept(report["kept_step"], report["steps"], report["keep"], feasible))
        threshold = report["max_forget_probability"]
        lines.append(f"verdict: {explain_verdict(report['before'], report['after'], threshold)}")
    if report.get("damage") is not None:
        outcome = "reached" if report["damage"]["reached"] else "not reached"
        lines.append(f"damage: {describe_damage(report['damage'])}, {outcome}")
    return "\n".join(lines)


def _format_constraint(
    name: str, values: Mapping[str, Any], before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    value, epsilon = values["value"], values["epsilon"]
    feasible = is_feasible(value, epsilon)
    line = (
        f"constraint {name}: {_format_number(value)} {'≤' if feasible else '>'} epsilon {_format_number(epsilon)} "
        f"({'feasible' if feasible else 'violated'}), slack {_format_number(get_slack(value, epsilon))}; "
        f"λ {_format_number(values['multiplier_before'])} → {_format_number(values['multiplier_after'])}"
    )
    # Nats per token tell few readers what the bound allowed.
    stream = values.get("stream", "retain")
    key = f"{stream}/probability"
    if key in before and key in after:
        line += f"; {stream} answer probability {before[key]:.4g} → {after[key]:.4g}"
    return line


def _format_number(value: float | None) -> str:
    return format_cell(None if value is None else float(value))
