"""Weighted gradient ascent."""

from __future__ import annotations

from lit_unlearn.functional import wga_weight
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, Objective, TokenModel, checked


class WGA(Objective):
    """Token mean of sg(p^β) log p: gradient ascent that lets go of what is forgotten already.

    Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025 (arXiv
    2502.19301).

    Args:
        beta: Exponent ≥ 0 of the weight; 0 is `GradAscent`.

    Raises:
        ValueError: If ``beta`` is negative or not finite.
    """

    formula = "token mean of sg(p^β) log p"
    paper = "Wang et al. 2025, arXiv 2502.19301"

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = checked(self, "beta", beta, least=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the weighted log p(label) over the ``N`` tokens."""
        logp = lm.token_logp(tokens)
        return Average((wga_weight(logp, self.beta) * logp).sum(), self.count(tokens))
