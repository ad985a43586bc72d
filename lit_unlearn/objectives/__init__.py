"""Objectives: one file per published forgetting method, and the retention losses that constraints bound."""

from lit_unlearn.objectives.base import Need, Objective, Per, Reads
from lit_unlearn.objectives.ceu import CEU
from lit_unlearn.objectives.dpo import DPO
from lit_unlearn.objectives.grad_ascent import GradAscent
from lit_unlearn.objectives.idk_nll import IdkNLL
from lit_unlearn.objectives.jensun import JensUn
from lit_unlearn.objectives.kl_to_teacher import KLToTeacher
from lit_unlearn.objectives.kl_to_uniform import KLToUniform
from lit_unlearn.objectives.logit_margin import LogitMargin
from lit_unlearn.objectives.match_calibrated import MatchCalibrated
from lit_unlearn.objectives.match_unseen import MatchUnseen
from lit_unlearn.objectives.nll_floor import NLLFloor
from lit_unlearn.objectives.npo import NPO
from lit_unlearn.objectives.reference_level import ReferenceLevel
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
    "GradAscent",
    "IdkNLL",
    "JensUn",
    "JensenShannonToReference",
    "KLToReference",
    "KLToTeacher",
    "KLToUniform",
    "LogitMargin",
    "MatchCalibrated",
    "MatchUnseen",
    "NLLFloor",
    "Need",
    "Objective",
    "Per",
    "Reads",
    "ReferenceLevel",
    "SatImp",
    "SimNPO",
]
