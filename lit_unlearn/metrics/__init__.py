"""torchmetrics objects with exact sums at any precision, and the benchmarks' scores as functions of plain arrays."""

from lit_unlearn.metrics.depth import mean_unlearning_depth, unlearning_depth
from lit_unlearn.metrics.exact import ExactMetric
from lit_unlearn.metrics.likelihood import AnswerLikelihood
from lit_unlearn.metrics.memorization import exact_memorization, extraction_strength, rouge
from lit_unlearn.metrics.privacy import auc, forget_quality, min_k, min_k_plus_plus, privleak, zlib_score
from lit_unlearn.metrics.slack import ConstraintSlack
from lit_unlearn.metrics.tofu import model_utility, normalized_probability, truth_ratio, truth_ratio_score
from lit_unlearn.metrics.uniformity import ForgetUniformity

__all__ = [
    "AnswerLikelihood",
    "ConstraintSlack",
    "ExactMetric",
    "ForgetUniformity",
    "auc",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "mean_unlearning_depth",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "normalized_probability",
    "privleak",
    "rouge",
    "truth_ratio",
    "truth_ratio_score",
    "unlearning_depth",
    "zlib_score",
]
