"""Negative preference optimisation."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import npo
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel, compute_answer_logp
from lit_unlearn.utils.validation import check_number


class NPO(Objective):
    """Negative preference optimisation: ascent that fades as an answer becomes less likely than before unlearning.

    Zhang et al., "Negative Preference Optimization", COLM 2024 (arXiv 2404.05868).

    Args:
        beta: Inverse temperature > 0; towards 0 its gradient becomes that of `GradAscent`.

    Raises:
        ConfigError: If ``beta`` is not above 0 or not finite.
    """

    needs = frozenset[Need]({"reference_logp"})
    per = "answer"
    unit = "nats per answer"
    formula = "answer mean of −(2/β) log σ(−β (s − s_ref)), s = Σ log p"
    paper = "Zhang et al. 2024, arXiv 2404.05868"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = check_number(self, "beta", beta, above=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the loss of each answer, shape ``(S,)``."""
        logp, reference_logp = compute_answer_logp(lm, tokens)
        return npo(logp, reference_logp, self.beta)
