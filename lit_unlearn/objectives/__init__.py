"""Objectives: what is minimised on the forget set, a file per published method, and what is bounded on the retain set."""

from lit_unlearn.objectives.base import Average, Need, Objective, Reads, SequenceObjective
from lit_unlearn.objectives.ceu import CEU
from lit_unlearn.objectives.dpo import DPO
from lit_unlearn.objectives.grad_ascent import GradAscent
from lit_unlearn.objectives.idk_nll import IdkNLL
from lit_unlearn.objectives.jensun import JensUn
from lit_unlearn.objectives.kl_to_uniform import KLToUniform
from lit_unlearn.objectives.logit_margin import LogitMargin
from lit_unlearn.objectives.match_unseen import MatchUnseen
from lit_unlearn.objectives.npo import NPO
from lit_unlearn.objectives.retain import NLL, ActivationMatch, JensenShannonToReference, KLToReference
from lit_unlearn.objectives.rmu import RMU
from lit_unlearn.objectives.satimp import SatImp
from lit_unlearn.objectives.simnpo import SimNPO
from lit_unlearn.objectives.undial import UNDIAL
from lit_unlearn.objectives.wga import WGA

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
