"""Results of several seeds: means with intervals, and paired tests between methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.results import Results
from lit_unlearn.evaluation.tables import TableStyle, format_cell, format_table
from lit_unlearn.evaluation.verdict import FORGOTTEN, is_feasible
from lit_unlearn.metrics.intervals import paired_test, seeds_interval
from lit_unlearn.utils.validation import list_names

Group = Mapping[int, Results | None]
"""Results of one method by seed; ``None`` where the run failed."""

_LONG_HEADERS = ("value", "group", "seeds", "runs", "mean", "low", "high", "p")


def read_report(content: Mapping[str, Any]) -> Results:
    """Return what a run's report measured on the kept model, as results.

    Args:
        content: Of ``report.json``.

    Returns:
        With ``feasible`` and ``forgotten``, which are 1 or 0: their mean over seeds is a share. Both are missing of fine-tuning.
        ``data`` is empty for a report of an earlier version, which does not say which rows it is of.
    """
    constraints, verdict = content["constraints"], content["verdict"]
    feasible = all(is_feasible(values["value"], values["epsilon"]) for values in constraints.values())
    values = {
        "feasible": float(feasible) if constraints else math.nan,
        "forgotten": math.nan if verdict is None else float(verdict == FORGOTTEN),
    }
    for name in ("seconds", "peak_memory_mib"):
        # Reports of earlier versions have neither.
        values[name] = content.get(name, math.nan)
    values |= content["after"]
    aggregate: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, value in values.items():
        if math.isfinite(value):
            aggregate[name] = value
        else:
            missing[name] = "the report has no such value, or it is not finite"

    data = {}
    for stream, description in content.get("data", {}).items():
        # The tokens tell other rows and another prompt alike; texts have no digest in a report.
        data[stream] = {"rows": description["rows"], "texts": None, "tokens": description["sha256"]}
    settings = {}
    # It decides `forgotten`, which fine-tuning does not have.
    if verdict is not None and "max_forget_probability" in content:
        settings["max_forget_probability"] = content["max_forget_probability"]
    model = {"damage": content.get("damage")}
    return Results("report", data, aggregate, {}, missing, settings, model)


def average_results(group: Group) -> Results:
    """Return the means over seeds of every value that a group has, in place of the results of one model.

    Args:
        group: With the results of at least one seed.
    """
    results = [result for result in group.values() if result is not None]
    means = {}
    for key in _list_keys({"": group}):
        if values := _collect_values(group, key):
            means[key] = sum(values.values()) / len(values)
    return replace(results[0], aggregate=means)


def seeds_table(
    groups: Mapping[str, Group], style: TableStyle = "text", confidence: float = 0.95, against: str | None = None
) -> str:
    """Format mean ± half the interval of every value, a column per group.

    The interval is Student's t over seeds, see `seeds_interval`; of a single seed there is the value alone. Where fewer seeds than runs
    have a value, their number stands behind it.

    Args:
        groups: By name.
        style: As for `format_table`. ``"csv"`` has a line for every value and group, with the ends of the interval.
        confidence: Of the intervals.
        against: Name of a group. The others get a column with the p-value of the paired test against it, over the seeds that both
            have; a dash where their differences do not spread. Nothing corrects for the number of tests.

    Raises:
        ConfigError: If there is no group ``against``, or the confidence is out of range.
    """
    if against is not None and against not in groups:
        raise ConfigError(f"there is no group '{against}': {list_names(against, groups)}.", argument="against")
    if style == "csv":
        return format_table(_iterate_lines(groups, confidence, against), _LONG_HEADERS, style)

    headers = [""]
    for name, group in groups.items():
        headers.append(f"{name} ({_count_runs(group)})")
        if against not in (None, name):
            headers.append("p")
    rows = []
    for key in _list_keys(groups):
        row: list[str | None] = [key]
        for name, group in groups.items():
            row.append(_format_spread(_collect_values(group, key), len(group), confidence))
            if against is not None and name != against:
                p_value = _compare_groups(group, groups[against], key)
                row.append(None if p_value is None else f"{p_value:.2g}")
        rows.append(row)
    return format_table(rows, headers, style)


def _iterate_lines(groups: Mapping[str, Group], confidence: float, against: str | None) -> Iterator[list[object]]:
    """Yield the lines under `_LONG_HEADERS`."""
    for key in _list_keys(groups):
        for name, group in groups.items():
            values = _collect_values(group, key)
            line: list[object] = [key, name, len(values), len(group)]
            if values:
                interval = seeds_interval(list(values.values()), confidence)
                # The interval of a single seed has no ends.
                line += [number if math.isfinite(number) else None for number in interval]
            else:
                line += [None] * 3
            if against is None or name == against:
                yield [*line, None]
            else:
                yield [*line, _compare_groups(group, groups[against], key)]


def _list_keys(groups: Mapping[str, Group]) -> list[str]:
    """Return the names of all values, in the order of `results_table`: those without a stream first."""
    keys: dict[str, None] = {}
    for group in groups.values():
        for result in group.values():
            if result is not None:
                keys |= dict.fromkeys([*result.aggregate, *result.missing])
    return sorted(keys, key=lambda key: "/" in key)


def _collect_values(group: Group, key: str) -> dict[int, float]:
    """Return a value by seed, of the seeds that have it. One that is not finite has no mean, and is left out like a missing one."""
    values = {}
    for seed, result in group.items():
        value = None if result is None else result.aggregate.get(key)
        if value is not None and math.isfinite(value):
            values[seed] = value
    return values


def _count_runs(group: Group) -> str:
    succeeded = sum(result is not None for result in group.values())
    plural = "" if len(group) == 1 else "s"
    return f"{len(group)} seed{plural}" if succeeded == len(group) else f"{succeeded} of {len(group)} seeds"


def _format_spread(values: Mapping[int, float], runs: int, confidence: float) -> str | None:
    if not values:
        return None
    mean, low, high = seeds_interval(list(values.values()), confidence)
    text = format_cell(mean)
    if math.isfinite(low):
        text += f" ± {(high - low) / 2:.2g}"
    return text if len(values) == runs else f"{text} ({len(values)} of {runs})"


def _compare_groups(group: Group, reference: Group, key: str) -> float | None:
    """Return the p-value of the paired test over the seeds that both have; ``None`` if these allow no test."""
    values, reference_values = _collect_values(group, key), _collect_values(reference, key)
    shared = sorted(values.keys() & reference_values.keys())
    if len(shared) < 2:
        return None
    p_value = paired_test([values[seed] for seed in shared], [reference_values[seed] for seed in shared])
    return None if math.isnan(p_value) else p_value
