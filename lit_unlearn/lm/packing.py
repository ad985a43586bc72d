"""Several sequences in one row, told apart by positions that restart at 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lit_unlearn.lm.head import without_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether the rows of a batch hold several sequences each."""
    return "position_ids" in batch and "attention_mask" not in batch


def check_packing(model: PreTrainedModel) -> None:
    """Refuses a model in which a sequence sees the one before it in its row: its losses would be silently wrong.

    transformers separates packed sequences where the model hands the positions on to the mask; not every model does.

    Args:
        model: Any causal LM; its trunk runs once on two short rows, without dropout.

    Raises:
        ValueError: If the second of two packed sequences changes with the first.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 1, 2, 3, 4]], device=embeddings.device)
    positions = torch.arange(4, device=rows.device).repeat(2, 2)
    with without_dropout(model):
        output = model.base_model(input_ids=rows % embeddings.shape[0], position_ids=positions, use_cache=False)[0]
    one, other = output[:, 4:].float()
    # Measured at random weights: exactly 0 where they are kept apart, 0.2 for OPT and GPT-OSS, 0.006 for BLOOM.
    if (one - other).norm() > max(1e-4, 2 * torch.finfo(output.dtype).eps) * one.norm():
        raise ValueError(
            f"{type(model).__name__} lets sequences that are packed in one row see each other: give it padded rows, "
            "`input_ids` with `attention_mask`, and no `position_ids`."
        )
