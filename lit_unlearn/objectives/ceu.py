"""Cross-entropy unlearning."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_unlearn.functional import ceu
from lit_unlearn.models import SupervisedTokens, TokenIndex
from lit_unlearn.objectives.base import Objective, TokenModel
from lit_unlearn.utils.validation import check_integer


class CEU(Objective):
    """Cross-entropy unlearning: distillation from the model itself, with the label ruled out.

    Yang, "CE-U: Cross Entropy Unlearning", 2025 (arXiv 2503.01224).

    Args:
        skip: Number of tokens at the start of every answer that are left out, ≥ 0: the first ones carry grammar, not facts.

    Raises:
        ConfigError: If ``skip`` is negative.
    """

    unit = "nats per token"
    formula = "token mean of CE(sg softmax(z with z_label = −∞), z), without the first `skip` tokens"
    paper = "Yang 2025, arXiv 2503.01224"

    def __init__(self, skip: int = 1) -> None:
        super().__init__()
        self.skip = check_integer(self, "skip", skip)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the cross-entropy of each token, shape ``(N,)``, nats."""
        return lm.map_logits(ceu, tokens, tokens.labels)

    def select(self, index: TokenIndex) -> TokenIndex:
        """Drop the first ``skip`` tokens of every answer; a short answer has none left."""
        # An answer's tokens follow each other, but they need not be neighbours in the batch: labels may have gaps.
        number = torch.arange(len(index.labels), device=index.labels.device)
        start = number.new_full((index.num_sequences,), len(number))
        start = start.scatter_reduce(0, index.sequence, number, "amin")
        return index.keep(number - start[index.sequence] >= self.skip)
