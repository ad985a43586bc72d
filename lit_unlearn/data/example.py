"""Examples: the tokens and labels of one training item, and batches that are padded from several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# The label of a token that is not supervised, as in transformers.
IGNORED = -100


class Example(NamedTuple):
    """One training item: the tokens of a row, unpadded.

    Args:
        input_ids: Token ids of prompt and answer, shape ``(T,)``.
        labels: The same ids where supervised (the answer and its end), −100 elsewhere, shape ``(T,)``.
        id: ``"<stream>/<row number>"``, which `ForgetRetain` gives; an alternate answer's ends with ``"/alternate"``.
        is_cut: Whether tokens beyond ``max_length`` were cut off.
        alternate: The same question with another answer, for objectives that read one.
        attention_mask: 0 for tokens that no other one sees, shape ``(T,)``; ``None`` if every token is seen.
    """

    input_ids: list[int]
    labels: list[int]
    id: str = ""
    is_cut: bool = False
    alternate: Example | None = None
    attention_mask: list[int] | None = None

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify tokens and labels.

        The id alone does not: under the same id, another tokenizer or template makes another example.
        """
        content = self[:2] if self.attention_mask is None else (*self[:2], self.attention_mask)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]

    def without_labels(self) -> Example:
        """Return the example with nothing supervised and no id, to fill up a batch without weighing anything."""
        alternate = None if self.alternate is None else self.alternate.without_labels()
        return self._replace(labels=[IGNORED] * len(self.labels), id="", is_cut=False, alternate=alternate)

    def cut(self, length: int) -> Example:
        """Return the example with its first tokens only."""
        mask = None if self.attention_mask is None else self.attention_mask[:length]
        is_cut = self.is_cut or len(self.input_ids) > length
        return self._replace(
            input_ids=self.input_ids[:length], labels=self.labels[:length], is_cut=is_cut, attention_mask=mask
        )


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Pad examples to a Hugging Face batch, with the mask made from the lengths.

    Args:
        examples: ``B`` examples.
        pad_id: Fills the tail; any id will do. The mask does not depend on it: with the end token as padding,
            ``ids != pad_id`` would hide the end of every answer.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64, shape ``(B, T)``; and under ``alternate`` a batch of the
        alternate answers, if there are any.
    """
    width = max(len(example.input_ids) for example in examples)
    shape = (len(examples), width)
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        ids[i, :length] = torch.tensor(example.input_ids)
        mask[i, :length] = 1 if example.attention_mask is None else torch.tensor(example.attention_mask)
        labels[i, :length] = torch.tensor(example.labels)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    alternates = [example.alternate for example in examples if example.alternate is not None]
    if alternates:
        batch["alternate"] = collate(alternates, pad_id)
    return batch


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the first supervised one: exactly what the answer is predicted from."""
    is_supervised = [label != IGNORED for label in example.labels]
    return example.input_ids[: is_supervised.index(True)]


def has_supervised_token(example: Example) -> bool:
    """Return whether any token of an example is predicted and supervised."""
    # Nothing predicts the first token, so a label there supervises nothing.
    return any(label != IGNORED for label in example.labels[1:])
