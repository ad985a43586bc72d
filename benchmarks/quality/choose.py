"""The selection rule of `protocol.py`."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import protocol

RETAIN_ONLY = "retain_only"
TIE = 1.1
UTILITY = ("probability", "rougeL_recall", "truth_ratio")


def read(results: Path, stage: str) -> list[dict[str, Any]]:
    """All results of a stage, by file name; those of another protocol are refused."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / stage).glob("*.json"))]
    if other := {one["protocol"] for one in found} - {protocol.digest()}:
        raise ValueError(
            f"'{results / stage}' has results of another protocol ({', '.join(sorted(other))}): remove or rerun them."
        )
    return found


def values(result: dict[str, Any], size: int | None = None) -> dict[str, float]:
    """The measured values of a unit."""
    measured = result["measured"]
    return measured[str(size or next(iter(measured)))]["aggregate"]  # type: ignore[no-any-return]


def retain_nll(result: dict[str, Any]) -> tuple[float, float]:
    """On all retain rows, of the model that the run kept: value (infinite if it is not a number) and epsilon."""
    nll = result["report"]["constraints"]["nll"]
    return nll["value"] if isinstance(nll["value"], float) else math.inf, nll["epsilon"]


def feasible(result: dict[str, Any]) -> bool:
    value, epsilon = retain_nll(result)
    return value <= epsilon


def retain_utility(found: dict[str, float]) -> float:
    """Harmonic mean of TOFU's three values on the retain rows."""
    return statistics.harmonic_mean([found[f"retain/{key}"] for key in UTILITY])


def harmonic(result: dict[str, Any]) -> float:
    found = values(result)
    return statistics.harmonic_mean([found["forget_quality"], retain_utility(found)])


def wanted_truth_ratio(results: Path) -> float:
    """Of the retain-only model that methods are tuned against."""
    file = results / "models" / f"{RETAIN_ONLY}-{protocol.TUNED_SIZE}-{protocol.TUNED_SEED}.json"
    return values(json.loads(file.read_text(encoding="utf-8")))["forget/truth_ratio"]


def chosen(method: str, results: Path) -> dict[str, Any]:
    """A method's tuning run by the rule, the one by harmonic mean, and whether any was feasible.

    Raises:
        ValueError: If a run is missing, or all failed.
    """
    runs = [one for one in read(results, "tuning") if one["unit"]["facts"]["method"] == method]
    expected = len(protocol.RATES) * len(protocol.MAIN[method][1])
    done = [one for one in runs if "error" not in one]
    if len(runs) < expected or not done:
        raise ValueError(f"'{method}' has {len(runs)} of {expected} tuning runs, {len(done)} of them without an error.")
    wanted = wanted_truth_ratio(results)
    admitted = [one for one in done if feasible(one)] or done
    best = max(values(one)["forget_quality"] for one in admitted)
    tied = [one for one in admitted if values(one)["forget_quality"] * TIE >= best]
    rule = min(tied, key=lambda one: abs(values(one)["forget/truth_ratio"] - wanted))
    return {"rule": rule, "harmonic": max(done, key=harmonic), "feasible": any(map(feasible, done))}
