"""A number relative to what the reference model measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from lit_unlearn.errors import ConfigError

if TYPE_CHECKING:
    from lit_unlearn.objectives.base import Objective

Measure: TypeAlias = "Callable[[Objective], list[float] | None]"
"""Returns the means of an objective's columns on the reference model, over a whole stream; ``None`` if there is no such stream."""


class ReferenceLevel:
    """A multiple of an objective's mean on the reference model, measured over a whole stream before the first step.

    ``Relative`` epsilons and `MatchUnseen` are levels of this kind. ``LitUnlearn`` measures every level that is not set
    when a fit starts, and a resumed run takes the measured value from its checkpoint: by then the model has changed.

    Args:
        objective: Objective to measure.
        stream: Stream to measure it on.
        factor: The level is this times the measured value; > 0.

    Example:
        >>> from lit_unlearn import NLL
        >>> level = ReferenceLevel(NLL(), "retain", factor=1.5)
        >>> level.set(0.2)
        >>> round(level.value, 3)
        0.3
    """

    def __init__(self, objective: Objective, stream: str, factor: float) -> None:
        self.objective = objective
        self.stream = stream
        self.factor = factor
        self.measured: float | None = None

    @property
    def value(self) -> float | None:
        """The level, in the objective's unit; ``None`` until it is measured."""
        return None if self.measured is None else self.factor * self.measured

    def measure(self, measure: Measure) -> float | None:
        """Return what the level is a multiple of; ``None`` if there is no such stream.

        Args:
            measure: Measures an objective on the stream.
        """
        means = measure(self.objective)
        return None if means is None else means[0]

    def describe(self) -> str:
        """Return what was measured, for people."""
        return f"the reference model has {type(self.objective).__name__} {self.measured:.4g} on '{self.stream}'"

    def set(self, measured: float) -> None:
        """Fix the level.

        Args:
            measured: Mean of the objective on the reference model over the whole stream, finite and > 0.

        Raises:
            ConfigError: If it is not.
        """
        # Divergences and distances from the reference model are 0 here: no multiple of them is a level.
        if not (math.isfinite(measured) and measured > 0):
            raise ConfigError(
                f"{type(self.objective).__name__} on '{self.stream}' is {measured!r} before the first step, and no multiple "
                "of that can serve as a level: set an absolute value, or check the model and the examples of this stream."
            )
        self.measured = measured
