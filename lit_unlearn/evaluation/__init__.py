"""Suites: which metrics are computed on which stream, and how the result is reported.

The names below are imported on first use, so that reading and drawing results stays quick: suites need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "BenchmarkSuite": "benchmark",
    "Example": "benchmark",
    "Stream": "benchmark",
    "MUSESuite": "muse",
    "QASuite": "questions",
    "QuestionSuite": "questions",
    "StressSuite": "stress",
    "AnswerSuite": "suite",
    "Suite": "suite",
    "TOFUSuite": "tofu",
    "Relearn": "weights",
}

__all__ = [
    "AnswerSuite",
    "BenchmarkSuite",
    "Example",
    "MUSESuite",
    "QASuite",
    "QuestionSuite",
    "Relearn",
    "Stream",
    "StressSuite",
    "Suite",
    "TOFUSuite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_unlearn.evaluation' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lit_unlearn.evaluation.{_HOME[name]}"), name)


if TYPE_CHECKING:
    from lit_unlearn.evaluation.benchmark import BenchmarkSuite, Example, Stream
    from lit_unlearn.evaluation.muse import MUSESuite
    from lit_unlearn.evaluation.questions import QASuite, QuestionSuite
    from lit_unlearn.evaluation.stress import StressSuite
    from lit_unlearn.evaluation.suite import AnswerSuite, Suite
    from lit_unlearn.evaluation.tofu import TOFUSuite
    from lit_unlearn.evaluation.weights import Relearn
