"""The results of a benchmark: what is measured, where it is kept, and which results may be compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_unlearn import __version__
from lit_unlearn.errors import DataError, MissingFileError
from lit_unlearn.evaluation.tables import TableStyle, format_table
from lit_unlearn.evaluation.verdict import describe_damage
from lit_unlearn.utils.io import describe_os_error, expand_path, read_json, write_json

MATCHED_TOLERANCE = 0.1
"""Share of its limit by which a damage may differ from it and still count as matched; runs end within 5 %."""

Values = dict[str, Any]
"""Plain types by name, as JSON has them."""

_PACKAGES = ("torch", "transformers", "lightning", "datasets", "peft", "rouge_score")
_REQUIRED_KEYS = ("suite", "aggregate", "examples", "data")
# In the order in which people read a file: the values before the thousands of lines of the examples.
_FILE_KEYS = ("settings", "model", "data", "versions", "seed", "retain_results", "aggregate", "missing", "examples")


@dataclass
class Results:
    """Everything that a benchmark measured on one model.

    Args:
        benchmark: The benchmark's name.
        data: Source, number of rows and digests of every stream.
        aggregate: The benchmark's values by name, ``<stream>/<value>`` or ``<value>``.
        examples: The values of every example, by stream, in the order of the rows.
        missing: By name, the reason why a value could not be computed.
        settings: Settings that decide values, beside the model and the rows.
        model: ``name`` and ``weights``, the first digits of a digest over all weights; of an export also ``damage``, if its run
            has measured that.
        versions: Of this package and of those that decide numbers.
        seed: Argument of ``seed_everything``; ``None`` if it was not called.
        retain_results: Where the results of the retain-only model came from.
        judge: Grades of an LLM judge, if ``lit-unlearn judge`` added them.

    Example:
        >>> results = Results("qa", data={}, aggregate={"retain/nll": 0.5}, examples={"retain": [{"nll": 0.5}]})
        >>> Results.from_dict(results.to_dict()) == results
        True
    """

    benchmark: str
    data: dict[str, Values]
    aggregate: dict[str, float]
    examples: dict[str, list[Values]]
    missing: dict[str, str] = field(default_factory=dict)
    settings: Values = field(default_factory=dict)
    model: Values = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    retain_results: str | None = None
    judge: Values | None = None

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Read a results file.

        Raises:
            MissingFileError: If the file does not exist.
            DataError: If it is not a results file.
        """
        try:
            content = read_json(expand_path(path))
        except (FileNotFoundError, IsADirectoryError):
            raise MissingFileError(
                f"there is no results file '{path}': run `lit-unlearn evaluate` on the model, which writes one."
            ) from None
        except OSError as error:
            raise DataError(f"the results file '{path}' cannot be read: {describe_os_error(error)}") from error
        except ValueError as error:
            raise DataError(f"'{path}' is not a JSON file: {error}") from error
        return cls.from_dict(content, f"'{path}'")

    @classmethod
    def from_dict(cls, content: Any, name: str = "the dictionary") -> Results:
        """Return the results that `to_dict` gave.

        Args:
            content: With the keys of a results file.
            name: Its name in messages.

        Raises:
            DataError: If keys are missing.
        """
        lacking = _REQUIRED_KEYS if not isinstance(content, Mapping) else set(_REQUIRED_KEYS) - content.keys()
        if lacking:
            raise DataError(
                f"{name} is not a results file of `lit-unlearn test`: it has no {', '.join(sorted(lacking))}."
            )
        # Files written before a key existed lack it, and stay comparable; keys that are no longer known are dropped.
        values = {key: content[key] for key in cls.__dataclass_fields__ if key in content}
        values["aggregate"], values["missing"] = {}, {}
        for key, value in content["aggregate"].items():
            # Early files had null among the values, where one was missing.
            if value is None:
                values["missing"][key] = "it has no value"
            else:
                values["aggregate"][key] = value
        values["missing"] |= content.get("missing", {})
        return cls(benchmark=content["suite"], **values)

    def to_dict(self) -> Values:
        """Return the content of the results file, with the keys that files have had from the start."""
        content = asdict(self)
        values = {"suite": self.benchmark, **{key: content[key] for key in _FILE_KEYS}}
        return values if self.judge is None else {**values, "judge": content["judge"]}

    def write(self, path: Path) -> None:
        """Write the results file, in one piece or not at all."""
        write_json(path, self.to_dict())


def is_results_file(file: Path) -> bool:
    """Return whether a file is one that `Results.write` wrote."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"suite", "aggregate", "examples", "data"} <= content.keys()


def package_versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide numbers."""
    return {"lit_unlearn": __version__, **dict(zip(_PACKAGES, map(importlib.metadata.version, _PACKAGES), strict=True))}


def global_seed() -> int | None:
    """Return the argument of ``seed_everything``; ``None`` if it was not called."""
    value = os.environ.get("PL_GLOBAL_SEED")
    return None if value is None else int(value)


def content_digest(content: Any) -> str:
    """Return sixteen hexadecimal digits that differ for different contents of plain types."""
    # Sorted, so that the order in which a dictionary was built does not matter.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def get_column(rows: Sequence[Values], key: str) -> list[float]:
    """Return one value of every row."""
    return [row[key] for row in rows]


def check_same_rows(
    benchmark: str, data: Values, results: Results, stream: str, path: str, model: str = "the retain-only model"
) -> None:
    """Raise an error unless results of another model were measured on the same rows.

    Args:
        benchmark: Name of the benchmark whose results are to be compared.
        data: Description of its stream: ``rows``, ``texts`` and ``tokens``.
        results: Results of the other model.
        stream: The stream on which both are compared.
        path: Where ``results`` came from, for the message.
        model: Name of the other model, for the message.

    Raises:
        DataError: With every difference.
    """
    their_data = results.data.get(stream, {})
    # A report has no digest of the texts: its tokens tell other rows as well.
    causes = "another tokenizer, template or max_length"
    if data["texts"] is None:
        causes = f"other rows, or {causes}"
    pairs = {
        "benchmark": (benchmark, results.benchmark),
        "number of rows": (data["rows"], their_data.get("rows")),
        "questions and answers (another split?)": (data["texts"], their_data.get("texts")),
        f"tokens ({causes})": (data["tokens"], their_data.get("tokens")),
    }
    differences = [f"{what}: {here!r} here, {there!r} there" for what, (here, there) in pairs.items() if here != there]
    if differences:
        raise DataError(
            f"the results of {model} in '{path}' cannot be compared with these: on the '{stream}' rows they differ in "
            f"{'; '.join(differences)}. Evaluate {model} with the same configuration."
        )


def check_matched(results: Sequence[Results], names: Sequence[str]) -> None:
    """Raise an error unless all models were taken at the same damage, as `StopAtDamage` measures it.

    Args:
        results: Of the models.
        names: Of their files, for the message.

    Raises:
        DataError: With the first model that does not fit, and what to do.
    """
    first: Values | None = None
    for name, result in zip(names, results, strict=True):
        damage = result.model.get("damage")
        problem = find_damage_problem(damage)
        if problem is None and damage is not None:
            first = first or damage
            problem = _find_other_damage(damage, first, names[0])
        if problem is not None:
            raise DataError(f"'{name}' cannot be compared at matched damage: {problem}")


def find_damage_problem(damage: Values | None) -> str | None:
    """Return why a model is not at its limit of damage, and what to do; ``None`` if it is."""
    if damage is None:
        return (
            "expected was the damage of the model, but the results name none. Unlearn with `--config method/matched/kl.yaml` "
            "(or nll.yaml) over the method's file, and evaluate the exported directory."
        )
    if not damage["reached"]:
        return (
            f"its run ended at step {damage['step']} before its damage reached the limit: {describe_damage(damage)}. Unlearn again "
            "with more `max_epochs` or a higher `lr`."
        )
    if not (1 - MATCHED_TOLERANCE) * damage["limit"] <= damage["value"] <= (1 + MATCHED_TOLERANCE) * damage["limit"]:
        return (
            f"its damage is more than {100 * MATCHED_TOLERANCE:g} % off the limit: {describe_damage(damage)}. Unlearn again with a "
            "lower `lr`, or in a wider dtype: the last step could not be shortened to the limit."
        )
    return None


def _find_other_damage(damage: Values, first: Values, name: str) -> str | None:
    """Return in what a model's damage was measured otherwise than the first model's; ``None`` if in nothing."""
    differences = []
    for key in ("measure", "stream", "rows", "rows_digest"):
        if damage[key] != first[key]:
            differences.append(f"{key}: {damage[key]!r} here, {first[key]!r} there")
    # An epsilon that is relative is measured, on each machine anew.
    if not math.isclose(damage["limit"], first["limit"], rel_tol=1e-3):
        differences.append(f"limit: {damage['limit']:.4g} here, {first['limit']:.4g} there")
    if not differences:
        return None
    return (
        f"its damage was measured otherwise than that of '{name}' ({'; '.join(differences)}). Unlearn both with the same `damage` "
        "section, model and data."
    )


def list_differences(results: Sequence[Results]) -> list[str]:
    """List streams and settings that differ between results, where `check_same_rows` does not object."""
    digests: dict[str, set[str]] = {}
    for result in results:
        for stream, data in result.data.items():
            content = [data.get("rows"), data.get("texts"), data.get("tokens")]
            digests.setdefault(f"the '{stream}' rows", set()).add(content_digest(content))
        for setting, value in result.settings.items():
            # The token budget changes nothing but rounding.
            if setting != "token_budget":
                digests.setdefault(f"the setting '{setting}'", set()).add(content_digest(value))
    return [name for name, values in digests.items() if len(values) > 1]


def results_table(results: Sequence[Results], names: Sequence[str], style: TableStyle = "text") -> str:
    """Format the aggregates of several models side by side.

    There is a line per value that any of them has, and a dash where a value is missing. ``style`` is as for `format_table`.
    """
    keys: dict[str, None] = {}
    for result in results:
        keys |= dict.fromkeys([*result.aggregate, *result.missing])
    # The values that sum up the whole benchmark have no stream in their names, and come first.
    ordered = sorted(keys, key=lambda key: "/" in key)
    rows = []
    for key in ordered:
        rows.append([key, *(result.aggregate.get(key) for result in results)])
    return format_table(rows, ["", *names], style)
