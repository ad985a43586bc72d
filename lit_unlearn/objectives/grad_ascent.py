"""Gradient ascent."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel


class GradAscent(Objective):
    """Token mean of log p: plain gradient ascent on the NLL, without a lower bound.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
    """

    unit = "nats per token"
    formula = "token mean of log p"
    paper = "Maini et al. 2024, arXiv 2401.06121"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute log p(label) of each token, shape ``(N,)``, nats."""
        return lm.token_logp(tokens)
