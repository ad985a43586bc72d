"""Objectives that flatten the next-token distribution on forget answers."""

from __future__ import annotations

from functools import partial
from typing import get_args

from lit_unlearn.functional import Direction, kl_to_uniform
from lit_unlearn.lm import Alignment, SupervisedTokens
from lit_unlearn.objectives.base import Average, Objective, TokenModel, checked


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
        ValueError: If ``power`` or ``alignment`` is out of range.
    """

    formula = "token mean of (max z − mean z)^power"
    paper = "Entesari et al. 2025, arXiv 2506.05314"

    def __init__(self, power: float = 2.0, alignment: Alignment = "next_token") -> None:
        super().__init__()
        self.power = checked(self, "power", power, above=0)
        if alignment not in get_args(Alignment):
            raise ValueError(f"LogitMargin: `alignment` must be 'next_token' or 'label', not {alignment!r}.")
        self.alignment = alignment

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of margin^power over the ``N`` tokens."""
        return Average(lm.logit_margin(tokens).pow(self.power).sum(), self.count(tokens))


class KLToUniform(Objective):
    """Token mean of the KL divergence between the next-token distribution and the uniform one: maximises entropy.

    Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models", ICLR 2025 (arXiv 2410.08109), "ME".

    Args:
        direction: ``"uniform_to_model"`` is KL(U, p), as the authors' code has it; ``"model_to_uniform"`` is
            log V − H(p), whose gradient vanishes where the model is certain.

    Raises:
        ValueError: If ``direction`` is another word.
    """

    formula = "token mean of KL(U‖p), or of KL(p‖U)"
    paper = "Yuan et al. 2025, arXiv 2410.08109"

    def __init__(self, direction: Direction = "uniform_to_model") -> None:
        super().__init__()
        if direction not in get_args(Direction):
            raise ValueError(f"KLToUniform: `direction` must be one of {get_args(Direction)}, not {direction!r}.")
        self.direction = direction

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the divergence over the ``N`` tokens, nats."""
        divergence = lm.map_logits(partial(kl_to_uniform, direction=self.direction), tokens)
        return Average(divergence.sum(), self.count(tokens))
