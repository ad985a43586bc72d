"""Constraints and their multipliers: plain numbers, no tensors of the model."""

from lit_unlearn.dual.constraint import Constraint, Relative
from lit_unlearn.dual.multiplier import DualAscent, FixedMultiplier, Multiplier, PIMultiplier

__all__ = ["Constraint", "DualAscent", "FixedMultiplier", "Multiplier", "PIMultiplier", "Relative"]
