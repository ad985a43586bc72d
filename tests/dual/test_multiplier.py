from __future__ import annotations

import json
import math

import pytest

from lit_unlearn import DualAscent, FixedMultiplier

BAD = [-1.0, -1e-9, math.nan, math.inf, -math.inf]


def values(multiplier, violations):
    seen = []
    for violation in violations:
        multiplier.update(violation)
        seen.append(multiplier.value)
    return seen


@pytest.mark.parametrize(
    ("settings", "violations", "wanted"),
    [
        ({"lr": 5.0, "init": 100.0}, [0.5, 0.0, -1.0, 2.0], [102.5, 102.5, 97.5, 107.5]),
        ({"lr": 2.0, "init": 1.0}, [-0.25, -1.0, -8.0, 0.5, 0.5], [0.5, 0.0, 0.0, 1.0, 2.0]),  # 0 is forgotten debt
        ({"lr": 2.0, "init": 1.0, "max": 4.0}, [1.0, 1.0, 9.0, -0.5, 0.25], [3.0, 4.0, 4.0, 3.0, 3.5]),
        ({"lr": 0.5, "init": 0.0, "max": 0.0}, [1.0, -1.0], [0.0, 0.0]),
        ({"lr": 1e-3, "init": 0}, [1] * 3, [0.001, 0.002, 0.003]),
    ],
)
def test_dual_ascent_by_hand(settings, violations, wanted):
    multiplier = DualAscent(**settings)
    assert multiplier.value == settings["init"]
    assert values(multiplier, violations) == pytest.approx(wanted, rel=1e-15, abs=0)
    assert type(multiplier.value) is float


def test_fixed_multiplier_stays():
    multiplier = FixedMultiplier(weight=2)
    assert values(multiplier, [3.0, -100.0, 0.0]) == [2.0, 2.0, 2.0]
    assert FixedMultiplier(0.0).value == 0.0


@pytest.mark.parametrize("bad", BAD)
def test_bad_numbers_are_refused_by_name(bad):
    for name, least in {"init": ">= 0", "max": ">= 1"}.items():
        with pytest.raises(ValueError, match=f"multiplier: `{name}` must be finite and {least}, not {bad!r}"):
            DualAscent(**{"lr": 1.0, "init": 1.0, name: bad})
    with pytest.raises(ValueError, match=f"`lr` must be finite and > 0, not {bad!r}"):
        DualAscent(lr=bad, init=1.0)
    with pytest.raises(ValueError, match=f"`weight` must be finite and >= 0, not {bad!r}"):
        FixedMultiplier(bad)


def test_limits_of_the_ranges():
    with pytest.raises(ValueError, match="`lr` must be finite and > 0, not 0"):
        DualAscent(lr=0.0, init=1.0)
    with pytest.raises(ValueError, match=r"`max` must be finite and >= 100, not 99\.0"):
        DualAscent(lr=1.0, init=100.0, max=99.0)
    assert DualAscent(lr=1e-12, init=100.0, max=100.0).value == 100.0


def test_state_goes_through_json_and_leaves_the_settings():
    """A resumed run with another step size goes on from the λ that was reached."""
    first = DualAscent(lr=5.0, init=100.0)
    first.update(0.1)
    second = DualAscent(lr=1.0, init=7.0, max=101.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value == 100.5
    assert values(second, [0.25, 5.0]) == [100.75, 101.0]


def test_a_fixed_multiplier_has_settings_but_no_memory():
    multiplier = FixedMultiplier(3.0)
    multiplier.load_state_dict(json.loads(json.dumps(FixedMultiplier(1.0).state_dict())))
    assert multiplier.value == 3.0


def test_a_convex_problem_reaches_its_known_solution():
    """Minimise |x|² subject to 1 − x₀ − x₁ ≤ 0 (active) and x₀ − 2 ≤ 0 (not): x* = (½, ½), λ* = (1, 0).

    Stationarity: 2x − λ₀(1, 1) + λ₁(1, 0) = 0.
    """
    active, inactive = DualAscent(lr=0.1, init=5.0), DualAscent(lr=0.1, init=5.0)
    x = [3.0, -1.0]
    for _ in range(600):
        slope = [2 * x[0] - active.value + inactive.value, 2 * x[1] - active.value]
        x = [value - 0.1 * gradient for value, gradient in zip(x, slope, strict=True)]
        active.update(1 - x[0] - x[1])
        inactive.update(x[0] - 2)
    assert x == pytest.approx([0.5, 0.5], abs=1e-9)
    assert active.value == pytest.approx(1.0, abs=1e-9)
    assert inactive.value == 0.0
