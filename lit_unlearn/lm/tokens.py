"""The supervised tokens of a batch: all that a loss ever sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.lm.packing import IGNORED, is_packed

Alignment = Literal["next_token", "label"]


class SupervisedTokens(NamedTuple):
    """The ``N`` supervised tokens of a batch, already shifted: ``hidden[n]`` predicts ``labels[n]``.

    Args:
        hidden: Last hidden states, shape ``(N, D)``; the logits, ``(N, V)``, for a model whose head is not linear.
        labels: Token ids, shape ``(N,)``.
        sequence: Index of the sequence each token belongs to, from 0 to ``num_sequences`` − 1, shape ``(N,)``.
        position: Position of the label in its row, shape ``(N,)``.
        num_sequences: Number of sequences with at least one supervised token.
    """

    hidden: Tensor
    labels: Tensor
    sequence: Tensor
    position: Tensor
    num_sequences: int


def locate(batch: Mapping[str, Tensor], alignment: Alignment = "next_token") -> SupervisedTokens:
    """Finds the supervised tokens of a batch from its labels alone.

    Args:
        batch: As for ``LanguageModel.forward``.
        alignment: ``"next_token"``: the state before each label. ``"label"``: the state at each label.

    Returns:
        Supervised tokens whose ``hidden`` holds indices into the flattened ``(B · T)`` states, shape ``(N,)``.

    Raises:
        KeyError: If the batch lacks ``input_ids`` or ``labels``.
    """
    check_batch(batch)
    labels = batch["labels"]
    sequence = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
    supervised = labels != IGNORED
    first = torch.zeros_like(supervised)
    first[:, 0] = True
    if is_packed(batch):
        first |= batch["position_ids"] == 0
        sequence = first.flatten().cumsum(0).view_as(labels)
    if alignment == "next_token":
        supervised &= ~first  # nothing before the first token predicts it
    row, column = supervised.nonzero(as_tuple=True)
    state = row * labels.shape[1] + column - (1 if alignment == "next_token" else 0)
    present, index = torch.unique(sequence[row, column], return_inverse=True)
    return SupervisedTokens(state, labels[row, column], index, column, present.numel())


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Raises KeyError unless a batch has ``input_ids`` and ``labels``."""
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise KeyError(
                f"a batch needs 'input_ids' and 'labels' (-100 where not supervised), but has {sorted(batch)}: use "
                "transformers' usual collators, or ForgetRetain."
            )
