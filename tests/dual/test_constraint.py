from __future__ import annotations

import json
import math
import re

import pytest

from lit_unlearn import NLL, Constraint, DualAscent, FixedMultiplier, Relative

NOT_FINITE = [math.nan, math.inf, -math.inf]


def make(epsilon=0.3, init=100.0, name="nll", **settings):
    constraint = Constraint(NLL(), epsilon, DualAscent(lr=5.0, init=init), **settings)
    constraint.name = name  # what LitUnlearn does
    return constraint


@pytest.mark.parametrize("epsilon", [0.0, -0.3, *NOT_FINITE])
def test_an_epsilon_that_bounds_nothing_is_refused(epsilon):
    with pytest.raises(ValueError, match=re.escape(f"`epsilon` must be finite and above 0, not {epsilon!r}")):
        make(epsilon)


@pytest.mark.parametrize("relative", [-1, -1.5, *NOT_FINITE])
def test_a_relative_epsilon_that_bounds_nothing_is_refused(relative):
    with pytest.raises(ValueError, match=re.escape(f"`relative` must be finite and above -1, not {relative!r}")):
        Relative(relative)


@pytest.mark.parametrize("warmup", [-1, -10])
def test_negative_warmup_is_refused(warmup):
    with pytest.raises(ValueError, match=f"`warmup_epochs` must be 0 or more, not {warmup}"):
        make(warmup_epochs=warmup)


def test_dual_steps_by_hand():
    constraint = make()
    assert (constraint.epsilon, constraint.is_relative, constraint.stream) == (0.3, False, "retain")
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


def test_a_nan_is_refused_in_these_words_and_leaves_the_multiplier():
    constraint = make(init=101.5)
    with pytest.raises(ValueError, match="measured nan") as error:
        constraint.update(math.nan, epoch=0)
    assert str(error.value) == (
        "constraint 'nll' measured nan nats per token (epsilon 0.3); its multiplier stays 101.5. The retain loss is not "
        "finite:\nlower `model.optimizer.init_args.lr`, or look for rows without supervised tokens in the 'retain' stream."
    )
    assert constraint.multiplier.value == 101.5


@pytest.mark.parametrize(("epsilon", "shown"), [(0.3, "0.3"), (2, "2"), (1.23456789e-7, "1.235e-07")])
def test_the_message_shows_epsilon_whole(epsilon, shown):
    with pytest.raises(ValueError, match=rf"\(epsilon {re.escape(shown)}\)"):
        make(epsilon).check(math.nan)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_value_that_is_not_finite_is_refused_during_warmup_too(value, epoch):
    constraint = make(name="news", stream="holdout", warmup_epochs=1)
    message = rf"'news' measured {value} .* The holdout loss is not finite:\n.* in the 'holdout' stream"
    with pytest.raises(ValueError, match=message):
        constraint.update(value, epoch)
    assert constraint.multiplier.value == 100.0


def test_relative_epsilon_is_measured_first():
    constraint = make(Relative(0.5))
    assert constraint.is_relative
    assert constraint.epsilon is None
    assert str(constraint) == "nll: NLL on 'retain' ≤ epsilon, not measured yet"
    for action in (lambda: constraint.violation(0.5), lambda: constraint.update(0.5, epoch=0)):
        with pytest.raises(RuntimeError, match="'nll': its relative epsilon is measured at the start of fit"):
            action()
    assert constraint.multiplier.value == 100.0
    constraint.set_reference(0.2)
    assert constraint.epsilon == pytest.approx(0.3)
    assert str(constraint) == "nll: NLL on 'retain' ≤ 0.3 (from the reference model's 0.2)"
    constraint.update(0.5, epoch=0)
    assert constraint.multiplier.value == pytest.approx(101.0)


def test_a_relative_epsilon_may_ask_for_less_than_the_reference():
    constraint = make(Relative(-0.25))
    constraint.set_reference(0.4)
    assert constraint.epsilon == pytest.approx(0.3)


@pytest.mark.parametrize("value", [0.0, -0.1, *NOT_FINITE])
def test_a_reference_that_gives_no_bound_is_refused(value):
    constraint = make(Relative(0.5))
    message = f"'nll': the reference model measures {value!r} on the 'retain' stream, which gives no bound"
    with pytest.raises(ValueError, match=re.escape(message)):
        constraint.set_reference(value)
    assert constraint.reference is None


def test_an_absolute_epsilon_says_so():
    assert str(make()) == "nll: NLL on 'retain' ≤ 0.3 (as configured)"


def test_state_keeps_what_was_reached_and_leaves_the_settings():
    first = make(Relative(0.5))
    first.set_reference(0.2)
    first.update(0.5, epoch=0)
    state = json.loads(json.dumps(first.state_dict()))
    second = Constraint(NLL(), Relative(1.0), DualAscent(lr=1.0, init=3.0), warmup_epochs=2)
    second.load_state_dict(state)
    assert second.multiplier.value == first.multiplier.value == pytest.approx(101.0)
    assert second.reference == 0.2
    assert second.epsilon == pytest.approx(0.4)  # the new fraction of the measured reference
    second.update(0.5, epoch=1)
    assert second.multiplier.value == pytest.approx(101.0)  # the new warm-up
    second.update(0.5, epoch=2)
    assert second.multiplier.value == pytest.approx(101.1)  # the new step size


def test_state_of_an_unmeasured_constraint():
    fixed = Constraint(NLL(), 0.3, FixedMultiplier(2.0))
    fixed.load_state_dict(json.loads(json.dumps(make().state_dict())))
    assert (fixed.multiplier.value, fixed.reference, fixed.epsilon) == (2.0, None, 0.3)
