"""Read the files of a run for its pictures, so that any run can be drawn, also one that was killed."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_unlearn.errors import DataError, LitUnlearnError, MissingFileError
from lit_unlearn.utils.io import describe_os_error, write_json

PICTURE_FILE, METRICS_FILE, REPORT_FILE = "pictures.json", "metrics.csv", "report.json"

Series = tuple[list[int], list[float]]  # steps, and the values there
_EMPTY: Series = ([], [])


class NothingToDraw(LitUnlearnError, LookupError):
    """The run has nothing that a picture would show; the message says what is missing."""


class RecordedAnswer(NamedTuple):
    """The probability of each token of an answer, before and after.

    Args:
        stream: Name of the example's stream.
        row: Its number there, from 0.
        prompt: Text before the answer.
        tokens: Text that each token adds, ``n`` of them.
        before: Probability of each token before the first step, ``n`` numbers.
        after: The same of the model that the run keeps; ``None`` while there is none.
        cut: Whether the answer is longer than what was recorded.
    """

    stream: str
    row: int
    prompt: str
    tokens: list[str]
    before: list[float]
    after: list[float] | None = None
    cut: bool = False


class RunLog(NamedTuple):
    """The content of a run's files.

    Args:
        metrics: Logged values, by name.
        before: Values of whole streams before the first step, by name; may be empty.
        kept_step: Steps that the kept model has taken; ``None`` while there is none.
        answers: Recorded answers.
        missing: Files of a run that this one resumed, which are not there any more.
        epsilons: The present epsilon of every constraint; ``None`` for a run that did not write them down.
    """

    metrics: dict[str, Series]
    before: dict[str, float]
    kept_step: int | None
    answers: list[RecordedAnswer]
    missing: list[Path]
    epsilons: dict[str, float] | None = None

    @property
    def constraints(self) -> list[str]:
        """Names of all constraints that have values."""
        names: dict[str, None] = {}  # in the order of the log
        for metric in self.metrics:
            stem = metric.removeprefix("val/")
            if stem.startswith("constraint/") and stem.endswith("/value"):
                names[stem.removeprefix("constraint/").removesuffix("/value")] = None
        return list(names)

    def get_step_values(self, name: str) -> Series:
        """Return what every step measured of its own batch, by the number of steps taken before."""
        return self.metrics.get(name, _EMPTY)

    def get_stream_values(self, name: str) -> Series:
        """Return what was measured on whole streams, by the number of steps taken before; 0 is before unlearning."""
        steps, values = self.metrics.get(f"val/{name}", _EMPTY)
        # Lightning logs a validation under the number of the step that it follows.
        steps = [step + 1 for step in steps]
        if name in self.before:
            return [0, *steps], [self.before[name], *values]
        return steps, values

    def find_epsilon(self, name: str) -> float | None:
        """Return the epsilon of a constraint; ``None`` if nothing that was logged tells it."""
        # A resumed run may have another one than its first part.
        if self.epsilons and name in self.epsilons:
            return self.epsilons[name]
        # Of a logger, only values and violations are known. Their difference is epsilon, up to float32 rounding of either: the smallest
        # value loses the fewest digits.
        smallest, epsilon = math.inf, None
        for stage in ("", "val/"):
            values = dict(zip(*self.metrics.get(f"{stage}constraint/{name}/value", _EMPTY), strict=True))
            violations = dict(zip(*self.metrics.get(f"{stage}constraint/{name}/violation", _EMPTY), strict=True))
            for step in values.keys() & violations.keys():
                difference = values[step] - violations[step]
                if math.isfinite(difference) and abs(values[step]) < smallest:
                    smallest, epsilon = abs(values[step]), difference
        return epsilon


def read_metrics(files: Sequence[Path]) -> dict[str, Series]:
    """Read the files of a CSV logger.

    Args:
        files: The ``metrics.csv`` of a run and, before it, those of the runs that it resumed. A later file replaces all
            that an earlier one has of its steps and those after.

    Returns:
        For each metric the optimizer steps and the values logged there.

    Raises:
        DataError: If a file is damaged, or cannot be read.
    """
    values_by_step: dict[str, dict[int, float]] = {}
    for path in files:
        rows = _read_rows(path)
        first_step = min(dict(rows), default=math.inf)
        # What an interrupted run did after its last checkpoint was done again by the run that resumed.
        for values in values_by_step.values():
            for step in list(values):
                if step >= first_step:
                    del values[step]
        for step, row in rows:
            for name, value in row.items():
                values_by_step.setdefault(name, {})[step] = value

    series = {}
    for name, values in values_by_step.items():
        if values:
            ordered = dict(sorted(values.items()))
            series[name] = (list(ordered), list(ordered.values()))
    return series


def _read_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    text = _read_text(path)
    # While a run is being logged, its last line may be incomplete.
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(complete.splitlines())
    rows = []
    try:
        if "step" not in (reader.fieldnames or ["step"]):
            raise ValueError(f"its columns are {reader.fieldnames}")
        for row in reader:
            step = int(row.pop("step"))
            row.pop("epoch", None)
            rows.append((step, {name: float(value) for name, value in row.items() if value}))
    except (TypeError, ValueError) as error:
        raise DataError(f"'{path}' is no metrics file, with a column 'step' and numbers: {error}.") from error
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {describe_os_error(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is no text file: {error}.") from error


def write_picture_data(
    folder: Path,
    files: Sequence[Path],
    before: Mapping[str, float],
    kept_step: int | None,
    answers: Sequence[RecordedAnswer],
    epsilons: Mapping[str, float] | None = None,
) -> None:
    """Write ``pictures.json`` into a run's folder: with the metrics in ``files``, all that a `RunLog` is read from."""
    paths = []
    for file in files:
        # Relative where possible, so that the versions of a run can be moved together.
        is_beside = file.is_relative_to(folder.parent)
        paths.append(os.path.relpath(file, folder) if is_beside else str(file))
    recorded = [answer._asdict() for answer in answers]
    content = {
        "metrics": paths,
        "before": dict(before),
        "epsilons": dict(epsilons or {}),
        "kept_step": kept_step,
        "answers": recorded,
    }
    write_json(folder / PICTURE_FILE, content)


def read_run(folder: Path) -> RunLog:
    """Read what a run left, with or without ``pictures.json`` and ``report.json``.

    Args:
        folder: Folder with the run's ``metrics.csv``.

    Raises:
        MissingFileError: If there are no metrics.
        DataError: If a file is damaged.
    """
    report, content = _read_object(folder / REPORT_FILE), _read_object(folder / PICTURE_FILE)
    try:
        answers = [RecordedAnswer(**answer) for answer in content.get("answers", [])]
    except TypeError as error:
        raise DataError(
            f"'{folder / PICTURE_FILE}' is damaged ({error}): remove it to draw the metrics alone."
        ) from error

    files: list[Path] = []
    missing: list[Path] = []
    for name in content.get("metrics") or [METRICS_FILE]:
        file = Path(os.path.normpath(folder / name))
        (files if file.is_file() else missing).append(file)
    # The last one is the run's own. Without those of runs that it resumed, the rest can still be drawn.
    if missing and missing[-1] == file:
        raise MissingFileError(
            f"'{folder}' has no {METRICS_FILE} yet: the logger writes it every `log_every_n_steps` steps."
        )
    metrics = read_metrics(files)

    before = content.get("before") or report.get("before") or {}
    kept_step = content.get("kept_step")
    if kept_step is None:
        kept_step = report.get("kept_step")
    return RunLog(metrics, before, kept_step, answers, missing, content.get("epsilons"))


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is no JSON file ({error}): remove it to draw the rest.") from error
    return content if isinstance(content, dict) else {}
