"""Objectives that lower the likelihood of forget answers: gradient ascent and its tempered forms."""

from __future__ import annotations

import torch

from lit_unlearn.functional import npo, satimp_weight, simnpo, wga_weight
from lit_unlearn.lm import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, Objective, SequenceObjective, TokenModel, checked


class GradAscent(Objective):
    """Token mean of log p: plain gradient ascent on the NLL, without a lower bound.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).
    """

    formula = "token mean of log p"
    paper = "Maini et al. 2024, arXiv 2401.06121"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of log p(label) over the ``N`` tokens."""
        return Average(lm.token_logp(tokens).sum(), self.count(tokens))


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


class SatImp(Objective):
    """Token mean of sg(p^β₁ (1 − p)^β₂) log p: gradient ascent weighted by saturation and importance.

    Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025 (arXiv 2505.11953).

    Args:
        beta1: Exponent ≥ 0 of p.
        beta2: Exponent ≥ 0 of 1 − p.

    Raises:
        ValueError: If an exponent is negative or not finite.
    """

    formula = "token mean of sg(p^β₁ (1 − p)^β₂) log p"
    paper = "Yang et al. 2025, arXiv 2505.11953"

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0) -> None:
        super().__init__()
        self.beta1 = checked(self, "beta1", beta1, least=0)
        self.beta2 = checked(self, "beta2", beta2, least=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the weighted log p(label) over the ``N`` tokens."""
        logp = lm.token_logp(tokens)
        return Average((satimp_weight(logp, self.beta1, self.beta2) * logp).sum(), self.count(tokens))


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
