"""Tables of results, as text."""

from __future__ import annotations

from typing import Any

_ROWS = {
    "loss": "forget objective",
    "nll": "NLL, nats per token",
    "probability": "answer probability",
    "margin": "logit margin",
    "entropy": "entropy / log V",
    "kl_to_uniform": "KL(uniform‖model), nats",
}


def report_table(report: dict[str, Any]) -> str:
    """A before/after table of a run's report, as text.

    Args:
        report: ``before`` and ``after``: values by ``<stream>/<metric>``; ``constraints``: by name ``value``,
            ``epsilon``, ``slack``, ``multiplier_before`` and ``multiplier_after``; ``steps`` and ``kept_step``, the
            step whose values are ``after``.
    """
    measured = [name.split("/", 1) for name in report["after"] if not name.startswith("constraint/")]
    streams, metrics = dict.fromkeys(s for s, _ in measured), dict.fromkeys(m for _, m in measured)
    columns = [(stream, time) for stream in streams for time in ("before", "after")]
    lines = [[f"step {report['kept_step']} of {report['steps']}", *(f"{stream} {time}" for stream, time in columns)]]
    for metric in metrics:
        cells = [_number(report[time].get(f"{stream}/{metric}")) for stream, time in columns]
        lines.append([_ROWS.get(metric, metric), *cells])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    rule = "-" * len(text[0])
    verdicts = [_verdict(name, constraint) for name, constraint in report["constraints"].items()]
    return "\n".join([rule, text[0], rule, *text[1:], rule, *verdicts])


def _verdict(name: str, constraint: dict[str, float]) -> str:
    numbers = {key: _number(value) for key, value in constraint.items()}
    return (
        f"constraint {name} {'holds' if constraint['slack'] >= 0 else 'IS VIOLATED'}: value {numbers['value']}, epsilon "
        f"{numbers['epsilon']}, slack {numbers['slack']}; λ {numbers['multiplier_before']} → {numbers['multiplier_after']}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
