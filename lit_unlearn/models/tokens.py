"""The supervised tokens of a batch: all that a loss ever sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.data.encoding import IGNORED
from lit_unlearn.models.packing import is_packed

Alignment = Literal["next_token", "label"]

Batch = Mapping[str, Any]  # tensors by name; under "alternate" perhaps a batch of other answers, row by row


class SupervisedTokens(NamedTuple):
    """The ``N`` supervised tokens of a batch, already shifted: ``hidden[n]`` predicts ``labels[n]``.

    Args:
        hidden: Last hidden states, shape ``(N, D)``; the logits, ``(N, V)``, for a model whose head is not linear.
        labels: Token ids, shape ``(N,)``.
        sequence: Index of the sequence each token belongs to, from 0 to ``num_sequences`` − 1, shape ``(N,)``.
        position: Position of the label in its row, shape ``(N,)``.
        num_sequences: Number of sequences ``S`` with at least one supervised token.
        rows: Which of the batch's sequences these are, ascending, shape ``(S,)``.
        reference_logp: Log-probability of each sequence under the reference model, nats, shape ``(S,)``; there for an
            objective that needs ``"reference_logp"``.
        alternate: The supervised tokens of the same sequences with another answer; there for an objective that reads
            the ``"pair"``.
        reference: The same tokens as the reference model sees them; there for an objective that needs ``"reference"``.
        activations: By layer the states behind ``hidden`` that the layer put out, shape ``(N, D)``; for an objective
            that needs ``"activations"``.
    """

    hidden: Tensor
    labels: Tensor
    sequence: Tensor
    position: Tensor
    num_sequences: int
    rows: Tensor
    reference_logp: Tensor | None = None
    alternate: SupervisedTokens | None = None
    reference: SupervisedTokens | None = None
    activations: Mapping[int, Tensor] | None = None

    def by_sequence(self, values: Tensor) -> Tensor:
        """Sums of a value per token, shape ``(N,)``, over each sequence, shape ``(S,)``."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)


def locate(batch: Batch, alignment: Alignment = "next_token") -> SupervisedTokens:
    """Finds the supervised tokens of a batch from its labels alone.

    Args:
        batch: As for ``LanguageModel.forward``; ``sequence``, where there is one, numbers the sequences in place of their
            order, shape ``(B, T)``.
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
        sequence = first.flatten().cumsum(0).view_as(labels) - 1
    sequence = batch.get("sequence", sequence)
    if alignment == "next_token":
        supervised &= ~first  # nothing before the first token predicts it
    row, column = supervised.nonzero(as_tuple=True)
    state = row * labels.shape[1] + column - (1 if alignment == "next_token" else 0)
    present, index = torch.unique(sequence[row, column], return_inverse=True)
    return SupervisedTokens(state, labels[row, column], index, column, present.numel(), present)


def check_batch(batch: Batch) -> None:
    """Raises KeyError unless a batch has ``input_ids`` and ``labels``."""
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise KeyError(
                f"a batch needs 'input_ids' and 'labels' (-100 where not supervised), but has {sorted(batch)}: use "
                "transformers' usual collators, or ForgetRetain."
            )
