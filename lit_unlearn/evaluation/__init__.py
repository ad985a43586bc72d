"""Suites: which metrics are computed on which stream, and how the result is reported."""

from lit_unlearn.evaluation.benchmark import BenchmarkSuite, Example, Stream
from lit_unlearn.evaluation.muse import MUSESuite
from lit_unlearn.evaluation.questions import QASuite, QuestionSuite
from lit_unlearn.evaluation.stress import StressSuite
from lit_unlearn.evaluation.suite import AnswerSuite, Suite
from lit_unlearn.evaluation.tofu import TOFUSuite
from lit_unlearn.evaluation.weights import Relearn

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
