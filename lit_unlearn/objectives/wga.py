"""Weighted gradient ascent."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import wga_weight
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel
from lit_unlearn.utils.validation import check_number


class WGA(Objective):
    """Token mean of sg(p^β) log p: gradient ascent that leaves tokens alone once they are forgotten.

    Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025 (arXiv
    2502.19301).

    Args:
        beta: Exponent ≥ 0 of the weight; 0 is `GradAscent`.

    Raises:
        ConfigError: If ``beta`` is negative or not finite.
    """

    unit = "weighted nats per token"
    formula = "token mean of sg(p^β) log p"
    paper = "Wang et al. 2025, arXiv 2502.19301"

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = check_number(self, "beta", beta, at_least=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the weighted log p(label) of each token, shape ``(N,)``, nats."""
        logp = lm.token_logp(tokens)
        return wga_weight(logp, self.beta) * logp
