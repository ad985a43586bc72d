"""Retention objectives."""

from __future__ import annotations

from lit_unlearn.lm import SupervisedTokens
from lit_unlearn.objectives.base import Average, Objective, TokenModel


class NLL(Objective):
    """Negative log-likelihood of the answers: nats per supervised token, the retention loss of the paper."""

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of −log p(label) over the ``N`` tokens."""
        return Average(-lm.token_logp(tokens).sum(), self.count(tokens))
