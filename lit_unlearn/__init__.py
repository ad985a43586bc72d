"""Constrained unlearning for language models on PyTorch Lightning.

The public names below are imported on first use, so that ``import lit_unlearn`` and ``lit-unlearn --version`` stay
quick: torch, lightning and transformers take seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LanguageModel": "lm",
    "SupervisedTokens": "lm",
    "Average": "objectives",
    "Objective": "objectives",
    "SequenceObjective": "objectives",
    "LogitMargin": "objectives",
    "MatchUnseen": "objectives",
    "NLL": "objectives",
    "ActivationMatch": "objectives",
    "CEU": "objectives",
    "DPO": "objectives",
    "GradAscent": "objectives",
    "IdkNLL": "objectives",
    "JensUn": "objectives",
    "JensenShannonToReference": "objectives",
    "KLToReference": "objectives",
    "KLToUniform": "objectives",
    "NPO": "objectives",
    "RMU": "objectives",
    "SatImp": "objectives",
    "SimNPO": "objectives",
    "UNDIAL": "objectives",
    "WGA": "objectives",
    "Constraint": "dual",
    "Relative": "dual",
    "Multiplier": "dual",
    "FixedMultiplier": "dual",
    "DualAscent": "dual",
    "PIMultiplier": "dual",
    "ConstraintSlack": "metrics",
    "ForgetUniformity": "metrics",
    "ForgetRetain": "data",
    "Source": "data",
    "MUSE": "data",
    "TOFU": "data",
    "FictionalAuthors": "data",
    "Suite": "evaluation",
    "AnswerSuite": "evaluation",
    "BenchmarkSuite": "evaluation",
    "TOFUSuite": "evaluation",
    "MUSESuite": "evaluation",
    "QASuite": "evaluation",
    "StressSuite": "evaluation",
    "Relearn": "evaluation",
    "LitUnlearn": "module",
    "LitFinetune": "module",
    "LitEvaluate": "module",
    "Schedule": "module",
    "ExportModel": "callbacks",
    "RunReport": "callbacks",
}

__all__ = [
    "CEU",
    "DPO",
    "MUSE",
    "NLL",
    "NPO",
    "RMU",
    "TOFU",
    "UNDIAL",
    "WGA",
    "ActivationMatch",
    "AnswerSuite",
    "Average",
    "BenchmarkSuite",
    "Constraint",
    "ConstraintSlack",
    "DualAscent",
    "ExportModel",
    "FictionalAuthors",
    "FixedMultiplier",
    "ForgetRetain",
    "ForgetUniformity",
    "GradAscent",
    "IdkNLL",
    "JensUn",
    "JensenShannonToReference",
    "KLToReference",
    "KLToUniform",
    "LanguageModel",
    "LitEvaluate",
    "LitFinetune",
    "LitUnlearn",
    "LogitMargin",
    "MUSESuite",
    "MatchUnseen",
    "Multiplier",
    "Objective",
    "PIMultiplier",
    "QASuite",
    "Relative",
    "Relearn",
    "RunReport",
    "SatImp",
    "Schedule",
    "SequenceObjective",
    "SimNPO",
    "Source",
    "StressSuite",
    "Suite",
    "SupervisedTokens",
    "TOFUSuite",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_unlearn' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lit_unlearn.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from lit_unlearn.callbacks import ExportModel, RunReport
    from lit_unlearn.data import MUSE, TOFU, FictionalAuthors, ForgetRetain, Source
    from lit_unlearn.dual import Constraint, DualAscent, FixedMultiplier, Multiplier, PIMultiplier, Relative
    from lit_unlearn.evaluation import (
        AnswerSuite,
        BenchmarkSuite,
        MUSESuite,
        QASuite,
        Relearn,
        StressSuite,
        Suite,
        TOFUSuite,
    )
    from lit_unlearn.lm import LanguageModel, SupervisedTokens
    from lit_unlearn.metrics import ConstraintSlack, ForgetUniformity
    from lit_unlearn.module import LitEvaluate, LitFinetune, LitUnlearn, Schedule
    from lit_unlearn.objectives import (
        CEU,
        DPO,
        NLL,
        NPO,
        RMU,
        UNDIAL,
        WGA,
        ActivationMatch,
        Average,
        GradAscent,
        IdkNLL,
        JensenShannonToReference,
        JensUn,
        KLToReference,
        KLToUniform,
        LogitMargin,
        MatchUnseen,
        Objective,
        SatImp,
        SequenceObjective,
        SimNPO,
    )
