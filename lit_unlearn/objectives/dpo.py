"""Direct preference optimisation."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.errors import BatchError
from lit_unlearn.functional import dpo
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel, compute_answer_logp
from lit_unlearn.utils.validation import check_number


class DPO(Objective):
    """Direct preference optimisation: the alternate answer is preferred to the one to forget.

    With refusals for alternate answers this is "IdkDPO". Rafailov et al., "Direct Preference Optimization", NeurIPS 2023
    (arXiv 2305.18290); as an unlearning baseline Zhang et al., COLM 2024 (arXiv 2404.05868).

    Args:
        beta: Inverse temperature > 0.

    Raises:
        ConfigError: If ``beta`` is not above 0 or not finite.
    """

    needs = frozenset[Need]({"reference_logp"})
    reads = "pair"
    per = "answer"
    unit = "nats per answer"
    formula = "answer mean of −(2/β) log σ(β (Δ_alternate − Δ_forget)), Δ = s − s_ref"
    paper = "Rafailov et al. 2023, arXiv 2305.18290; Zhang et al. 2024, arXiv 2404.05868"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = check_number(self, "beta", beta, above=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the loss of each pair of answers, shape ``(S,)``.

        Raises:
            BatchError: If the alternate answers or the reference model's log-probabilities are missing.
        """
        if tokens.alternate is None:
            raise BatchError(
                'DPO: the alternate answers are missing; your own loop must give batches an "alternate" batch.'
            )
        alternate_logp, alternate_reference = compute_answer_logp(lm, tokens.alternate)
        forget_logp, forget_reference = compute_answer_logp(lm, tokens)
        return dpo(alternate_logp - alternate_reference, forget_logp - forget_reference, self.beta)
