"""Matching the likelihood of examples that the model never saw."""

from __future__ import annotations

import math

import torch

from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, SequenceObjective, TokenModel, checked


class MatchUnseen(SequenceObjective):
    """Answer mean of (NLL per token − level)²: forgetting that ends, because what is beyond the level is taught again.

    The level stands for what a model that was never taught these rows would have. Nobody has that model, but the NLL that
    the model has, before unlearning, on other rows of the kind, which it was not taught, comes near it. Below the level
    the gradient is that of ascent, and fades with the distance.
    Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?", ICML 2020 (arXiv 2002.08709), hold
    a training loss at a level in a like way.

    Args:
        stream: Of the rows that the model never saw, among the data module's ``streams``; only measured, never trained on.
        factor: The level is this times the NLL of those rows, nats per token; > 0. At 1 the truth ratio stays below
            that of a model that was never taught the rows (``docs/results.md``). Until it is measured, at the start of a
            fit, the level is infinite, and so is the loss.

    Raises:
        ValueError: If ``factor`` is not above 0 or not finite.
    """

    formula = "answer mean of (NLL per token − factor · NLL of unseen rows)²"
    paper = "this package, docs/results.md"

    def __init__(self, stream: str = "unseen", factor: float = 1.5) -> None:
        super().__init__()
        self.stream = self.unseen = stream
        self.factor = checked(self, "factor", factor, above=0)
        self.level = math.inf

    def calibrate(self, nll: float) -> None:
        """Sets the level."""
        self.level = self.factor * nll

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum over the ``S`` answers, nats²."""
        lengths = torch.bincount(tokens.sequence, minlength=tokens.num_sequences)
        nll = -tokens.by_sequence(lm.token_logp(tokens)) / lengths
        return Average((nll - self.level).square().sum(), self.count(tokens))
