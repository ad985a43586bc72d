"""The rule of `protocol.py` that chooses a method's settings from its tuning runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality import protocol
from benchmarks.quality.results_files import Result, drop_failed, read_results, select_results

RETAIN_ONLY = "retain_only"
TIE = 1.1
UTILITY = ("retain/probability", "retain/rougeL_recall", "retain/truth_ratio")


class Choice(NamedTuple):
    """The tuning run chosen by each of two rules, and whether any run of the method was feasible."""

    by_rule: Result
    by_harmonic_mean: Result
    feasible: bool


def get_values(result: Result, size: int | None = None) -> dict[str, float]:
    """Return the measured values of a unit.

    Args:
        result: Of a unit that succeeded.
        size: Size of the forget set, in authors. Default: the first one; only target models were measured on several.
    """
    measured = result["measured"]
    key = next(iter(measured)) if size is None else str(size)
    return measured[key]["aggregate"]


def get_forget_quality(result: Result) -> float:
    """Return the forget quality, judged by the retain-only model of the same forget set and seed."""
    return get_values(result)["forget_quality"]


def get_retain_nll(result: Result) -> tuple[float, float]:
    """Return the NLL over all retain examples of the model that the run kept, and its epsilon, in nats per token."""
    nll = result["report"]["constraints"]["nll"]
    # A model that diverged has "nan" or "inf" here, as text: it satisfies no constraint.
    value = nll["value"] if isinstance(nll["value"], float) else math.inf
    return value, nll["epsilon"]


def is_feasible(result: Result) -> bool:
    """Return whether the retain NLL is at most epsilon."""
    value, epsilon = get_retain_nll(result)
    return value <= epsilon


def retain_utility(values: Mapping[str, float]) -> float:
    """Return the harmonic mean of TOFU's three scores on the retain set.

    TOFU's own `model_utility` also averages real authors and world facts, which models made from scratch do not know.
    """
    return statistics.harmonic_mean([values[key] for key in UTILITY])


def harmonic_score(result: Result) -> float:
    """Return the harmonic mean of forget quality and retain utility."""
    return statistics.harmonic_mean([get_forget_quality(result), retain_utility(get_values(result))])


def retain_only_truth_ratio(results: Path) -> float:
    """Return the truth ratio on the forget set of the retain-only model that methods are tuned against.

    Raises:
        ValueError: If that model has not been measured yet.
    """
    tuned_against = {"label": RETAIN_ONLY, "size": protocol.TUNED_SIZE, "seed": protocol.TUNED_SEED}
    models = select_results(read_results(results, "models"), **tuned_against)
    if not models:
        raise ValueError(f"'{results}' has no result of the model {tuned_against}: run the stage 'models' first.")
    return get_values(models[0])["forget/truth_ratio"]


def choose_settings(method: str, results: Path) -> Choice:
    """Choose one of a method's tuning runs.

    Raises:
        ValueError: If a run is missing, or all failed.
    """
    runs = [run for run in read_results(results, "tuning") if run["unit"]["facts"]["method"] == method]
    expected = len(protocol.RATES) * len(protocol.MAIN[method][1])
    succeeded = drop_failed(runs)
    if len(runs) < expected or not succeeded:
        raise ValueError(
            f"'{method}' has {len(runs)} of {expected} tuning runs, {len(succeeded)} of them without an error."
        )

    # A method without a feasible run still gets settings, so that its failure is a line of the tables.
    feasible = list(filter(is_feasible, succeeded))
    admitted = feasible or succeeded

    # Forget quality is a p-value over 40 to 160 examples: within ten per cent it does not tell two runs apart.
    best = max(map(get_forget_quality, admitted))
    tied = [run for run in admitted if get_forget_quality(run) * TIE >= best]
    target = retain_only_truth_ratio(results)
    by_rule = min(tied, key=lambda run: abs(get_values(run)["forget/truth_ratio"] - target))

    return Choice(by_rule, max(succeeded, key=harmonic_score), bool(feasible))
