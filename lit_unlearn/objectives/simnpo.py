"""Negative preference optimisation without a reference model."""

from __future__ import annotations

import torch

from lit_unlearn.functional import simnpo
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, SequenceObjective, TokenModel, checked


class SimNPO(SequenceObjective):
    """NPO without a reference model, normalised by the length of the answer.

    Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024 (arXiv
    2410.07163).

    Args:
        beta: Inverse temperature > 0.
        delta: Margin of the reward, nats per token.

    Raises:
        ValueError: If ``beta`` is not above 0, or a number is not finite.
    """

    formula = "answer mean of −(2/β) log σ(−β s/length − β δ)"
    paper = "Fan et al. 2024, arXiv 2410.07163"

    def __init__(self, beta: float = 4.5, delta: float = 0.0) -> None:
        super().__init__()
        self.beta = checked(self, "beta", beta, above=0)
        self.delta = checked(self, "delta", delta)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum over the ``S`` answers."""
        logp = tokens.by_sequence(lm.token_logp(tokens))
        lengths = torch.bincount(tokens.sequence, minlength=tokens.num_sequences)
        return Average(simnpo(logp, lengths, self.beta, self.delta).sum(), self.count(tokens))
