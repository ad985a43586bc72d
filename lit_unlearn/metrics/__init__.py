"""torchmetrics objects with exact sums at any precision, and the benchmarks' scores as functions of plain arrays."""

from lit_unlearn.metrics.aggregates import (
    attack_score,
    harmonic_mean,
    memorization_score,
    overall_score,
    privacy_score,
    relative_utility,
    utility_score,
)
from lit_unlearn.metrics.depth import mean_unlearning_depth, unlearning_depth
from lit_unlearn.metrics.exact import ExactMetric
from lit_unlearn.metrics.leakage import (
    average_leak_bound,
    average_mean_bound,
    corrected_confidence,
    exposure,
    leak_at_k,
    leak_upper_bound,
    mean_upper_bound,
    worst_leak_bound,
    worst_mean_bound,
)
from lit_unlearn.metrics.likelihood import AnswerLikelihood
from lit_unlearn.metrics.memorization import exact_memorization, extraction_strength, rouge
from lit_unlearn.metrics.privacy import auc, forget_quality, min_k, min_k_plus_plus, privleak, zlib_score
from lit_unlearn.metrics.robustness import quantization_robustness, relearning_robustness, robustness_score
from lit_unlearn.metrics.slack import ConstraintSlack
from lit_unlearn.metrics.text import fluency_share, is_refusal, refusal_rate, repetition
from lit_unlearn.metrics.tofu import model_utility, normalized_probability, truth_ratio, truth_ratio_score
from lit_unlearn.metrics.uniformity import ForgetUniformity

__all__ = [
    "AnswerLikelihood",
    "ConstraintSlack",
    "ExactMetric",
    "ForgetUniformity",
    "attack_score",
    "auc",
    "average_leak_bound",
    "average_mean_bound",
    "corrected_confidence",
    "exact_memorization",
    "exposure",
    "extraction_strength",
    "fluency_share",
    "forget_quality",
    "harmonic_mean",
    "is_refusal",
    "leak_at_k",
    "leak_upper_bound",
    "mean_unlearning_depth",
    "mean_upper_bound",
    "memorization_score",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "normalized_probability",
    "overall_score",
    "privacy_score",
    "privleak",
    "quantization_robustness",
    "refusal_rate",
    "relative_utility",
    "relearning_robustness",
    "repetition",
    "robustness_score",
    "rouge",
    "truth_ratio",
    "truth_ratio_score",
    "unlearning_depth",
    "utility_score",
    "worst_leak_bound",
    "worst_mean_bound",
    "zlib_score",
]
