"""Self-distillation with adjusted logits."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lit_unlearn.functional import undial
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel
from lit_unlearn.utils.validation import check_number


class UNDIAL(Objective):
    """Distillation from the reference model with the label's logit lowered by β.

    Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", NAACL
    2025 (arXiv 2402.10052).

    Args:
        beta: Amount by which the label's logit is lowered, ≥ 0.

    Raises:
        ConfigError: If ``beta`` is negative or not finite.
    """

    needs = frozenset[Need]({"reference"})
    unit = "nats per token"
    formula = "token mean of CE(softmax(z_ref − β·1[label]), z)"
    paper = "Dong et al. 2025, arXiv 2402.10052"

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = check_number(self, "beta", beta, at_least=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the cross-entropy of each token, shape ``(N,)``, nats."""
        return lm.map_logit_pairs(partial(undial, beta=self.beta), tokens, tokens.labels)
