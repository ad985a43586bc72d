"""Likelihood of answers."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_unlearn.metrics.exact import ExactMetric


class AnswerLikelihood(ExactMetric):
    """NLL per token over all tokens, and the mean over answers of exp(−mean NLL): TOFU's answer probability.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).

    Example:
        >>> metric = AnswerLikelihood()
        >>> metric.update(torch.tensor([0.5, 0.5, 0.25]).log(), torch.tensor([0, 0, 1]), num_sequences=2)
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'nll': 0.924, 'probability': 0.375}
    """

    nll: Tensor
    tokens: Tensor
    probability: Tensor
    answers: Tensor

    def __init__(self) -> None:
        super().__init__(nll=(), tokens=(), probability=(), answers=())

    def update(self, logp: Tensor, sequence: Tensor, num_sequences: int) -> None:
        """Add one batch.

        Args:
            logp: Log-probability of each answer token, shape ``(N,)``, nats.
            sequence: Index of the answer each token belongs to, shape ``(N,)``.
            num_sequences: Number of answers.
        """
        # Before the sum: float32 has 7 digits, which a long evaluation uses up.
        logp = logp.double()
        sums = logp.new_zeros(num_sequences).index_add_(0, sequence, logp)
        lengths = torch.bincount(sequence, minlength=num_sequences)
        self.nll = self.nll - logp.sum()
        self.tokens = self.tokens + logp.numel()
        self.probability = self.probability + (sums / lengths).exp().sum()
        self.answers = self.answers + num_sequences

    def compute(self) -> dict[str, Tensor]:
        """Return ``nll`` in nats per token and ``probability`` per answer, float64 scalars."""
        return {"nll": self.nll / self.tokens, "probability": self.probability / self.answers}
