"""Objectives that flatten the next-token distribution on forget answers."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, final, get_args

import torch
from torch import Tensor

from lit_unlearn.functional import Direction, kl_to_uniform
from lit_unlearn.lm import Alignment, SupervisedTokens
from lit_unlearn.objectives.base import Average, Objective, TokenModel, checked


@final
class Unseen:
    """Where forgetting is enough: at the surprise of text that the model never saw.

    Flattening without an end makes a model stranger to the forget rows than one that was never taught them, which gives
    the deletion away. A retain-only model would say how strange is right, but nobody has one; the model before
    unlearning on rows like the forget rows that it was not taught comes near it.

    Args:
        stream: Of those rows, among the data module's ``streams``; only measured, never trained on.
        by: What is left out of the loss once its NLL has reached the level: a whole ``"row"``, or each ``"token"``.
        factor: The level is this times the model's NLL on those rows before unlearning, nats per token; > 0.

    Raises:
        ValueError: If ``by`` or ``factor`` is out of range.
    """

    def __init__(self, stream: str = "unseen", by: Literal["row", "token"] = "row", factor: float = 1.0) -> None:
        if by not in ("row", "token") or not factor > 0:
            raise ValueError(f"Unseen: `by` must be 'row' or 'token' and `factor` above 0, not {by!r} and {factor!r}.")
        self.stream, self.by, self.factor = stream, by, factor
        self.level = math.inf  # nats per token; everything is known until it is measured

    def known(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Which tokens are still to be forgotten, shape ``(N,)``."""
        with torch.no_grad():
            nll = -lm.token_logp(tokens)
            if self.by == "token":
                return nll < self.level
            mean = tokens.by_sequence(nll) / tokens.by_sequence(torch.ones_like(nll))
            return (mean < self.level)[tokens.sequence]


class LogitMargin(Objective):
    """Token mean of margin^power: flattens the next-token distribution on forget answers.

    The margin (largest minus mean logit) is zero exactly at the uniform distribution and bounds log V − entropy from
    above. Its gradient does not vanish on the way there. Entesari et al., "Constrained Entropic Unlearning", NeurIPS
    2025 (arXiv 2506.05314).

    Args:
        power: Exponent > 0; the paper uses 2.
        alignment: ``"next_token"`` reads the logits that predict the answer tokens. ``"label"`` reads those at the
            answer tokens' own positions, as the authors' public code does: only for comparison with it.
        until: Where forgetting is enough; ``None`` flattens without end, as published. What is left out counts as zero.

    Raises:
        ValueError: If ``power`` or ``alignment`` is out of range.
    """

    formula = "token mean of (max z − mean z)^power"
    paper = "Entesari et al. 2025, arXiv 2506.05314"

    def __init__(self, power: float = 2.0, alignment: Alignment = "next_token", until: Unseen | None = None) -> None:
        super().__init__()
        self.power = checked(self, "power", power, above=0)
        if alignment not in get_args(Alignment):
            raise ValueError(f"LogitMargin: `alignment` must be 'next_token' or 'label', not {alignment!r}.")
        self.alignment, self.until = alignment, until
        self.unseen = None if until is None else until.stream

    def calibrate(self, nll: float) -> None:
        """Sets the level of ``until``."""
        if self.until is not None:
            self.until.level = self.until.factor * nll

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of margin^power over the ``N`` tokens, or those that are still to be forgotten."""
        loss = lm.logit_margin(tokens).pow(self.power)
        if self.until is not None:
            loss = loss * self.until.known(lm, tokens)
        return Average(loss.sum(), self.count(tokens))


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
