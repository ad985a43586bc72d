"""Simulate how often the bounds and intervals hold the value that they are to hold: their coverage.

    python -m benchmarks.coverage

Each line draws samples from a distribution whose true value is known, many times over, and counts the draws whose bound or
interval holds it. A coverage has a Monte-Carlo error of its own, which stands beside it as two standard errors.

The scores of rows are drawn from Beta(0.2, 2): most are near 0, some are large, as probabilities of answers are after
unlearning. Leak probabilities of questions are drawn from it once, and are then the same in every draw.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.metrics import (
    average_leak_bound,
    average_mean_bound,
    leak_upper_bound,
    mean_upper_bound,
    worst_leak_bound,
    worst_mean_bound,
)
from lit_unlearn.metrics.intervals import auc_interval, difference_interval, mean_interval, share_interval

CONFIDENCE = 0.95
SKEWED = (0.2, 2.0)
MEAN = SKEWED[0] / sum(SKEWED)
Draw = Callable[[np.random.Generator], bool]


class Case(NamedTuple):
    """One line of the table."""

    function: str
    sample: str
    draw: Draw
    """Draws a sample once; returns whether the bound holds the true value."""


def list_cases() -> Iterator[Case]:
    """Yield the cases, those with bounds from above first."""
    leaks = np.random.default_rng(0).beta(*SKEWED, size=20)
    for probability in (0.01, 0.05, 0.3):
        yield Case(
            "leak_upper_bound",
            f"100 samples of a question that leaks with {probability:g}",
            lambda random, p=probability: leak_upper_bound(random.binomial(100, p), 100) >= p,
        )
    yield Case(
        "mean_upper_bound", "100 scores of a question", lambda random: mean_upper_bound(_scores(random, 100)) >= MEAN
    )
    yield Case(
        "average_leak_bound",
        "20 questions × 20 samples",
        lambda random: average_leak_bound(random.binomial(20, leaks), 20) >= leaks.mean(),
    )
    yield Case(
        "worst_leak_bound",
        "20 questions × 20 samples",
        lambda random: worst_leak_bound(random.binomial(20, leaks), 20) >= leaks.max(),
    )
    yield Case(
        "average_mean_bound",
        "20 questions × 20 scores",
        lambda random: average_mean_bound(_scores(random, (20, 20))) >= MEAN,
    )
    yield Case(
        "worst_mean_bound",
        "20 questions × 20 scores",
        lambda random: worst_mean_bound(_scores(random, (20, 20))) >= MEAN,
    )
    for rows in (20, 40, 100):
        yield Case(
            "mean_interval", f"{rows} rows", lambda random, n=rows: _holds(mean_interval(_scores(random, n)), MEAN)
        )
    yield Case(
        "share_interval", "40 rows, a share of 0.1", lambda random: _holds(share_interval(random.random(40) < 0.1), 0.1)
    )
    yield Case(
        "difference_interval",
        "40 rows and 40 others",
        lambda random: _holds(difference_interval(_scores(random, 40), _scores(random, 40)), 0.0),
    )
    yield Case(
        "auc_interval",
        "40 members and 40 others, AUC 0.76",
        # Two normal distributions whose means are one standard deviation apart.
        lambda random: _holds(
            auc_interval(random.normal(1, 1, 40), random.normal(0, 1, 40)), 0.5 * (1 + math.erf(0.5))
        ),
    )


def _scores(random: np.random.Generator, shape: int | tuple[int, int]) -> np.ndarray:
    return random.beta(*SKEWED, size=shape)


def _holds(interval: tuple[float, float, float], value: float) -> bool:
    return interval[1] <= value <= interval[2]


def measure_coverage(draw: Draw, trials: int) -> tuple[float, float]:
    """Return the share of trials in which the value was held, and two standard errors of it."""
    random = np.random.default_rng(1)
    share = sum(draw(random) for _ in range(trials)) / trials
    return share, 2 * math.sqrt(max(share * (1 - share), 1 / trials / 4) / trials)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500, help="Draws of each line.")
    trials = parser.parse_args().trials
    rows = []
    for case in list_cases():
        share, error = measure_coverage(case.draw, trials)
        rows.append([case.function, case.sample, f"{share:.3f} ± {error:.3f}"])
    print(f"Coverage at a confidence of {CONFIDENCE:g}, {trials} draws of each:\n")
    print(format_table(rows, ["function", "sample", "coverage"], "markdown"))


if __name__ == "__main__":
    main()
