"""The simulation of coverage: its lines are those of the documentation, and it tells bounds that hold from bounds that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.coverage import list_cases, measure_coverage

DOCS = Path(__file__).parents[2] / "docs" / "scores.md"


def test_the_documentation_has_a_line_for_every_case() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for case in list_cases():
        assert f"| {case.function} | {case.sample} |" in text


@pytest.mark.parametrize("case", list_cases(), ids=lambda case: f"{case.function}, {case.sample}")
def test_a_case_can_be_drawn(case) -> None:
    share, error = measure_coverage(case.draw, trials=2)
    assert share in (0.0, 0.5, 1.0)
    assert error > 0


def test_a_bound_that_is_too_low_is_seen() -> None:
    share, error = measure_coverage(lambda random: float(random.binomial(100, 0.3)) / 100 >= 0.3, trials=400)
    assert share + error < 0.7
    assert np.isclose(measure_coverage(lambda random: True, trials=400)[0], 1.0)
