"""What an objective is: a loss over supervised tokens, with its hyperparameters and its needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from lit_unlearn.models import Alignment, SupervisedTokens

Need = Literal["reference", "reference_logp", "alternate", "activations"]
"""What must be at hand beside the model.

``reference``: the reference model runs on every batch. ``reference_logp``: its log-probability of every row, measured
once. ``alternate``: another answer to every question. ``activations``: what the layers named by ``layers`` put out.
"""

Reads = Literal["answer", "alternate", "pair"]
"""Which answers an objective is given: the rows' own, the alternate ones in their place, or both."""


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

    def map_logit_pairs(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        """``function(logits, reference_logits, *token_args)``, likewise, for an objective that needs ``"reference"``."""


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

    A subclass holds its hyperparameters, declares in `needs` what must be at hand beside the model and in `reads` which
    answers it is given, and never sees Lightning. What it declares it finds in the fields of `SupervisedTokens`. The
    module computes `count` from the labels alone before any forward pass, so that micro-batches and processes of unequal
    length weigh every token alike.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    reads: ClassVar[Reads] = "answer"
    formula: ClassVar[str] = ""  # the value in a line, for `lit-unlearn methods`
    paper: ClassVar[str] = ""
    alignment: Alignment = "next_token"

    unseen: str | None = None
    """Stream whose NLL before unlearning, nats per token, it is told by `calibrate` at the start of fit."""

    def calibrate(self, nll: float) -> None:
        """Takes the NLL that the model has on its `unseen` stream before unlearning; a resumed run brings it again."""

    @property
    def layers(self) -> frozenset[int]:
        """The layers, from 0, whose output it reads; none unless it needs ``"activations"``."""
        return frozenset()

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


class SequenceObjective(Objective):
    """An objective that is averaged over whole answers, whatever their length."""

    def count(self, tokens: SupervisedTokens) -> int:
        """How many answers there are."""
        return tokens.num_sequences


def checked(owner: Objective, name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """``value`` if it is finite, ≥ ``least`` and > ``above``.

    Args:
        owner: Whose hyperparameter it is, for the message.
        name: Its name.
        value: As configured.
        least: Smallest value allowed.
        above: Largest value not allowed.

    Raises:
        ValueError: If it is not.
    """
    if math.isfinite(value) and value >= least and value > above:
        return value
    wanted = f"above {above:g}" if math.isfinite(above) else f"{least:g} or more" if math.isfinite(least) else "finite"
    raise ValueError(f"{type(owner).__name__}: `{name}` must be a finite number {wanted}, not {value!r}.")


def whole(owner: Objective, name: str, value: int) -> int:
    """``value`` if it is a whole number, 0 or more; as for `checked`.

    Raises:
        ValueError: If it is not.
    """
    if checked(owner, name, value, least=0) != int(value):
        raise ValueError(f"{type(owner).__name__}: `{name}` must be a whole number, not {value!r}.")
    return int(value)
