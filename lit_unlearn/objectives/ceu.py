"""Cross-entropy unlearning."""

from __future__ import annotations

import torch

from lit_unlearn.functional import ceu
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, Objective, TokenModel, whole


class CEU(Objective):
    """Cross-entropy unlearning: distillation from the model itself, with the label ruled out.

    Yang, "CE-U: Cross Entropy Unlearning", 2025 (arXiv 2503.01224).

    Args:
        skip: Tokens at the start of every answer that are left out, ≥ 0: the first ones carry grammar, not facts.

    Raises:
        ValueError: If ``skip`` is negative.
    """

    formula = "token mean of CE(sg softmax(z with z_label = −∞), z), without the first `skip` tokens"
    paper = "Yang 2025, arXiv 2503.01224"

    def __init__(self, skip: int = 1) -> None:
        super().__init__()
        self.skip = whole(self, "skip", skip)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the cross-entropy over the tokens that are not skipped, nats."""
        kept = self._kept(tokens)
        chosen = tokens._replace(**{name: getattr(tokens, name)[kept] for name in ("hidden", "labels", "sequence")})
        return Average(lm.map_logits(ceu, chosen, chosen.labels).sum(), self.count(tokens))

    def count(self, tokens: SupervisedTokens) -> int:
        """How many tokens are not skipped."""
        return int(self._kept(tokens).sum())

    def _kept(self, tokens: SupervisedTokens) -> torch.Tensor:
        """Which tokens have ``skip`` tokens of their answer before them, shape ``(N,)``."""
        place = torch.arange(len(tokens.labels), device=tokens.labels.device)  # an answer's tokens follow each other
        first = place.new_full((tokens.num_sequences,), len(place)).scatter_reduce(0, tokens.sequence, place, "amin")
        return place - first[tokens.sequence] >= self.skip
