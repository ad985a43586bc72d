"""Jensen-Shannon unlearning."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import jensen_shannon_to_label
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel


class JensUn(Objective):
    """Jensen-Shannon divergence from the alternate answer's tokens: a bounded pull towards a refusal.

    Singh et al., "Unlearning That Lasts: Utility-Preserving, Robust, and Almost Irreversible Forgetting in LLMs", 2025
    (arXiv 2509.02820), which takes "No idea" for the refusal and bounds `JensenShannonToReference` on the retain set.
    """

    reads = "alternate"
    unit = "nats per token"
    formula = "token mean of JSD(1[alternate token]‖p)"
    paper = "Singh et al. 2025, arXiv 2509.02820"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the divergence for each token of the alternate answers, shape ``(N,)``, nats."""
        # The divergence from a one-hot distribution needs the label's probability alone, which is cheap to get.
        return jensen_shannon_to_label(lm.token_logp(tokens))
