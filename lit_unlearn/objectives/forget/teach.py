"""Objectives that teach a distribution in which the forget answer's token is unlikely."""

from __future__ import annotations

from functools import partial

import torch

from lit_unlearn.functional import ceu, undial
from lit_unlearn.lm import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, Objective, TokenModel, checked, whole


class UNDIAL(Objective):
    """Distillation from the reference model with the label's logit lowered by β.

    Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", NAACL
    2025 (arXiv 2402.10052).

    Args:
        beta: By how much the label's logit is lowered, ≥ 0.

    Raises:
        ValueError: If ``beta`` is negative or not finite.
    """

    needs = frozenset[Need]({"reference"})
    formula = "token mean of CE(softmax(z_ref − β·1[label]), z)"
    paper = "Dong et al. 2025, arXiv 2402.10052"

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = checked(self, "beta", beta, least=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the cross-entropy over the ``N`` tokens, nats."""
        loss = lm.map_logit_pairs(partial(undial, beta=self.beta), tokens, tokens.labels)
        return Average(loss.sum(), self.count(tokens))


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
        chosen = tokens._replace(
            **{name: getattr(tokens, name)[kept] for name in ("hidden", "labels", "sequence", "position")}
        )
        return Average(lm.map_logits(ceu, chosen, chosen.labels).sum(), self.count(tokens))

    def count(self, tokens: SupervisedTokens) -> int:
        """How many tokens are not skipped."""
        return int(self._kept(tokens).sum())

    def _kept(self, tokens: SupervisedTokens) -> torch.Tensor:
        """Which tokens have ``skip`` tokens of their answer before them, shape ``(N,)``."""
        place = torch.arange(len(tokens.labels), device=tokens.labels.device)  # an answer's tokens follow each other
        first = place.new_full((tokens.num_sequences,), len(place)).scatter_reduce(0, tokens.sequence, place, "amin")
        return place - first[tokens.sequence] >= self.skip
