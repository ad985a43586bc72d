"""Forgetting objectives, by what they do to the answers."""

from lit_unlearn.objectives.forget.activation import RMU
from lit_unlearn.objectives.forget.ascent import NPO, WGA, GradAscent, SatImp, SimNPO
from lit_unlearn.objectives.forget.flatten import KLToUniform, LogitMargin
from lit_unlearn.objectives.forget.match import MatchUnseen
from lit_unlearn.objectives.forget.replace import DPO, IdkNLL, JensUn
from lit_unlearn.objectives.forget.teach import CEU, UNDIAL

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "GradAscent",
    "IdkNLL",
    "JensUn",
    "KLToUniform",
    "LogitMargin",
    "MatchUnseen",
    "SatImp",
    "SimNPO",
]
