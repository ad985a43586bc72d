"""Objectives: what is minimised on the forget set and what is bounded on the retain set."""

from lit_unlearn.objectives.base import Average, Need, Objective, Reads, SequenceObjective
from lit_unlearn.objectives.forget import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    IdkNLL,
    JensUn,
    KLToUniform,
    LogitMargin,
    MatchUnseen,
    SatImp,
    SimNPO,
)
from lit_unlearn.objectives.retain import NLL, ActivationMatch, JensenShannonToReference, KLToReference

__all__ = [
    "CEU",
    "DPO",
    "NLL",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "ActivationMatch",
    "Average",
    "GradAscent",
    "IdkNLL",
    "JensUn",
    "JensenShannonToReference",
    "KLToReference",
    "KLToUniform",
    "LogitMargin",
    "MatchUnseen",
    "Need",
    "Objective",
    "Reads",
    "SatImp",
    "SequenceObjective",
    "SimNPO",
]
