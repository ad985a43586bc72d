"""What the pictures of a run are drawn from: files alone, so that any run can be drawn, also one that was killed."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_unlearn.utils.io import write_json

RECORD, METRICS = "pictures.json", "metrics.csv"

Series = tuple[list[int], list[float]]  # steps, and the values there


class NothingToDraw(LookupError):
    """The run has nothing that a picture shows; says what."""


class Answer(NamedTuple):
    """One answer of the data, and how likely its tokens were before and after.

    Args:
        stream: Where the row is from.
        row: Its number there, from 0.
        prompt: What comes before the answer.
        tokens: The text that each token adds.
        before: Probability of each token, before the first step.
        after: The same of the model that the run keeps; ``None`` while there is none.
        cut: Whether the answer goes on.
    """

    stream: str
    row: int
    prompt: str
    tokens: list[str]
    before: list[float]
    after: list[float] | None = None
    cut: bool = False


class Run(NamedTuple):
    """A run as its files have it.

    Args:
        metrics: What was logged, by name.
        before: What was measured on whole streams before the first step, by name; may be empty.
        kept_step: Steps that the kept model has taken; ``None`` while there is none.
        answers: Recorded answers.
        missing: Files of a run that it resumed, which are not there any more.
    """

    metrics: dict[str, Series]
    before: dict[str, float]
    kept_step: int | None
    answers: list[Answer]
    missing: list[Path]

    @property
    def constraints(self) -> list[str]:
        """Names of all constraints that have values."""
        whole = [name.removeprefix("val/") for name in self.metrics]
        values = [name for name in whole if name.startswith("constraint/") and name.endswith("/value")]
        return list(dict.fromkeys(name.removeprefix("constraint/").removesuffix("/value") for name in values))

    def per_step(self, name: str) -> Series:
        """What every step measured of its own rows, by the steps taken before."""
        return self.metrics.get(name, ([], []))

    def whole(self, name: str) -> Series:
        """What was measured on whole streams, by the steps taken before: the first is the model before unlearning."""
        steps, values = self.metrics.get(f"val/{name}", ([], []))
        counts = [step + 1 for step in steps]  # validation is logged under the number of the step that it follows
        if name in self.before:
            return [0, *counts], [self.before[name], *values]
        return counts, values

    def epsilon(self, name: str) -> float | None:
        """The upper bound of a constraint; ``None`` if nothing was logged that tells."""
        pairs = []
        for stage in ("", "val/"):
            values = dict(zip(*self.metrics.get(f"{stage}constraint/{name}/value", ([], [])), strict=True))
            excess = dict(zip(*self.metrics.get(f"{stage}constraint/{name}/violation", ([], [])), strict=True))
            pairs += [(abs(values[step]), values[step] - excess[step]) for step in values.keys() & excess.keys()]
        finite = [pair for pair in pairs if math.isfinite(pair[1])]
        return min(finite)[1] if finite else None  # the smallest value loses the fewest digits


def read_metrics(files: Sequence[Path]) -> dict[str, Series]:
    """Reads a CSV logger's files.

    Args:
        files: The ``metrics.csv`` of a run and, before it, of those that it resumed; a later one replaces all that an
            earlier one has of its steps and those after.

    Returns:
        For each metric the optimizer steps and the values logged there.

    Raises:
        ValueError: If a file is no such file.
    """
    series: dict[str, dict[int, float]] = {}
    for path in files:
        rows = _rows(path)
        first = min((step for step, _ in rows), default=math.inf)
        series = {name: {s: v for s, v in values.items() if s < first} for name, values in series.items()}
        for step, row in rows:
            for name, value in row.items():
                series.setdefault(name, {})[step] = value
    return {
        name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in series.items() if values
    }


def _rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    text = _text(path)
    whole = text[: text.rfind("\n") + 1]  # of a run that goes on, the last line may be half written
    reader = csv.DictReader(whole.splitlines())
    try:
        if "step" not in (reader.fieldnames or ["step"]):
            raise ValueError(f"its columns are {reader.fieldnames}")
        return [
            (
                int(row["step"]),
                {name: float(value) for name, value in row.items() if value and name not in ("step", "epoch")},
            )
            for row in reader
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is no metrics file, with a column 'step' and numbers: {error}.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"'{path}' cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is no text file: {error}.") from error


def write_record(
    folder: Path,
    files: Sequence[Path],
    before: Mapping[str, float],
    kept_step: int | None,
    answers: Sequence[Mapping[str, Any]],
) -> None:
    """Writes ``pictures.json``, from which, with the metrics, everything can be drawn.

    Args:
        folder: Of the run.
        files: As for `read_metrics`; the file names those beside the run's folder relative to it, so that they can be
            moved together.
        before: As in `Run`.
        kept_step: As in `Run`.
        answers: Each an `Answer`, as a mapping.
    """
    near = [os.path.relpath(file, folder) if file.is_relative_to(folder.parent) else str(file) for file in files]
    content = {"metrics": near, "before": dict(before), "kept_step": kept_step, "answers": list(answers)}
    write_json(folder / RECORD, content)


def read_run(folder: Path) -> Run:
    """Reads what a run left, with or without ``pictures.json`` and ``report.json``.

    Args:
        folder: With the run's ``metrics.csv``.

    Raises:
        FileNotFoundError: If there are no metrics.
        ValueError: If a file is damaged.
    """
    report, record = _read(folder / "report.json"), _read(folder / RECORD)
    try:
        files = [Path(os.path.normpath(folder / file)) for file in record.get("metrics") or [METRICS]]
        answers = [Answer(**answer) for answer in record.get("answers", [])]
    except TypeError as error:
        raise ValueError(f"'{folder / RECORD}' is damaged ({error}): remove it to draw the metrics alone.") from error
    before = record.get("before") or report.get("before") or {}
    kept_step = report.get("kept_step") if record.get("kept_step") is None else record["kept_step"]
    if not files[-1].is_file():
        raise FileNotFoundError(f"'{folder}' has no {METRICS} yet: the logger writes it every so many steps.")
    found = [file for file in files if file.is_file()]
    return Run(read_metrics(found), before, kept_step, answers, [file for file in files if file not in found])


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is no JSON file ({error}): remove it to draw the rest.") from error
    return content if isinstance(content, dict) else {}
