"""The gradient of a model's embedding, without a buffer for the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_unlearn.functional.embedding import can_add_rows, lookup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def adding_to_gradient(model: PreTrainedModel) -> Iterator[None]:
    """Let the embedding of a model that runs within the block add to its gradient itself, where it can; see `lookup`."""
    embedding = model.get_input_embeddings()
    # A subclass may compute anything from its weight, and a compiled trunk is left as it was compiled.
    is_plain = type(embedding) is nn.Embedding and model.base_model._compiled_call_impl is None
    if not (is_plain and torch.is_grad_enabled() and can_add_rows(embedding.weight)):  # type: ignore[arg-type]
        yield
        return

    def look_up(module: nn.Embedding, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        return lookup(inputs[0], module.weight, module.padding_idx)

    hook = embedding.register_forward_hook(look_up)
    try:
        yield
    finally:
        hook.remove()
