"""Objectives: what is minimised on the forget set and what is bounded on the retain set."""

from lit_unlearn.objectives.base import Average, Need, Objective
from lit_unlearn.objectives.forget import LogitMargin
from lit_unlearn.objectives.retain import NLL

__all__ = ["NLL", "Average", "LogitMargin", "Need", "Objective"]
