"""Negative preference optimisation."""

from __future__ import annotations

import torch

from lit_unlearn.functional import npo
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, SequenceObjective, TokenModel, checked


class NPO(SequenceObjective):
    """Negative preference optimisation: ascent that fades as an answer becomes unlikelier than before unlearning.

    Zhang et al., "Negative Preference Optimization", COLM 2024 (arXiv 2404.05868).

    Args:
        beta: Inverse temperature > 0; towards 0 its gradient becomes that of `GradAscent`.

    Raises:
        ValueError: If ``beta`` is not above 0 or not finite.
    """

    needs = frozenset[Need]({"reference_logp"})
    formula = "answer mean of −(2/β) log σ(−β (s − s_ref)), s = Σ log p"
    paper = "Zhang et al. 2024, arXiv 2404.05868"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = checked(self, "beta", beta, above=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum over the ``S`` answers."""
        logp, reference = answer_logp(lm, tokens)
        return Average(npo(logp, reference, self.beta).sum(), self.count(tokens))


def answer_logp(lm: TokenModel, tokens: SupervisedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer under the model and under the reference model, both ``(S,)``, nats.

    Raises:
        ValueError: If the reference model's were not measured.
    """
    if tokens.reference_logp is None:
        raise ValueError(
            "the answers' log-probabilities under the reference model are missing: an objective that uses them must need "
            '"reference_logp", and own loops must give batches a `reference_logp` of shape (B,).'
        )
    logp = tokens.by_sequence(lm.token_logp(tokens))
    return logp, tokens.reference_logp.to(logp.dtype)
