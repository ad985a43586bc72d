"""torchmetrics objects: exact sums and counts, at any precision and on any number of processes."""

from lit_unlearn.metrics.base import ExactMetric
from lit_unlearn.metrics.scores import AnswerLikelihood
from lit_unlearn.metrics.training import ConstraintSlack, ForgetUniformity

__all__ = ["AnswerLikelihood", "ConstraintSlack", "ExactMetric", "ForgetUniformity"]
