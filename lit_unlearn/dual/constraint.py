"""A constraint: objective ≤ epsilon, with the multiplier that enforces it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

from lit_unlearn.dual.multiplier import Multiplier, update_average
from lit_unlearn.errors import ConfigError, DivergedError
from lit_unlearn.objectives.base import Objective
from lit_unlearn.objectives.reference_level import ReferenceLevel
from lit_unlearn.utils.validation import check_choice, check_integer, check_number


@dataclass(frozen=True)
class Relative:
    """An epsilon given relative to the reference model: (1 + relative) × its loss over the constraint's stream.

    Entesari et al. (arXiv 2506.05314) call it the natural choice; it is measured when ``fit`` starts.

    Args:
        relative: Allowed increase as a fraction, > −1; 0.5 allows 1.5 × the reference loss.

    Raises:
        ConfigError: If ``relative`` is not finite or not above −1.
    """

    relative: float

    def __post_init__(self) -> None:
        check_number(self, "relative", self.relative, above=-1)


@final
class Constraint:
    """``objective ≤ epsilon`` on one stream of examples, and the multiplier that makes it hold.

    One object serves one run: λ and a measured epsilon stay in it.

    Args:
        objective: The bounded value, for example ``NLL()``: nats per token on the retain set.
        epsilon: Upper bound, absolute (> 0, in the objective's unit) or ``Relative``.
        multiplier: The policy for λ.
        stream: Name of the batches it is measured on.
        warmup_epochs: Number of epochs of primal steps at the initial λ before the first dual step.
        update_every: ``"step"``: one dual step per optimizer step, from the examples of that step. ``"epoch"``: one per
            epoch, from the whole stream; exact where the step's estimate is noisy, at the price of a pass over it.
        smoothing: The dual step sees β · (what it saw before) + (1 − β) · (what was measured), with this β from 0
            (none) to below 1. Use it when steps have few examples: λ then follows the trend, with a delay.

    Attributes:
        relative: Allowed increase over the reference model's loss, as a fraction; ``None`` for an absolute epsilon.
        level: The measured level behind a relative epsilon; ``None`` for an absolute one.

    Raises:
        ConfigError: If ``epsilon`` is not above 0 and finite, another number is out of range, or the objective has a level of its own
            that is measured before the first step, as `MatchUnseen` has.

    Example:
        >>> from lit_unlearn import NLL, Constraint, DualAscent
        >>> constraint = Constraint(NLL(), epsilon=0.3, multiplier=DualAscent(lr=5.0, init=100.0))
        >>> constraint.update(0.5, epoch=0)
        >>> constraint.multiplier.value
        101.0
    """

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
        check_choice(("step", "epoch"), self, update_every=update_every)
        if objective.level is not None:
            raise ConfigError(
                f"{type(objective).__name__} has a level that is measured before the first step, and only that of the forgetting "
                "objective is. Bound an objective without one, such as NLL.",
                owner=self,
                argument="objective",
            )
        self.objective = objective
        self.multiplier = multiplier
        self.stream = stream
        self.warmup_epochs = check_integer(self, "warmup_epochs", warmup_epochs)
        self.update_every = update_every
        self.smoothing = check_number(self, "smoothing", smoothing, at_least=0, below=1)
        self.relative: float | None = None
        self.level: ReferenceLevel | None = None
        self._absolute: float | None = None
        if isinstance(epsilon, Relative):
            self.relative = epsilon.relative
            self.level = ReferenceLevel(objective, stream, 1 + epsilon.relative)
        else:
            self._absolute = check_number(self, "epsilon", epsilon, above=0)
        self._smoothed: float | None = None

    @property
    def epsilon(self) -> float | None:
        """The upper bound; ``None`` while a relative one is not measured."""
        return self._absolute if self.level is None else self.level.value

    # Logged when a fit starts, so that a report shows where epsilon came from.
    def __str__(self) -> str:
        if self.level is None:
            bound = f"{self.epsilon:.4g} as configured"
        elif self.level.measured is None:
            bound = f"{self.level.factor:g} × the value before unlearning, not measured yet"
        else:
            bound = f"{self.epsilon:.4g} = {self.level.factor:g} × the {self.level.measured:.4g} before unlearning"
        policy = f"{type(self.multiplier).__name__}, λ = {self.multiplier.value:.4g}"
        return f"{self._title} ≤ {bound}; {policy}"

    @property
    def _title(self) -> str:
        return f"{type(self.objective).__name__} on '{self.stream}'"

    def violation(self, value: float) -> float:
        """Return ``value`` − epsilon; positive where the constraint does not hold.

        Raises:
            RuntimeError: If a relative epsilon has not been measured yet.
        """
        if self.epsilon is None:
            raise RuntimeError(
                f"{self._title}: the relative epsilon is not measured yet; a fit does that when it starts."
            )
        return value - self.epsilon

    def check(self, value: float) -> None:
        """Raise an error for a measured value that would silently switch the constraint off (``max(0, nan)`` is 0).

        Raises:
            DivergedError: If ``value`` is not finite.
        """
        if math.isfinite(value):
            return
        epsilon = "not measured yet" if self.epsilon is None else f"{self.epsilon:.4g}"
        raise DivergedError(
            f"the constraint {self._title} measured {f'{value} {self.objective.unit}'.rstrip()} (epsilon {epsilon}), which is "
            f"not finite; its multiplier stays {self.multiplier.value:.4g}. Lower the optimizer's `lr`, or look for "
            f"examples without supervised tokens in the '{self.stream}' stream."
        )

    def update(self, value: float, epoch: int) -> None:
        """Take one dual step, unless the warm-up still runs.

        Args:
            value: The objective over everything this optimizer step (or epoch) saw, on all processes.
            epoch: The pass over the forget set it belongs to, from 0.

        Raises:
            DivergedError: If ``value`` is not finite; λ is left as it was.
        """
        self.check(value)
        # Values are smoothed, not violations: a relative epsilon may be measured only after a warm-up has fed the average.
        self._smoothed = update_average(value, self._smoothed, self.smoothing)
        if epoch >= self.warmup_epochs:
            self.multiplier.update(self.violation(self._smoothed))

    def state_dict(self) -> dict[str, Any]:
        """Return λ, controller memory, the smoothed value, the measured reference and epsilon, in plain JSON types."""
        reference = None if self.level is None else self.level.measured
        return {
            "multiplier": self.multiplier.state_dict(),
            "reference": reference,
            "smoothed": self._smoothed,
            # Only for an export of the checkpoint: a run that resumes has its own.
            "epsilon": self.epsilon,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; epsilon and step sizes stay those of this object."""
        self.multiplier.load_state_dict(state["multiplier"])
        self._smoothed = state["smoothed"]
        if self.level is not None:
            self.level.measured = state["reference"]
