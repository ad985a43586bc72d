from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_unlearn import (
    NLL,
    NPO,
    Constraint,
    DualAscent,
    FixedMultiplier,
    LogitMargin,
    MatchCalibrated,
    MatchUnseen,
    Objective,
    PIMultiplier,
    Relative,
)
from lit_unlearn.errors import ConfigError, DivergedError

NOT_FINITE = [math.nan, math.inf, -math.inf]


def make(epsilon=0.3, init=100.0, **options):
    return Constraint(NLL(), epsilon, DualAscent(lr=5.0, init=init), **options)


def binary(smoothing, **options):
    """ε = ¼, λ₀ = 8 and a dual step of 4: hand-computed values come out exact."""
    return Constraint(NLL(), 0.25, DualAscent(lr=4.0, init=8.0), smoothing=smoothing, **options)


def through(constraint, values, epoch=0):
    seen = []
    for value in values:
        constraint.update(value, epoch)
        seen.append(constraint.multiplier.value)
    return seen


@pytest.mark.parametrize("epsilon", [0.0, -0.3, *NOT_FINITE])
def test_an_epsilon_that_bounds_nothing_is_refused(epsilon):
    with pytest.raises(ConfigError, match=f"`epsilon` .*above 0.*{epsilon!r}"):
        make(epsilon)


@pytest.mark.parametrize("relative", [-1, -1.5, *NOT_FINITE])
def test_a_relative_epsilon_that_bounds_nothing_is_refused(relative):
    with pytest.raises(ConfigError, match=f"`relative` .*above -1.*{relative!r}"):
        Relative(relative)


@pytest.mark.parametrize("warmup", [-1, -10])
def test_negative_warmup_is_refused(warmup):
    with pytest.raises(ConfigError, match=f"`warmup_epochs` .*at least 0.*{warmup}"):
        make(warmup_epochs=warmup)


@pytest.mark.parametrize("objective", [MatchUnseen(), MatchCalibrated()], ids=type)
def test_an_objective_whose_level_would_never_be_measured_is_refused(objective: Objective) -> None:
    with pytest.raises(ConfigError, match=rf"{type(objective).__name__} has a level"):
        Constraint(objective, 1.0, FixedMultiplier(1.0))


def test_dual_steps_by_hand():
    constraint = make()
    assert (constraint.epsilon, constraint.level, constraint.stream) == (0.3, None, "retain")
    assert constraint.violation(0.5) == pytest.approx(0.2)
    assert constraint.violation(0.1) == pytest.approx(-0.2)
    seen = []
    for value in (0.5, 0.3, 0.1, 0.7):
        constraint.update(value, epoch=0)
        seen.append(constraint.multiplier.value)
    assert seen == pytest.approx([101.0, 101.0, 100.0, 102.0])


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warmup_holds_for_exactly_so_many_epochs(warmup):
    constraint = make(warmup_epochs=warmup)
    for epoch in range(5):
        for _ in range(2):
            before = constraint.multiplier.value
            constraint.update(0.5, epoch)
            assert constraint.multiplier.value - before == pytest.approx(0.0 if epoch < warmup else 1.0)
    assert constraint.multiplier.value == pytest.approx(100 + 2 * (5 - warmup))


@pytest.mark.parametrize(
    ("objective", "unit"),
    [
        (NLL(), "nats per token"),
        (LogitMargin(), r"logit margin\^2"),
        (NPO(), "nats per answer"),
    ],
)
def test_a_nan_is_refused_with_the_objectives_unit_and_leaves_the_multiplier(objective, unit):
    constraint = Constraint(objective, 0.3, DualAscent(lr=5.0, init=101.5))
    name = type(objective).__name__
    with pytest.raises(DivergedError, match=rf"{name} on 'retain' measured nan {unit}.*epsilon 0\.3.*101\.5"):
        constraint.update(math.nan, epoch=0)
    assert constraint.multiplier.value == 101.5


@pytest.mark.parametrize(("epsilon", "shown"), [(0.3, "0.3"), (2, "2"), (1.23456789e-7, "1.235e-07")])
def test_the_message_shows_epsilon_in_four_digits(epsilon, shown):
    with pytest.raises(DivergedError, match=rf"\(epsilon {re.escape(shown)}\)"):
        make(epsilon).check(math.nan)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_value_that_is_not_finite_is_refused_during_warmup_too(value, epoch):
    constraint = make(stream="holdout", warmup_epochs=1)
    with pytest.raises(DivergedError, match=rf"NLL on 'holdout' measured {value}"):
        constraint.update(value, epoch)
    assert constraint.multiplier.value == 100.0


def test_relative_epsilon_is_measured_first():
    constraint = make(Relative(0.5))
    assert constraint.relative == 0.5
    assert constraint.epsilon is None
    assert "NLL on 'retain' ≤ 1.5 ×" in str(constraint)
    for action in (lambda: constraint.violation(0.5), lambda: constraint.update(0.5, epoch=0)):
        with pytest.raises(RuntimeError, match=r"NLL on 'retain'.*not measured yet"):
            action()
    assert constraint.multiplier.value == 100.0
    constraint.level.set(0.2)
    assert constraint.epsilon == pytest.approx(0.3)
    assert str(constraint).startswith("NLL on 'retain' ≤ 0.3 = 1.5 × the 0.2 ")
    constraint.update(0.5, epoch=0)
    assert constraint.multiplier.value == pytest.approx(101.0)


def test_a_relative_epsilon_may_ask_for_less_than_the_reference():
    constraint = make(Relative(-0.25))
    constraint.level.set(0.4)
    assert constraint.epsilon == pytest.approx(0.3)


@pytest.mark.parametrize("value", [0.0, -0.1, *NOT_FINITE])
def test_a_reference_that_gives_no_bound_is_refused(value):
    constraint = make(Relative(0.5))
    with pytest.raises(ConfigError, match=re.escape(f"NLL on 'retain' is {value!r} ")):
        constraint.level.set(value)
    assert constraint.level.measured is None


def test_an_absolute_epsilon_says_so():
    assert str(make()) == "NLL on 'retain' ≤ 0.3 as configured; DualAscent, λ = 100"


def test_state_keeps_what_was_reached_and_leaves_the_settings():
    first = make(Relative(0.5))
    first.level.set(0.2)
    first.update(0.5, epoch=0)
    state = json.loads(json.dumps(first.state_dict()))
    second = Constraint(NLL(), Relative(1.0), DualAscent(lr=1.0, init=3.0), warmup_epochs=2)
    second.load_state_dict(state)
    assert second.multiplier.value == first.multiplier.value == pytest.approx(101.0)
    assert second.level.measured == 0.2
    assert second.epsilon == pytest.approx(0.4)  # the new fraction of the measured reference
    second.update(0.5, epoch=1)
    assert second.multiplier.value == pytest.approx(101.0)  # the new warm-up
    second.update(0.5, epoch=2)
    assert second.multiplier.value == pytest.approx(101.1)  # the new step size


def test_state_of_an_unmeasured_constraint():
    fixed = Constraint(NLL(), 0.3, FixedMultiplier(2.0))
    fixed.load_state_dict(json.loads(json.dumps(make().state_dict())))
    assert (fixed.multiplier.value, fixed.level, fixed.epsilon) == (2.0, None, 0.3)


@pytest.mark.parametrize("smoothing", [-0.1, 1, 1.5, *NOT_FINITE])
def test_a_smoothing_that_forgets_or_keeps_everything_is_refused(smoothing):
    with pytest.raises(ConfigError, match=f"`smoothing` .*at least 0 and below 1.*{smoothing!r}"):
        make(smoothing=smoothing)
    assert make(smoothing=math.nextafter(1.0, 0.0)).smoothing < 1


@pytest.mark.parametrize("wrong", ["steps", "Epoch", "", 1, None])
def test_dual_steps_come_per_step_or_per_epoch(wrong):
    with pytest.raises(ConfigError, match=f"`update_every` .*'step'.*'epoch'.*{wrong!r}"):
        make(update_every=wrong)
    assert make().update_every == "step"
    assert make(update_every="epoch").update_every == "epoch"


@pytest.mark.parametrize(
    ("smoothing", "values", "wanted"),
    [
        (0.0, [0.5, 1.0, 0.25], [9.0, 12.0, 12.0]),
        (0.5, [0.5, 1.0, 0.25], [9.0, 11.0, 12.0]),  # smoothed: ½, ¾, ½
        (0.75, [2.0, 0.0, 0.0, 0.0], [15.0, 20.0, 23.5, 25.875]),  # smoothed: 2, 1½, 1⅛, 27/32: no start from 0
        (0.75, [0.0, 2.0, 0.0], [7.0, 8.0, 8.5]),  # smoothed: 0, ½, ⅜: a first value of 0 counts as one
    ],
)
def test_smoothing_by_hand(smoothing, values, wanted):
    assert through(binary(smoothing), values) == wanted


def test_a_warmup_feeds_the_average_and_moves_nothing():
    constraint = binary(0.5, warmup_epochs=2)
    assert through(constraint, [2.0, 1.0], epoch=0) == [8.0, 8.0]  # smoothed: 2, 1½
    assert through(constraint, [0.5], epoch=1) == [8.0]  # 1
    assert through(constraint, [0.5, 0.0], epoch=2) == [10.0, 10.5]  # ¾, ⅜


def test_a_refused_value_does_not_enter_the_average():
    constraint = binary(0.5)
    constraint.update(0.5, epoch=0)
    for value in NOT_FINITE:
        with pytest.raises(ValueError, match="measured"):
            constraint.update(value, epoch=0)
    assert through(constraint, [1.0]) == [11.0]  # as in the second row by hand


def test_the_average_is_of_values_so_that_a_reference_set_later_counts_in_full():
    """A relative epsilon is measured after a warm-up: the smoothed value does not depend on it."""
    constraint = Constraint(NLL(), Relative(1.0), DualAscent(lr=4.0, init=8.0), warmup_epochs=1, smoothing=0.5)
    assert through(constraint, [2.0, 1.0], epoch=0) == [8.0, 8.0]
    constraint.level.set(0.125)
    assert through(constraint, [0.5], epoch=1) == [11.0]  # smoothed 1, epsilon ¼


def test_a_controller_behind_a_smoothing_sees_the_smoothed_violation():
    constraint = Constraint(NLL(), 0.25, PIMultiplier(lr=1.0, kp=2.0, init=8.0), smoothing=0.5)
    assert through(constraint, [0.5, 1.0, 0.25]) == [8.25, 9.25, 9.0]  # v = ¼, ½, ¼


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=20))
def test_without_smoothing_the_multiplier_sees_each_violation_bit_for_bit(values):
    plain, wanted = DualAscent(lr=5.0, init=100.0), []
    for value in values:
        plain.update(value - 0.3)
        wanted.append(plain.value)
    assert through(make(), values) == wanted
    assert through(make(smoothing=0.0, update_every="epoch"), values) == wanted


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 1e3)), min_size=1, max_size=20).map(
        lambda rows: sorted(rows, key=lambda row: row[0])
    ),
    st.integers(0, 20),
    st.floats(0.0, 1.0, exclude_max=True),
    st.sampled_from(["step", "epoch"]),
)
def test_a_constraint_goes_on_from_json_bit_for_bit(rows, cut, smoothing, update_every):
    """Through the warm-up as well: there the average moves and λ does not."""

    def run(constraint, rows):
        return [through(constraint, [value], epoch)[0] for epoch, value in rows]

    def fresh(init):
        controller = PIMultiplier(lr=0.7, kp=3.0, nu=0.3, init=init, max=500.0)
        options = {"warmup_epochs": 1, "update_every": update_every, "smoothing": smoothing}
        return Constraint(NLL(), Relative(0.5), controller, **options)

    whole, first, second = fresh(100.0), fresh(100.0), fresh(3.0)
    whole.level.set(0.7)
    first.level.set(0.7)
    run(first, rows[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.epsilon == first.epsilon == 1.5 * 0.7
    assert run(second, rows[cut:]) == run(whole, rows)[cut:]
    assert second.state_dict() == whole.state_dict()


def test_a_resumed_average_goes_on_with_the_new_settings():
    first, second = binary(0.5, update_every="epoch"), binary(0.75)
    first.update(0.5, epoch=0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.smoothing, second.update_every) == (0.75, "step")
    assert through(second, [1.5]) == [11.0]  # λ 9, smoothed ¾ · ½ + ¼ · 1½ = ¾


def test_a_fresh_state_forgets_an_average():
    constraint = binary(0.5)
    constraint.update(0.5, epoch=0)
    constraint.load_state_dict(json.loads(json.dumps(binary(0.5).state_dict())))
    assert through(constraint, [1.0]) == [11.0]  # λ 8, smoothed 1
