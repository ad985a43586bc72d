"""What an objective is: a loss over supervised tokens, with its hyperparameters and its needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from lit_unlearn.lm import Alignment, SupervisedTokens

Need = Literal["reference", "alternate", "activations"]


class TokenModel(Protocol):
    """The part of `LanguageModel` that an objective may use: token-wise functions of the next-token logits.

    None of them ever holds the logits of all tokens at once.
    """

    def logit_margin(self, tokens: SupervisedTokens) -> Tensor:
        """Logit margins, shape ``(N,)``."""

    def token_logp(self, tokens: SupervisedTokens) -> Tensor:
        """Log-probabilities of the labels, shape ``(N,)``, nats."""

    def map_logits(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        """``function(logits, *token_args)``, applied in chunks; shape ``(N,)`` or ``(N, k)``."""


class Average(NamedTuple):
    """A sum and the number of things summed, which add up exactly over micro-batches and processes.

    Args:
        total: Sum of the values, a scalar that carries the gradient.
        count: Number of values.
    """

    total: Tensor
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody wants here

    def mean(self) -> Tensor:
        """The average value, a scalar."""
        return self.total / self.count


class Objective(nn.Module, ABC):
    """A loss over the supervised tokens of a batch, averaged over tokens (or sequences: see `count`).

    A subclass holds its hyperparameters, declares in `needs` what must be at hand beside the model, and never sees
    Lightning. The module computes `count` from the labels alone before any forward pass, so that micro-batches and
    processes of unequal length weigh every token alike.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    alignment: Alignment = "next_token"

    @abstractmethod
    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """The objective over ``tokens``.

        Args:
            lm: Gives token-wise functions of the logits.
            tokens: The ``N`` supervised tokens of the batch.

        Returns:
            The sum, with gradient, over `count` values.
        """

    def count(self, tokens: SupervisedTokens) -> int:
        """How many values the average runs over: here every supervised token.

        Args:
            tokens: The supervised tokens; ``hidden`` is not read.
        """
        return tokens.labels.numel()
