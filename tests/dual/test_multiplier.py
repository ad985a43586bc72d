from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_unlearn import DualAscent, FixedMultiplier, PIMultiplier
from lit_unlearn.errors import ConfigError

BAD = [-1.0, -1e-9, math.nan, math.inf, -math.inf]


LIMIT = 10.0  # nats per token: what a ruined model measures; λ then moves between its bounds and rests at them
VIOLATIONS = st.lists(st.floats(-LIMIT, LIMIT), min_size=1, max_size=30)
NU = st.floats(0.0, 1.0, exclude_max=True)
GAIN = st.floats(1e-3, 1e3)


def through_json(multiplier):
    return json.loads(json.dumps(multiplier.state_dict()))


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
    for name in ("lr", "init", "max"):
        with pytest.raises(ConfigError, match=f"`{name}`.*{bad!r}") as refusal:
            DualAscent(**{"lr": 1.0, "init": 1.0, name: bad})
        assert (type(refusal.value.owner), refusal.value.argument) == (DualAscent, name)
    with pytest.raises(ConfigError, match=f"`weight`.*{bad!r}"):
        FixedMultiplier(bad)


def test_limits_of_the_ranges():
    with pytest.raises(ConfigError, match=r"`lr`.*0"):
        DualAscent(lr=0.0, init=1.0)
    with pytest.raises(ConfigError, match=r"`max`.*100.*99\.0"):
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


@pytest.mark.parametrize(
    ("config", "violations", "wanted"),
    [
        # falls while still violated, as soon as the violation shrinks; unchanged violation: integral part alone
        ({"lr": 2.0, "kp": 3.0, "init": 10.0}, [0.5, 0.25, 0.25, -0.5], [11.0, 10.0, 10.5, 5.0]),
        # ξ = 1, ½, ¼, 1⅛: λ is held at 0 in the third step, its memory is not
        ({"lr": 1.0, "kp": 4.0, "ki": 0.5, "nu": 0.5, "init": 2.0}, [1.0, 0.0, 0.0, 2.0], [2.5, 0.5, 0.0, 4.5]),
        # the slack leaves no debt behind, and its end lifts λ from 0 though nothing is violated
        ({"lr": 1.0, "kp": 0.5, "init": 1.0}, [-8.0, -8.0, 0.0, 0.0], [0.0, 0.0, 4.0, 4.0]),
        # at the cap too the memory goes on: the fall from 4 to 1, not from 2 to 1, is what brakes
        ({"lr": 1.0, "kp": 2.0, "init": 3.0, "max": 4.0}, [2.0, 4.0, 1.0, 1.0], [4.0, 4.0, 0.0, 1.0]),
        # ξ = 4, 3, 3, 1½: ki scales only v, nu smooths only the proportional part
        ({"lr": 0.5, "kp": 2.0, "ki": 3.0, "nu": 0.75, "init": 0.0}, [4.0, 0.0, 3.0, -3.0], [6.0, 5.0, 9.5, 3.5]),
        ({"lr": 1.0, "kp": 1.0}, [1, -1, 1], [1.0, 0.0, 3.0]),  # init is 0, ki 1, nu 0, no cap
    ],
)
def test_pi_by_hand(config, violations, wanted):
    multiplier = PIMultiplier(**config)
    assert multiplier.value == config.get("init", 0.0)
    assert values(multiplier, violations) == wanted  # binary fractions: exact
    assert type(multiplier.value) is float


@pytest.mark.parametrize("violation", [0.3, -0.3, 0.0])
@pytest.mark.parametrize(
    "nu", [0.0, 0.5, 0.75]
)  # exact in binary; with 0.9 the smoothed v is v only up to its last bit
@pytest.mark.parametrize("kp", [0.0, 1.0, 1000.0])
def test_the_first_step_is_plain_dual_ascent(kp, nu, violation):
    multiplier, plain = PIMultiplier(lr=0.5, kp=kp, ki=4.0, nu=nu, init=10.0), DualAscent(lr=2.0, init=10.0)
    assert values(multiplier, [violation]) == values(plain, [violation])


@settings(max_examples=60, deadline=None)
@given(VIOLATIONS, GAIN, st.floats(0.0, 1e3), NU, st.none() | st.floats(0.0, 1e3))
def test_without_proportional_gain_it_is_dual_ascent_bit_for_bit(violations, lr, init, nu, room):
    cap = None if room is None else init + room
    wanted, value = [], init
    for violation in violations:
        value = max(0.0, value + lr * violation)
        value = value if cap is None else min(value, cap)
        wanted.append(value)
    assert values(DualAscent(lr, init, cap), violations) == wanted
    assert values(PIMultiplier(lr, kp=0.0, nu=nu, init=init, max=cap), violations) == wanted


@settings(max_examples=60, deadline=None)
@given(VIOLATIONS, GAIN, GAIN, GAIN, NU)
def test_between_its_bounds_it_is_the_sum_of_integral_and_proportion(violations, lr, kp, ki, nu):
    """λ = λ₀ + lr · (ki · Σ v + kp · (ξ − v₀)), with ξ written out as a weighted sum."""
    last = len(violations) - 1
    weights = [nu**last, *((1 - nu) * nu ** (last - step) for step in range(1, last + 1))]
    smoothed = math.fsum(weight * violation for weight, violation in zip(weights, violations, strict=True))
    integral, proportion = ki * math.fsum(violations), kp * (smoothed - violations[0])
    init = lr * (ki + 2 * kp) * LIMIT * 31  # λ never comes down to 0
    multiplier = PIMultiplier(lr, kp, ki, nu, init)
    values(multiplier, violations)
    # up to 30 rounded additions to a λ of up to 2 · init
    assert multiplier.value == pytest.approx(init + lr * (integral + proportion), rel=0, abs=31 * math.ulp(2 * init))


@settings(max_examples=60, deadline=None)
@given(VIOLATIONS, st.integers(0, 30), st.floats(0.1, 10.0), st.floats(0.0, 10.0), NU)
@example([1.0, 0.5, 0.25], 1, 1.0, 2.0, 0.5)  # the second step needs the memory of the first
def test_pi_goes_on_from_json_bit_for_bit(violations, cut, lr, kp, nu):
    def make(init):
        return PIMultiplier(lr, kp, ki=0.7, nu=nu, init=init, max=200.0)

    whole, first, second = make(100.0), make(100.0), make(3.0)
    values(first, violations[:cut])
    second.load_state_dict(through_json(first))
    assert second.value == first.value
    assert values(second, violations[cut:]) == values(whole, violations)[cut:]
    assert through_json(second) == through_json(whole)


@pytest.mark.parametrize("state", [{"value": 2.5}, FixedMultiplier(2.5).state_dict()])
def test_a_state_without_memory_starts_like_a_first_step(state):
    multiplier = PIMultiplier(lr=1.0, kp=8.0, nu=0.5, init=1.0, max=50.0)
    values(multiplier, [1.0, -4.0])  # a memory to be forgotten
    multiplier.load_state_dict(json.loads(json.dumps(state)))
    assert values(multiplier, [0.5, 0.25, 9.0]) == [3.0, 2.25, 45.75]  # ξ = ½, ⅜, 4 11/16


def test_dual_ascent_and_pi_take_over_from_each_other():
    ascent, controller = DualAscent(lr=1.0, init=4.0), PIMultiplier(lr=1.0, kp=8.0, init=1.0)
    values(controller, [1.0, 1.5])
    ascent.load_state_dict(through_json(controller))
    assert ascent.value == 7.5
    assert values(ascent, [-2.0, 1.0]) == [5.5, 6.5]
    controller.load_state_dict(through_json(ascent))
    assert controller.value == 6.5


@pytest.mark.parametrize("bad", BAD)
def test_bad_settings_of_a_pi_controller_are_refused_by_name(bad):
    for name in ("lr", "kp", "ki", "nu", "init", "max"):
        with pytest.raises(ConfigError, match=f"`{name}`.*{bad!r}"):
            PIMultiplier(**{"lr": 1.0, "kp": 1.0, "init": 1.0, name: bad})


def test_limits_of_the_ranges_of_a_pi_controller():
    for name, bad in {"lr": 0.0, "ki": 0.0, "nu": 1.0}.items():
        with pytest.raises(ConfigError, match=f"`{name}`.*{bad}"):
            PIMultiplier(**{"lr": 1.0, "kp": 1.0, name: bad})
    with pytest.raises(ConfigError, match=r"`max`.*3.*2\.5"):
        PIMultiplier(lr=1.0, kp=1.0, init=3.0, max=2.5)
    edge = PIMultiplier(lr=1e-12, kp=0, ki=1e-12, nu=math.nextafter(1.0, 0.0), init=0, max=0)
    assert (edge.kp, edge.value, edge.max) == (0.0, 0.0, 0.0)
