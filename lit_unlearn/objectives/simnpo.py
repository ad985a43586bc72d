"""Negative preference optimisation without a reference model."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import simnpo
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel, count_answer_tokens
from lit_unlearn.utils.validation import check_number


class SimNPO(Objective):
    """NPO without a reference model, normalised by the length of the answer.

    Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024 (arXiv
    2410.07163).

    Args:
        beta: Inverse temperature > 0.
        delta: Margin of the reward, nats per token.

    Raises:
        ConfigError: If ``beta`` is not above 0, or a number is not finite.
    """

    per = "answer"
    unit = "nats per token"
    formula = "answer mean of −(2/β) log σ(−β s/length − β δ)"
    paper = "Fan et al. 2024, arXiv 2410.07163"

    def __init__(self, beta: float = 4.5, delta: float = 0.0) -> None:
        super().__init__()
        self.beta = check_number(self, "beta", beta, above=0)
        self.delta = check_number(self, "delta", delta)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the loss of each answer, shape ``(S,)``."""
        logp = tokens.by_sequence(lm.token_logp(tokens))
        return simnpo(logp, count_answer_tokens(tokens), self.beta, self.delta)
