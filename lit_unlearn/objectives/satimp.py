"""Gradient ascent weighted by saturation and importance."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import satimp_weight
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel
from lit_unlearn.utils.validation import check_number


class SatImp(Objective):
    """Token mean of sg(p^β₁ (1 − p)^β₂) log p: gradient ascent weighted by saturation and importance.

    Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025 (arXiv 2505.11953).

    Args:
        beta1: Exponent ≥ 0 of p.
        beta2: Exponent ≥ 0 of 1 − p.

    Raises:
        ConfigError: If an exponent is negative or not finite.
    """

    unit = "weighted nats per token"
    formula = "token mean of sg(p^β₁ (1 − p)^β₂) log p"
    paper = "Yang et al. 2025, arXiv 2505.11953"

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0) -> None:
        super().__init__()
        self.beta1 = check_number(self, "beta1", beta1, at_least=0)
        self.beta2 = check_number(self, "beta2", beta2, at_least=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the weighted log p(label) of each token, shape ``(N,)``, nats."""
        logp = lm.token_logp(tokens)
        return satimp_weight(logp, self.beta1, self.beta2) * logp
