"""Multipliers: the weight of a constraint, and its policy for the measured violation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from lit_unlearn.utils.validation import check_number


class Multiplier(ABC):
    """The multiplier λ ≥ 0 of one constraint, a Python float so that no precision setting ever rounds it.

    Args:
        init: λ before the first dual step, finite and ≥ 0.

    Raises:
        ConfigError: If ``init`` is negative or not finite.
    """

    def __init__(self, init: float) -> None:
        # A float even if a configuration file says 0: λ goes to JSON and is compared bit for bit after a resume.
        self.value = float(check_number(self, "init", init, at_least=0))

    @abstractmethod
    def update(self, violation: float) -> None:
        """Take one dual step.

        Args:
            violation: Objective value minus epsilon, finite (``Constraint.update`` refuses anything else first).
        """

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the next dual step, in plain JSON types."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; settings such as the step size stay those of this object."""
        self.value = float(state["value"])


class FixedMultiplier(Multiplier):
    """A constant λ: the classical weighted sum of a forgetting and a retention loss, with the bound only reported.

    Use it to reproduce scalarised baselines.

    Args:
        weight: The constant λ, finite and ≥ 0.

    Raises:
        ConfigError: If ``weight`` is negative or not finite.

    Example:
        >>> multiplier = FixedMultiplier(1.0)
        >>> multiplier.update(violation=3.0)
        >>> multiplier.value
        1.0
    """

    def __init__(self, weight: float) -> None:
        # Checked here, so that an error names `weight` and not `init`.
        super().__init__(check_number(self, "weight", weight, at_least=0))

    def update(self, violation: float) -> None:
        """Leave λ as it is."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep this object's weight: a fixed multiplier has settings but no memory."""


class PIMultiplier(Multiplier):
    """A PI controller of the violation: dual ascent that brakes before it overshoots.

    λ ← [λ + lr · (ki · v + kp · (ξ − ξ′))]₊, where v is the violation, ξ ← nu · ξ′ + (1 − nu) · v its smoothed value
    and ξ′ that of the step before (v itself at the first step). Use it when λ and the retention loss swing around the
    bound with `DualAscent`: kp > 0 damps the swings, at the same ``lr · ki``, as long as nu is small and lr · kp not so
    large that it swings by itself. ``kp=0`` is `DualAscent`. Sohrabi et
    al., "On PI controllers for updating Lagrange multipliers in constrained optimization", ICML 2024 (arXiv 2406.04558).

    Args:
        lr: Dual step size > 0, in λ per nat of violation.
        kp: Proportional gain ≥ 0; one to four times ``ki`` damps noticeably.
        ki: Integral gain > 0.
        nu: Smoothing of the proportional part against noise, from 0 (none) to below 1; near 1 it undoes the damping.
        init: λ₀ ≥ 0. The squared logit margin is in the hundreds where the NLL is below one, hence 50 to 100.
        max: Upper cap on λ, ≥ ``init``; ``None`` for no cap.

    Raises:
        ConfigError: If a number is out of its range or not finite.

    Example:
        >>> multiplier = PIMultiplier(lr=1.0, kp=10.0, init=5.0)
        >>> for violation in (0.5, 0.4):  # still violated, but less: λ falls already
        ...     multiplier.update(violation)
        ...     print(round(multiplier.value, 3))
        5.5
        4.9
    """

    def __init__(
        self, lr: float, kp: float, ki: float = 1.0, nu: float = 0.0, init: float = 0.0, max: float | None = None
    ) -> None:
        super().__init__(init)
        self.lr = check_number(self, "lr", lr, above=0)
        self.kp = check_number(self, "kp", kp, at_least=0)
        self.ki = check_number(self, "ki", ki, above=0)
        self.nu = check_number(self, "nu", nu, at_least=0, below=1)
        self.max = None if max is None else float(check_number(self, "max", max, at_least=self.value))
        self._smoothed: float | None = None

    def update(self, violation: float) -> None:
        """Move λ by the controller's output and project it to ``[0, max]``."""
        # No step before the first one: the proportional part is then 0, and the step that of dual ascent.
        before = violation if self._smoothed is None else self._smoothed
        self._smoothed = update_average(violation, self._smoothed, self.nu)
        change = self.ki * violation + self.kp * (self._smoothed - before)
        # λ is cut to its bounds and the memory is not, so that a long slack leaves no debt behind (no integral windup).
        self.value = min(max(0.0, self.value + self.lr * change), math.inf if self.max is None else self.max)

    def state_dict(self) -> dict[str, Any]:
        """Return λ and the smoothed violation."""
        return {**super().state_dict(), "smoothed": self._smoothed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a `FixedMultiplier`'s has no memory of the violation."""
        super().load_state_dict(state)
        # A resumed run may set a lower cap than the one that λ was saved under.
        self.value = min(self.value, math.inf if self.max is None else self.max)
        self._smoothed = state.get("smoothed")


class DualAscent(PIMultiplier):
    """Projected gradient ascent on the dual, λ ← [λ + lr · violation]₊: the paper's rule.

    λ grows while the constraint is violated and shrinks, down to zero, while there is slack. Use it first.
    Entesari et al., "Constrained Entropic Unlearning", NeurIPS 2025 (arXiv 2506.05314), η there is `lr` here.

    Args:
        lr: Dual step size η > 0, in λ per nat of violation.
        init: λ₀ ≥ 0. The squared logit margin is in the hundreds where the NLL is below one, hence 50 to 100.
        max: Upper cap on λ, ≥ ``init``; ``None`` for no cap.

    Raises:
        ConfigError: If a number is out of its range or not finite.

    Example:
        >>> multiplier = DualAscent(lr=5.0, init=100.0)
        >>> multiplier.update(violation=0.5)
        >>> multiplier.value
        102.5
    """

    def __init__(self, lr: float, init: float, max: float | None = None) -> None:
        super().__init__(lr, kp=0.0, init=init, max=max)


def update_average(value: float, before: float | None, factor: float) -> float:
    """Compute the exponential moving average ``factor · before + (1 − factor) · value``; ``value`` at the first step."""
    return value if before is None else factor * before + (1 - factor) * value
