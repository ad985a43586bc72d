"""A constraint: objective ≤ epsilon, with the multiplier that enforces it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

from lit_unlearn.dual.multiplier import Multiplier, smooth
from lit_unlearn.objectives.base import Objective


@dataclass(frozen=True)
class Relative:
    """An epsilon given relative to the reference model: (1 + relative) × its loss over the constraint's stream.

    Entesari et al. (arXiv 2506.05314) call it the natural choice; it is measured at the start of ``fit``.

    Args:
        relative: Allowed increase as a fraction, > −1; 0.5 allows 1.5 × the reference loss.

    Raises:
        ValueError: If ``relative`` is not finite or not above −1.
    """

    relative: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.relative) and self.relative > -1):
            raise ValueError(
                f"epsilon: `relative` must be finite and above -1, not {self.relative!r}; 0.5 means 1.5 × the "
                "reference model's loss."
            )


@final
class Constraint:
    """``objective ≤ epsilon`` on one stream of rows, and the multiplier that makes it hold.

    One object serves one run: λ and a measured epsilon stay in it.

    Args:
        objective: The bounded value, for example ``NLL()``: nats per token on retain rows.
        epsilon: Upper bound, absolute (> 0, in the objective's unit) or ``Relative``.
        multiplier: The policy for λ.
        stream: Name of the batches it is measured on.
        warmup_epochs: Whole epochs of primal steps at the initial λ before the first dual step.
        update_every: ``"step"``: one dual step per optimizer step, from the rows of that step. ``"epoch"``: one per
            epoch, from the whole stream; exact where the step's estimate is noisy, at the price of a pass over it.
        smoothing: The dual step sees β · (what it saw before) + (1 − β) · (what was measured), with this β from 0
            (none) to below 1. Use it when steps have few rows: λ then follows the trend, later.

    Raises:
        ValueError: If ``epsilon`` is not above 0 and finite, or another number is out of range.

    Example:
        >>> from lit_unlearn import NLL, Constraint, DualAscent
        >>> constraint = Constraint(NLL(), epsilon=0.3, multiplier=DualAscent(lr=5.0, init=100.0))
        >>> constraint.update(0.5, epoch=0)
        >>> constraint.multiplier.value
        101.0
    """

    name = "constraint"  # its key in LitUnlearn.constraints, for messages

    def __init__(
        self,
        objective: Objective,
        epsilon: float | Relative,
        multiplier: Multiplier,
        stream: str = "retain",
        warmup_epochs: int = 0,
        update_every: Literal["step", "epoch"] = "step",
        smoothing: float = 0.0,
    ) -> None:
        if not isinstance(epsilon, Relative) and not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(
                f"constraint: `epsilon` must be finite and above 0, not {epsilon!r}; give nats per token for NLL, or "
                "`relative: 0.5` for 1.5 × the reference model's loss."
            )
        if warmup_epochs < 0:
            raise ValueError(f"constraint: `warmup_epochs` must be 0 or more, not {warmup_epochs!r}.")
        if update_every not in ("step", "epoch"):
            raise ValueError(f"constraint: `update_every` must be 'step' or 'epoch', not {update_every!r}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"constraint: `smoothing` must be at least 0 and below 1, not {smoothing!r}.")
        self.objective = objective
        self.multiplier = multiplier
        self.stream = stream
        self.warmup_epochs = warmup_epochs
        self.update_every = update_every
        self.smoothing = smoothing
        self.reference: float | None = None
        self._smoothed: float | None = None
        self._epsilon = epsilon

    @property
    def is_relative(self) -> bool:
        """Whether epsilon depends on the reference model's loss."""
        return self.relative is not None

    @property
    def relative(self) -> float | None:
        """Allowed increase over the reference model's loss, as a fraction; ``None`` for an absolute epsilon."""
        return self._epsilon.relative if isinstance(self._epsilon, Relative) else None

    @property
    def epsilon(self) -> float | None:
        """The upper bound; ``None`` while a relative one is not measured."""
        if not isinstance(self._epsilon, Relative):
            return self._epsilon
        return None if self.reference is None else (1 + self._epsilon.relative) * self.reference

    def __str__(self) -> str:
        if not isinstance(self._epsilon, Relative):
            bound = f"{self._epsilon:.4g} as configured"
        elif self.reference is None:
            bound = f"{1 + self._epsilon.relative:g} × the value before unlearning, not measured yet"
        else:
            bound = f"{self.epsilon:.4g} = {1 + self._epsilon.relative:g} × the {self.reference:.4g} before unlearning"
        policy = f"{type(self.multiplier).__name__}, λ = {self.multiplier.value:.4g}"
        return f"{self.name}: {type(self.objective).__name__} on '{self.stream}' ≤ {bound}; {policy}"

    def set_reference(self, value: float) -> None:
        """Fixes a relative epsilon from the reference model's loss.

        Args:
            value: The reference model's objective over the whole stream, finite and > 0.

        Raises:
            ValueError: If ``value`` cannot serve as a scale.
        """
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"constraint '{self.name}': the reference model measures {value!r} on the '{self.stream}' stream, which "
                "gives no bound; set an absolute `epsilon`, or check the model and the rows."
            )
        self.reference = value

    def violation(self, value: float) -> float:
        """``value`` − epsilon; positive where the constraint does not hold.

        Raises:
            RuntimeError: If a relative epsilon has not been measured yet.
        """
        if self.epsilon is None:
            raise RuntimeError(
                f"constraint '{self.name}': its relative epsilon is measured at the start of fit, not before."
            )
        return value - self.epsilon

    def check(self, value: float) -> None:
        """Refuses a measured value that would silently switch the constraint off (``max(0, nan)`` is 0).

        Raises:
            ValueError: If ``value`` is not finite.
        """
        if not math.isfinite(value):
            epsilon = "not measured yet" if self.epsilon is None else f"{self.epsilon:.4g}"
            raise ValueError(
                f"constraint '{self.name}' measured {value} nats per token (epsilon {epsilon}); its multiplier "
                f"stays {self.multiplier.value:.4g}. The {self.stream} loss is not finite:\nlower "
                "`model.optimizer.init_args.lr`, or look for rows without supervised tokens in the "
                f"'{self.stream}' stream."
            )

    def update(self, value: float, epoch: int) -> None:
        """Takes one dual step, unless the warm-up still runs.

        Args:
            value: The objective over everything this optimizer step (or epoch) saw, on all processes.
            epoch: The pass over the forget set it belongs to, from 0.

        Raises:
            ValueError: If ``value`` is not finite; λ is left as it was.
        """
        self.check(value)
        self._smoothed = smooth(value, self._smoothed, self.smoothing)
        if epoch >= self.warmup_epochs:
            self.multiplier.update(self.violation(self._smoothed))

    def state_dict(self) -> dict[str, Any]:
        """λ, controller memory, the smoothed value and the measured reference, in plain JSON types."""
        memory = {"reference": self.reference, "smoothed": self._smoothed}
        return {"multiplier": self.multiplier.state_dict(), **memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; epsilon and step sizes stay those of this object."""
        self.multiplier.load_state_dict(state["multiplier"])
        self.reference, self._smoothed = state["reference"], state["smoothed"]
