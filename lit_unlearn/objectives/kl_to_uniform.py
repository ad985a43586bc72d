"""Divergence from the uniform distribution."""

from __future__ import annotations

from functools import partial
from typing import get_args

from torch import Tensor

from lit_unlearn.functional import Direction, kl_to_uniform
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel
from lit_unlearn.utils.validation import check_choice


class KLToUniform(Objective):
    """Token mean of the KL divergence between the next-token distribution and the uniform one: maximises entropy.

    Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models", ICLR 2025 (arXiv 2410.08109), "ME".

    Args:
        direction: ``"uniform_to_model"`` is KL(U, p), as the authors' code has it; ``"model_to_uniform"`` is
            log V − H(p), whose gradient vanishes where the model is certain.

    Raises:
        ConfigError: If ``direction`` is neither.
    """

    unit = "nats per token"
    formula = "token mean of KL(U‖p), or of KL(p‖U)"
    paper = "Yuan et al. 2025, arXiv 2410.08109"

    def __init__(self, direction: Direction = "uniform_to_model") -> None:
        super().__init__()
        check_choice(get_args(Direction), self, direction=direction)
        self.direction = direction

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the divergence for each token, shape ``(N,)``, nats."""
        return lm.map_logits(partial(kl_to_uniform, direction=self.direction), tokens)
