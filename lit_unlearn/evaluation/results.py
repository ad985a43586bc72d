"""The results of a benchmark: one JSON file, who may be compared with whom, and a table for people."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_unlearn import __version__
from lit_unlearn.evaluation.tables import TableStyle, format_table
from lit_unlearn.utils.io import read_json

Results = dict[str, Any]

_PACKAGES = ("torch", "transformers", "lightning", "datasets", "peft", "rouge_score")


def versions() -> dict[str, str]:
    """Of this package and of those that decide numbers."""
    return {"lit_unlearn": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def seed() -> int | None:
    """What ``seed_everything`` was called with; ``None`` if it was not."""
    value = os.environ.get("PL_GLOBAL_SEED")
    return None if value is None else int(value)


def digest(content: Any) -> str:
    """Sixteen hexadecimal digits that tell contents of plain types apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_results(path: str | Path) -> Results:
    """Reads a results file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no results file.
    """
    try:
        results = read_json(Path(path))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no results file '{path}': `lit-unlearn test` writes one, of the retain-only model as of any other."
        ) from None
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON file: {error}") from error
    if not isinstance(results, dict) or not {"suite", "aggregate", "examples", "data"} <= results.keys():
        raise ValueError(
            f"'{path}' is no results file of `lit-unlearn test`: it has no suite, aggregate, examples and data."
        )
    return results


def check_same_rows(
    mine: Mapping[str, Any], other: Results, stream: str, path: str, whose: str = "the retain-only model"
) -> None:
    """Refuses to compare with results of another suite, of other rows or of other tokens.

    Args:
        mine: ``suite``, and the ``data`` of the stream.
        other: Results of the retain-only model, or of another one.
        stream: On which they are compared.
        path: Of the other results, for the message.
        whose: Results the other ones are, likewise.

    Raises:
        ValueError: With what differs.
    """
    theirs = other["data"].get(stream, {})
    what = {"suite": (mine["suite"], other["suite"])}
    what |= {key: (mine["data"][key], theirs.get(key)) for key in ("rows", "texts", "tokens")}
    words = {"suite": "suite", "rows": "number of rows", "texts": "questions and answers (another split?)"}
    words["tokens"] = "tokens (another tokenizer, template or max_length)"
    differ = [f"{words[key]}: {own!r} here, {its!r} there" for key, (own, its) in what.items() if own != its]
    if differ:
        raise ValueError(
            f"the results of {whose} in '{path}' cannot be compared with these: on the '{stream}' rows they differ in "
            + "; ".join(differ)
            + f". Evaluate {whose} with the same configuration."
        )


def differences(results: Sequence[Results]) -> list[str]:
    """What else makes values incomparable, where `check_same_rows` has no objection: other streams' rows, and settings."""
    found: dict[str, set[str]] = {}
    for one in results:
        contents = {name: [data.get(key) for key in ("rows", "texts", "tokens")] for name, data in one["data"].items()}
        parts = {f"the '{name}' rows": content for name, content in contents.items()}
        parts |= {f"the setting '{name}'": value for name, value in one.get("settings", {}).items()}
        parts.pop("the setting 'token_budget'", None)  # which changes nothing but rounding
        for part, content in parts.items():
            found.setdefault(part, set()).add(digest(content))
    return [part for part, contents in found.items() if len(contents) > 1]


def results_table(results: Sequence[Results], names: Sequence[str], style: TableStyle = "text") -> str:
    """Format the aggregates of several models side by side.

    Args:
        results: Of the models to compare.
        names: One for each, over its column.
        style: As for `format_table`.

    Returns:
        A line per value that any of them has; a dash where a value is missing.

    Raises:
        ConfigError: If ``style`` is unknown.
    """
    keys = list(dict.fromkeys(key for one in results for key in (*one["aggregate"], *one.get("missing", {}))))
    keys.sort(key=lambda key: "/" in key)  # what sums everything up comes first
    rows = [[key, *(one["aggregate"].get(key) for one in results)] for key in keys]
    return format_table(rows, ["", *names], style)
