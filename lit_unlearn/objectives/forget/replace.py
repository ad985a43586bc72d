"""Objectives that put another answer in the place of the forget answer."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import dpo, jensen_shannon_to_label
from lit_unlearn.lm import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, Objective, SequenceObjective, TokenModel, checked
from lit_unlearn.objectives.forget.ascent import answer_logp
from lit_unlearn.objectives.retain import NLL


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


class IdkNLL(NLL):
    """NLL of the alternate answers: teaches refusals, or whatever else, in the place of the forget answers.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121), "IDK".
    """

    needs = frozenset[Need]({"alternate"})
    reads = "alternate"
    formula = "token mean of −log p on the alternate answers"
    paper = "Maini et al. 2024, arXiv 2401.06121"


class JensUn(Objective):
    """Jensen-Shannon divergence from the alternate answer's tokens: a bounded pull towards a refusal.

    Singh et al., "Unlearning That Lasts: Utility-Preserving, Robust, and Almost Irreversible Forgetting in LLMs", 2025
    (arXiv 2509.02820), which takes "No idea" for the refusal and bounds `JensenShannonToReference` on retain rows.
    """

    needs = frozenset[Need]({"alternate"})
    reads = "alternate"
    formula = "token mean of JSD(1[alternate token]‖p)"
    paper = "Singh et al. 2025, arXiv 2509.02820"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the divergence over the ``N`` tokens of the alternate answers, nats."""
        return Average(jensen_shannon_to_label(lm.token_logp(tokens)).sum(), self.count(tokens))


def _gain(lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
    logp, reference = answer_logp(lm, tokens)
    return logp - reference
