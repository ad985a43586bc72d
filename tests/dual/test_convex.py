"""A convex problem with a known solution: reached, and step by step as cooper, the reference implementation, goes there.

Minimise |x|² subject to A x ≤ b: −x₀ − 2x₁ ≤ −5 is active, x₀ − x₁ ≤ 1 is not. x* = (1, 2) and λ* = (2, 0): there
2x + Aᵀλ = 0, A x − b = (0, −2), and λ* ≥ 0.

Order of updates, here, in `LitUnlearn.training_step` and in cooper's `SimultaneousOptimizer`: both steps start from
(xₜ, λₜ). The gradient of the primal step weighs the constraints with λₜ; the dual step sees the violation at xₜ, from the
forward pass that gave this gradient, not at xₜ₊₁. Then λ is projected to λ ≥ 0; a controller's memory is not touched.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import pairwise
from typing import NamedTuple

import cooper
import pytest
import torch
from cooper.optim import AlternatingPrimalDualOptimizer, SimultaneousOptimizer, nuPI, nuPIInitType
from torch import Tensor

from lit_unlearn import NLL, Constraint, DualAscent, PIMultiplier

A = torch.tensor([[-1.0, -2.0], [1.0, -1.0]], dtype=torch.float64)
B = torch.tensor([-5.0, 1.0], dtype=torch.float64)
START = (3.0, -1.0)
PRIMAL_LR = 0.1


class Step(NamedTuple):
    x: list[float]  # after the step
    multipliers: list[float]  # after the step
    violations: list[float]  # before it


def ours(multipliers, steps, update=None):
    """Simultaneous steps with the gradient by hand."""
    x, trajectory = torch.tensor(START, dtype=torch.float64), []
    update = update or [multiplier.update for multiplier in multipliers]
    for _ in range(steps):
        violations = (A @ x - B).tolist()
        weights = torch.tensor([multiplier.value for multiplier in multipliers], dtype=torch.float64)
        x = x - PRIMAL_LR * (2 * x + A.T @ weights)
        for dual_step, violation in zip(update, violations, strict=True):
            dual_step(violation)
        trajectory.append(Step(x.tolist(), [multiplier.value for multiplier in multipliers], violations))
    return trajectory


class Problem(cooper.ConstrainedMinimizationProblem):
    def __init__(self, init: float) -> None:
        super().__init__()
        weights = torch.full((2,), init, dtype=torch.float64)
        multiplier = cooper.multipliers.DenseMultiplier(init=weights, dtype=torch.float64)
        self.bounds = cooper.Constraint(cooper.ConstraintType.INEQUALITY, multiplier=multiplier)

    def compute_cmp_state(self, x: Tensor) -> cooper.CMPState:
        return cooper.CMPState(x.square().sum(), {self.bounds: cooper.ConstraintState(A @ x - B)})


def theirs(dual, init, steps, scheme=SimultaneousOptimizer, documented_memory=False):
    """The same problem with cooper.

    Args:
        documented_memory: Whether to put cooper's smoothed violation after the first step where its documentation has it,
            at ξ₀ = v₀. The code of 1.0.1 leaves 0 there, which its authors call a bug (cooper-org/cooper#107).
    """
    problem, x = Problem(init), torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    dual = dual(problem.dual_parameters())
    optimizer = scheme(problem, torch.optim.SGD([x], lr=PRIMAL_LR), dual)
    weights, trajectory = problem.bounds.multiplier.weight, []
    for step in range(steps):
        rolled = optimizer.roll({"x": x})
        violations = rolled.cmp_state.observed_constraints[problem.bounds].violation.detach()
        if documented_memory and step == 0:
            dual.state[weights]["xi"] = violations.clone()
        trajectory.append(Step(x.tolist(), weights.tolist(), violations.tolist()))
    return trajectory


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, maximize=True)


def nupi(lr, kp, ki, nu, init_type=nuPIInitType.SGD):
    gains = {"Kp": torch.tensor(kp, dtype=torch.float64), "Ki": torch.tensor(ki, dtype=torch.float64)}  # else float32
    return lambda parameters: nuPI(parameters, lr, **gains, ema_nu=nu, init_type=init_type, maximize=True)


def assert_same(found, wanted):
    """At every step; sums in another order differ by 4e-15 here, where numbers go up to 13."""
    assert len(found) == len(wanted)
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for field in Step._fields:
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=0, abs=1e-12), (step, field)


def rests_and_returns(trajectory):
    """Whether some λ was projected to 0 and left it again, so that what it remembers there decides later steps."""
    histories = zip(*(step.multipliers for step in trajectory), strict=True)
    return any(now == 0 < after for history in histories for now, after in pairwise(history))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DualAscent(lr=0.1, init=5.0),
        lambda: DualAscent(lr=0.1, init=0.0, max=2.5),
        lambda: PIMultiplier(lr=0.1, kp=2.0, init=5.0),
        lambda: PIMultiplier(lr=0.2, kp=2.0, ki=0.5, nu=0.5, init=5.0),
        lambda: PIMultiplier(lr=0.1, kp=4.0, nu=0.9, init=0.0),
    ],
    ids=["dual-ascent", "capped", "pi", "pi-ki-nu", "pi-nu"],
)
def test_the_known_solution_is_reached(make):
    *_, last = ours([make(), make()], steps=600)
    assert last.x == pytest.approx([1.0, 2.0], rel=0, abs=1e-9)
    assert last.multipliers[0] == pytest.approx(2.0, rel=0, abs=1e-9)
    assert last.multipliers[1] == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.8])
def test_the_known_solution_is_reached_through_smoothed_constraints(smoothing):
    constraints = [Constraint(NLL(), 1.0, DualAscent(lr=0.02, init=5.0), smoothing=smoothing) for _ in range(2)]
    update = [lambda v, c=constraint: c.update(v + 1.0, epoch=0) for constraint in constraints]  # value = v + epsilon
    *_, last = ours([constraint.multiplier for constraint in constraints], steps=1500, update=update)
    assert last.x == pytest.approx([1.0, 2.0], rel=0, abs=1e-9)
    assert last.multipliers == pytest.approx([2.0, 0.0], rel=0, abs=1e-9)


def test_a_cap_below_the_solution_holds_the_multiplier_there():
    """With λ₀ ≤ 1 the best x for this weight is (½, 1): the constraint stays violated, by 2½."""
    *_, last = ours([DualAscent(lr=0.1, init=0.0, max=1.0), DualAscent(lr=0.1, init=0.0)], steps=600)
    assert last.multipliers == [1.0, 0.0]
    assert last.x == pytest.approx([0.5, 1.0], rel=0, abs=1e-9)
    assert last.violations[0] == pytest.approx(2.5, rel=0, abs=1e-9)


def swings(multiplier):
    """Of the active constraint after step 20: (sum, largest) |violation|."""
    seen = [abs(step.violations[0]) for step in ours([multiplier(), multiplier()], steps=600)][20:]
    return sum(seen), max(seen)


def test_a_proportional_gain_damps_the_swings_of_dual_ascent():
    total, largest = swings(lambda: DualAscent(lr=0.2, init=5.0))
    signs = [step.violations[0] > 0 for step in ours([DualAscent(lr=0.2, init=5.0) for _ in range(2)], steps=100)]
    assert sum(a != b for a, b in pairwise(signs)) >= 10  # there is something to damp
    assert total > 20
    for kp, share in {1.0: 0.25, 2.0: 0.05, 4.0: 0.01}.items():  # found: 0.23, 0.021, 0.0014
        damped, peak = swings(lambda kp=kp: PIMultiplier(lr=0.2, kp=kp, init=5.0))
        assert damped < share * total
        assert peak < 0.5 * largest


@pytest.mark.parametrize("init", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("lr", [0.05, 0.2])
def test_dual_ascent_takes_the_steps_of_cooper(lr, init):
    found = ours([DualAscent(lr, init), DualAscent(lr, init)], steps=200)
    assert_same(found, theirs(sgd(lr), init, 200))
    assert_same(found, theirs(nupi(lr, 0.0, 1.0, 0.0), init, 200))
    assert any(0.0 in step.multipliers for step in found)  # the projection was active


def test_the_order_of_updates_shows_in_the_steps():
    """What the comparisons above would say if the dual step saw xₜ₊₁."""
    found = ours([DualAscent(0.1, 5.0), DualAscent(0.1, 5.0)], steps=3)
    other = theirs(sgd(0.1), 5.0, 3, scheme=AlternatingPrimalDualOptimizer)
    assert found[0].x == pytest.approx(other[0].x, rel=0, abs=1e-12)
    assert found[0].multipliers[0] - other[0].multipliers[0] > 0.1


GAINS = [(1.0, 1.0, 0.0), (2.0, 1.0, 0.5), (2.0, 0.7, 0.3), (1.0, 1.0, 0.9)]


@pytest.mark.parametrize("init", [5.0, 10.0])
@pytest.mark.parametrize(("kp", "ki", "nu"), GAINS)
def test_pi_takes_the_steps_that_cooper_documents(kp, ki, nu, init):
    lr = 0.3
    found = ours([PIMultiplier(lr, kp, ki, nu, init) for _ in range(2)], steps=200)
    assert_same(found, theirs(nupi(lr, kp, ki, nu), init, 200, documented_memory=True))
    assert rests_and_returns(found)


@pytest.mark.parametrize("init", [5.0, 10.0])
@pytest.mark.parametrize(("kp", "ki", "nu"), GAINS)
def test_pi_with_an_empty_memory_takes_the_steps_of_cooper(kp, ki, nu, init):
    """cooper's other start, ξ = 0 before the first step, in which its code and its documentation agree."""
    lr = 0.3
    multipliers = [PIMultiplier(lr, kp, ki, nu) for _ in range(2)]
    for multiplier in multipliers:
        multiplier.load_state_dict({"value": init, "smoothed": 0.0})
    found = ours(multipliers, steps=200)
    assert_same(found, theirs(nupi(lr, kp, ki, nu, nuPIInitType.ZEROS), init, 200))
    assert rests_and_returns(found)


@pytest.mark.skipif(version("cooper-optim") not in ("1.0.0", "1.0.1"), reason="cooper-org/cooper#107 may be repaired")
@pytest.mark.parametrize(("kp", "ki", "nu"), GAINS)
def test_the_second_step_of_cooper_is_off_by_what_its_memory_lost(kp, ki, nu):
    """The one known difference: ξ₀ is 0 there and v₀ here, so its second step adds lr · kp · (1 − nu) · v₀."""
    lr, init = 0.1, 100.0  # far from the projection
    found = ours([PIMultiplier(lr, kp, ki, nu, init) for _ in range(2)], steps=2)
    other = theirs(nupi(lr, kp, ki, nu), init, 2)
    assert_same(found[:1], other[:1])
    lost = [lr * kp * (1 - nu) * violation for violation in found[0].violations]
    assert min(map(abs, lost)) > 1e-3
    difference = [b - a for a, b in zip(found[1].multipliers, other[1].multipliers, strict=True)]
    assert difference == pytest.approx(lost, rel=0, abs=1e-12)
