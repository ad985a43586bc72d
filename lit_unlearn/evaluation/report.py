"""The result of a run: one JSON file, and a table for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ROWS = {
    "loss": "forget objective",
    "nll": "NLL, nats per token",
    "probability": "answer probability",
    "margin": "logit margin",
    "entropy": "entropy / log V",
    "kl_to_uniform": "KL(uniform‖model), nats",
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file; a half-written one never replaces a whole one."""
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A file that takes the target's place once it is written, and is gone if that fails.

    Args:
        target: Final place; its folder is made. The suffix is that of the unfinished file, too.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(target)
    except OSError as error:
        raise OSError(f"'{target}' cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def table(report: dict[str, Any]) -> str:
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
