"""Direct preference optimisation."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import dpo
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, SequenceObjective, TokenModel, checked
from lit_unlearn.objectives.npo import answer_logp


class DPO(SequenceObjective):
    """Direct preference optimisation: the alternate answer is preferred to the one to forget.

    With refusals for alternate answers this is "IdkDPO". Rafailov et al., "Direct Preference Optimization", NeurIPS 2023
    (arXiv 2305.18290); as an unlearning baseline Zhang et al., COLM 2024 (arXiv 2404.05868).

    Args:
        beta: Inverse temperature > 0.

    Raises:
        ValueError: If ``beta`` is not above 0 or not finite.
    """

    needs = frozenset[Need]({"reference_logp", "alternate"})
    reads = "pair"
    formula = "answer mean of −(2/β) log σ(β (Δ_alternate − Δ_forget)), Δ = s − s_ref"
    paper = "Rafailov et al. 2023, arXiv 2305.18290; Zhang et al. 2024, arXiv 2404.05868"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = checked(self, "beta", beta, above=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum over the ``S`` pairs of answers."""
        if tokens.alternate is None:
            raise ValueError(
                'DPO: the alternate answers are missing; own loops must give batches an "alternate" batch.'
            )
        alternate, forget = (_gain(lm, answers) for answers in (tokens.alternate, tokens))
        return Average(dpo(alternate, forget, self.beta).sum(), self.count(tokens))


def _gain(lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
    logp, reference = answer_logp(lm, tokens)
    return logp - reference
