"""Suites: which metrics are computed on which stream, and how the result is reported."""

from lit_unlearn.evaluation.suite import AnswerSuite, Suite

__all__ = ["AnswerSuite", "Suite"]
