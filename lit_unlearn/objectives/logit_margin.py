"""The logit margin, the forgetting loss of constrained entropic unlearning."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from lit_unlearn.models import Alignment, SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel
from lit_unlearn.utils.validation import check_choice, check_number


class LogitMargin(Objective):
    """Token mean of margin^power: flattens the next-token distribution on forget answers.

    The margin (largest minus mean logit) is zero exactly at the uniform distribution and bounds log V − entropy from
    above. Its gradient does not vanish on the way there. Entesari et al., "Constrained Entropic Unlearning", NeurIPS
    2025 (arXiv 2506.05314).

    Args:
        power: Exponent > 0; the paper uses 2.
        alignment: ``"next_token"`` reads the logits that predict the answer tokens. ``"label"`` reads those at the
            answer tokens' own positions, as the authors' public code does: only for comparison with it.

    Raises:
        ConfigError: If ``power`` or ``alignment`` is out of range.
    """

    formula = "token mean of (max z − mean z)^power"
    paper = "Entesari et al. 2025, arXiv 2506.05314"

    def __init__(self, power: float = 2.0, alignment: Alignment = "next_token") -> None:
        super().__init__()
        check_choice(get_args(Alignment), self, alignment=alignment)
        self.power = check_number(self, "power", power, above=0)
        self.alignment = alignment
        self.unit = f"logit margin^{power:g} per token"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute margin^power of each token, shape ``(N,)``."""
        return lm.logit_margin(tokens).pow(self.power)
