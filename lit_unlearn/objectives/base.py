"""The interface of objectives: losses of supervised tokens, with their hyperparameters and requirements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol, final

import torch
from torch import Tensor, nn

from lit_unlearn.errors import BatchError
from lit_unlearn.models import Alignment, SupervisedTokens, TokenIndex
from lit_unlearn.models.tokens import OtherModel
from lit_unlearn.objectives.reference_level import ReferenceLevel

Need = Literal["reference", "reference_logp", "teacher"]
"""What an objective uses of other models.

``reference``: the reference model runs on every batch. ``reference_logp``: its log-probability of every answer, measured once.
``teacher``: the teacher runs on every batch.
"""

Reads = Literal["answer", "alternate", "pair"]
"""Answers that an objective is given: those of the examples, the alternate ones in their place, or both."""

Per = Literal["token", "answer"]
"""Unit over which an objective is averaged."""


class TokenModel(Protocol):
    """The part of `LanguageModel` that an objective may use: token-wise functions of the next-token logits.

    None of them ever holds the logits of all tokens at once.
    """

    def logit_margin(self, tokens: SupervisedTokens) -> Tensor:
        """Return logit margins, shape ``(N,)``."""

    def token_logp(self, tokens: SupervisedTokens) -> Tensor:
        """Return log-probabilities of the labels, shape ``(N,)``, nats."""

    def map_logits(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        """Apply ``function(logits, *token_args)`` in chunks; shape ``(N,)`` or ``(N, k)``."""

    def map_logit_pairs(
        self,
        function: Callable[..., Tensor],
        tokens: SupervisedTokens,
        *token_args: Tensor,
        other: OtherModel = "reference",
    ) -> Tensor:
        """Apply ``function(logits, other_logits, *token_args)`` in chunks, for an objective that needs the ``other`` model."""


class Objective(nn.Module, ABC):
    """A loss of supervised tokens, not reduced: a value for every token, or for every answer.

    A subclass holds its hyperparameters and never sees Lightning. It declares what it uses, and finds that in the fields
    of `SupervisedTokens`: ``needs`` says what of other models, ``reads`` which answers, ``layers`` the output of
    which layers. ``per`` says what a value belongs to. The training step divides the sum of all values by their number
    over all micro-batches and processes, so that every token (or answer) has the same weight.

    Attributes:
        unit: Unit of the values, for messages.
        formula: The mean of the values in one line, for ``lit-unlearn methods``.
        paper: Its publication.
        stops: Whether forgetting with it has an end, so that a run may leave unused what a constraint allows.
        alignment: States that belong to the labels, see ``locate``.
        level: Number that is measured on the reference model before the first step, if there is one.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    reads: Reads = "answer"
    per: ClassVar[Per] = "token"
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stops: ClassVar[bool] = False
    unit: str = ""
    alignment: Alignment = "next_token"
    level: ReferenceLevel | None = None

    @property
    def layers(self) -> frozenset[int]:
        """Transformer blocks, numbered from 0, whose output it reads."""
        return frozenset()

    @property
    def requirements(self) -> list[str]:
        """Everything it uses beside the model's logits, by name."""
        names: list[str] = sorted(self.needs)
        if self.reads != "answer":
            names.append("alternate")
        if self.layers:
            names.append("activations")
        return names

    @abstractmethod
    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the values that the objective is the mean of.

        Args:
            lm: Gives token-wise functions of the logits.
            tokens: The ``N`` selected tokens of ``S`` answers.

        Returns:
            With gradient, shape ``(N,)``, or ``(S,)`` if ``per`` is ``"answer"``.
        """

    def select(self, index: TokenIndex) -> TokenIndex:
        """Return the tokens that the objective reads; the default is all.

        Whoever runs the model calls this first, so that nothing is computed for the tokens left out.

        Args:
            index: Supervised tokens of a batch.
        """
        return index

    @final
    def count(self, tokens: TokenIndex | SupervisedTokens) -> int:
        """Return the number of values that `forward` gives, which needs no pass through the model.

        Args:
            tokens: What `select` returned, before or after the pass.
        """
        return tokens.num_sequences if self.per == "answer" else tokens.labels.numel()


def compute_answer_logp(lm: TokenModel, tokens: SupervisedTokens) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each answer under the model and under the reference model, both ``(S,)``, nats.

    Raises:
        BatchError: If the latter was not measured.
    """
    if tokens.reference_logp is None:
        raise BatchError(
            "`reference_logp`, the answers' log-probabilities under the reference model, is missing: an objective that uses "
            'it must need "reference_logp", and your own loop must give batches a `reference_logp` of shape (B,).'
        )
    logp = tokens.by_sequence(lm.token_logp(tokens))
    return logp, tokens.reference_logp.to(logp.dtype)


def count_answer_tokens(tokens: SupervisedTokens) -> Tensor:
    """Return the number of tokens of each answer, shape ``(S,)``."""
    # Not `bincount`, which reads its largest value back from the device.
    return tokens.by_sequence(torch.ones_like(tokens.sequence))


def get_layer_output(tokens: SupervisedTokens, layer: int) -> Tensor:
    """Return the output of a layer for each token, shape ``(N, D)``.

    Raises:
        BatchError: If it was not kept.
    """
    if tokens.activations is None or layer not in tokens.activations:
        raise BatchError(f"the output of layer {layer} was not kept: the objective must name it in `layers`.")
    return tokens.activations[layer]
