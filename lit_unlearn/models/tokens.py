"""Supervised tokens: where they are in a batch, and what the model computed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.errors import BatchError
from lit_unlearn.models.packed_attention import is_packed
from lit_unlearn.models.transfer import send

Alignment = Literal["next_token", "label"]

OtherModel = Literal["reference", "teacher"]
"""A frozen model that the trained one is compared with: itself before unlearning, or one that never saw the forget set."""

Batch = Mapping[str, Any] | Sequence[Example]
"""A padded or packed Hugging Face batch (tensors by name; under ``alternate`` perhaps a batch of other answers), or examples."""


class TokenIndex(NamedTuple):
    """The places of the ``N`` supervised tokens of a batch.

    Built on the CPU, before the batch goes to the device, so that no step waits for the device to answer.

    Args:
        state: Index of the state that predicts each token, into the flattened ``(B · T)`` states, shape ``(N,)``.
        labels: Token ids, shape ``(N,)``.
        sequence: Number of the sequence that each token belongs to, from 0 to ``num_sequences`` − 1, shape ``(N,)``.
        num_sequences: Number of sequences ``S`` with at least one supervised token.
        examples: Which of the batch's sequences these are, ascending, shape ``(S,)``.
        reference_logp: Log-probability of each sequence under the reference model, nats, shape ``(S,)``.
        alternate: The same for the alternate answers of the same sequences.
    """

    state: Tensor
    labels: Tensor
    sequence: Tensor
    num_sequences: int
    examples: Tensor
    reference_logp: Tensor | None = None
    alternate: TokenIndex | None = None

    def keep(self, mask: Tensor) -> TokenIndex:
        """Return the index of some of the tokens; the number of sequences stays.

        Args:
            mask: Which tokens to keep, bool, shape ``(N,)``.
        """
        return self._replace(state=self.state[mask], labels=self.labels[mask], sequence=self.sequence[mask])

    def by_sequence(self, values: Tensor) -> Tensor:
        """Sum a value per token, shape ``(N,)``, over each sequence; shape ``(S,)``."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def to(self, device: torch.device) -> TokenIndex:
        """Return the same index with its tensors on a device."""
        moved: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if isinstance(value, Tensor):
                moved[name] = send(value, device)
            elif isinstance(value, TokenIndex):
                moved[name] = value.to(device)
        return self._replace(**moved)

    def gather(self, states: Tensor, activations: Mapping[int, Tensor] | None = None) -> SupervisedTokens:
        """Return the tokens with what a model computed for them.

        Args:
            states: Last hidden states of the batch, or its logits, shape ``(B · T, D)`` or ``(B · T, V)``.
            activations: Outputs of layers by their numbers, shape ``(B · T, D)``.
        """
        layers = activations or {}
        return SupervisedTokens(
            states[self.state],
            self.labels,
            self.sequence,
            self.num_sequences,
            self.examples,
            self.reference_logp,
            alternate=None if self.alternate is None else self.alternate.gather(states, activations),
            activations={layer: output[self.state] for layer, output in layers.items()},
        )


class SupervisedTokens(NamedTuple):
    """The ``N`` supervised tokens of a batch, already shifted: ``hidden[n]`` predicts ``labels[n]``.

    Attributes:
        hidden: Last hidden states, shape ``(N, D)``; the logits, ``(N, V)``, for a model whose head is not linear.
        labels: Token ids, shape ``(N,)``.
        sequence: Number of the sequence that each token belongs to, from 0 to ``num_sequences`` − 1, shape ``(N,)``.
        num_sequences: Number of sequences ``S`` with at least one supervised token.
        examples: Which of the batch's sequences these are, ascending, shape ``(S,)``.
        reference_logp: Log-probability of each sequence under the reference model, nats, shape ``(S,)``; there for an
            objective that needs ``"reference_logp"``.
        alternate: The supervised tokens of the same sequences with another answer; there for an objective that reads
            the ``"pair"``.
        reference: The same tokens as the reference model sees them; there for an objective that needs ``"reference"``.
        activations: Output of a layer for each token, by number of the layer, shape ``(N, D)``; there for the layers that
            an objective names.
        teacher: The same tokens as the teacher sees them; there for an objective that needs ``"teacher"``.
    """

    hidden: Tensor
    labels: Tensor
    sequence: Tensor
    num_sequences: int
    examples: Tensor
    reference_logp: Tensor | None = None
    alternate: SupervisedTokens | None = None
    reference: SupervisedTokens | None = None
    activations: Mapping[int, Tensor] | None = None
    teacher: SupervisedTokens | None = None

    def by_sequence(self, values: Tensor) -> Tensor:
        """Sum a value per token, shape ``(N,)``, over each sequence; shape ``(S,)``."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)


def locate(batch: Mapping[str, Any], alignment: Alignment = "next_token") -> TokenIndex:
    """Find the supervised tokens of a batch from its labels alone.

    Args:
        batch: ``input_ids`` and ``labels``, shape ``(B, T)``, as for ``LanguageModel.forward``; ``sequence``, where there
            is one, numbers the sequences in place of their order, shape ``(B, T)``.
        alignment: ``"next_token"``: the state before each label. ``"label"``: the state at each label.

    Returns:
        Their index, on the batch's device.

    Raises:
        BatchError: If the batch lacks ``input_ids`` or ``labels``.
    """
    check_batch(batch)
    labels = batch["labels"]
    supervised = labels != IGNORED
    first = torch.zeros_like(supervised)
    first[:, 0] = True

    if is_packed(batch):
        first |= batch["position_ids"] == 0
        sequence = first.flatten().cumsum(0).view_as(labels) - 1
    else:
        sequence = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
    sequence = batch.get("sequence", sequence)

    if alignment == "next_token":
        supervised &= ~first  # nothing predicts the first token of a sequence
    row, column = supervised.nonzero(as_tuple=True)
    shift = 1 if alignment == "next_token" else 0
    state = row * labels.shape[1] + column - shift
    examples, number = torch.unique(sequence[row, column], return_inverse=True)
    return TokenIndex(state, labels[row, column], number, examples.numel(), examples)


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raise `BatchError` unless a batch has ``input_ids`` and ``labels``."""
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise BatchError(
                f"a batch needs 'input_ids' and 'labels' (-100 where not supervised), but has {sorted(batch)}: use "
                "the usual collators of transformers, or ForgetRetain."
            )
